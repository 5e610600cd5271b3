"""Ray on top of the environment that the tests run in, kept in the user's cache: 570 MB."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "octavo" / "tools"


def requirement() -> str:
    """Return what the extra `ray` adds to `serve`."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (found,) = [each for each in extras["ray"] if each.startswith("ray[")]
    return str(found)


def find_python() -> tuple[str, str]:
    """Return a Python that has Ray and all that this one has; or an empty string, and why there is none."""
    if _has_ray(sys.executable):
        return sys.executable, ""
    below = sysconfig.get_path("purelib")
    home = CACHE / f"ray-{hashlib.sha256(f'{below} {requirement()}'.encode()).hexdigest()[:12]}"
    python = home / "bin" / "python"
    if _has_ray(str(python)):
        return str(python), ""
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True, capture_output=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        # Not a bare path: editable installs are in files of their own, which only addsitedir reads.
        (home / "lib" / version / "site-packages" / "below.pth").write_text(
            f"import site; site.addsitedir({below!r})\n"
        )
        install = [str(python), "-m", "pip", "install", "--quiet", requirement()]
        subprocess.run(install, check=True, capture_output=True, text=True, timeout=900)
    except (subprocess.SubprocessError, OSError) as error:
        return "", f"{requirement()} cannot be installed: {error} {getattr(error, 'stderr', '') or ''}"
    return str(python), ""


def _has_ray(python: str) -> bool:
    try:
        return subprocess.run([python, "-c", "import ray"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False
