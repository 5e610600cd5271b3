"""Finds what `octavo serve MODEL` names: a folder, a GGUF file, a model of the hub, or the demo."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.gpu_worker.formats.checkpoint_files import adapter_of
from octavo.services.cli import demo_model
from octavo.services.cli.demo_model import Report
from octavo.services.cli.errors import CommandError

# Weights as tensors only, and what a tokenizer needs: nothing that could be run.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.txt"]
# Of folders, those that sentence-transformers numbers: 1_Pooling and the like.
HUB_FILES_NEVER = ["*.bin", "*.py", "*.pt", "*.pth", "*.pkl", "[!0-9]*/*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


@dataclass(frozen=True)
class Model:
    """A model on this machine's disk, and the name to serve it by; the commit, if it is from the hub."""

    path: Path
    name: str
    revision: str = ""


class GatedError(CommandError):
    """The hub gives a model's files only to people who have accepted its terms."""


class NotServedError(CommandError):
    """What was found is no model that can be served."""


def find(text: str, report: Report) -> Model:
    """Return the model that `text` names, downloaded if need be. Raises CommandError."""
    if model := find_here(text):
        return model
    if demo := demo_model.DEMOS.get(text):
        return Model(demo_model.fetch(demo_model.cache_dir(), report, demo), demo.name)
    folder = _from_hub(text)
    revision = folder.name if folder.parent.name == "snapshots" else ""
    return Model(checked_folder(folder, text), text.split("@")[0], revision)


def find_here(text: str) -> Model | None:
    """Return the folder or file that `text` names, or None if it names what may have to be downloaded.

    Raises CommandError if it names nothing.
    """
    if text in demo_model.DEMOS:
        return None
    path = Path(text).expanduser()
    if path.is_dir():
        return Model(checked_folder(path, text).resolve(), path.resolve().name)
    if path.is_file():
        return Model(_checked_gguf(path).resolve(), path.stem)
    if _HUB_ID.fullmatch(text) and not text.endswith(".gguf"):
        return None
    raise CommandError(
        f"there is no {text}: MODEL is a folder, a .gguf file, a hub id such as org/name, demo or demo-embed"
    )


def writes_text(path: Path) -> bool:
    """Return whether a model seems to be one that generates, and not one for vectors or scores alone."""
    if path.is_file():
        return True
    try:
        architectures = json.loads((path / "config.json").read_bytes())["architectures"]
        return any(str(name).endswith("ForCausalLM") for name in architectures)
    except (OSError, ValueError, TypeError, KeyError):
        return True


def checked_folder(folder: Path, label: str) -> Path:
    """Return `folder`, which a person knows as `label`, if it has all that is needed. Raises CommandError."""
    if adapter := adapter_of(folder):
        raise NotServedError(f"{label} {adapter}")
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if not missing:
        return folder
    hint = ""
    if files := sorted(folder.glob("*.gguf")):
        hint = f"; to serve a GGUF file, name it: {files[0]}"
    elif any(folder.glob("*.bin")) and "*.safetensors" in missing:
        hint = "; weights in .bin files are never loaded, they can hold code"
    raise NotServedError(f"{label} is not a model that can be served: it has no {', no '.join(missing)}{hint}")


def _checked_gguf(path: Path) -> Path:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CommandError(f"{path} is not a GGUF file")
    return path


def _from_hub(text: str) -> Path:
    """Return the folder of a model of the hub: what is new there is downloaded, else the cache is used."""
    repo, _, revision = text.partition("@")
    with hub_errors(repo, revision):
        import huggingface_hub

        download: Callable[..., Any] = huggingface_hub.snapshot_download
        folder = download(repo, revision=revision or None, allow_patterns=HUB_FILES, ignore_patterns=HUB_FILES_NEVER)
    return Path(folder)


def find_cached(text: str) -> Path | None:
    """Return the folder of a model of the hub that was downloaded earlier, None if there is none or not all of it."""
    repo, _, revision = text.partition("@")
    with suppress(CommandError, OSError), hub_errors(repo, revision):
        import huggingface_hub

        download: Callable[..., Any] = huggingface_hub.snapshot_download
        return checked_folder(Path(download(repo, revision=revision or None, local_files_only=True)), text)
    return None


@contextmanager
def hub_errors(repo: str, revision: str) -> Iterator[None]:
    """Prepare for asking the hub; what it answers is raised as CommandError, GatedError if terms are to be accepted."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        from huggingface_hub import errors
    except ModuleNotFoundError:
        raise CommandError("huggingface_hub is not installed: pip install 'octavo[serve]'") from None
    try:
        yield
    except CommandError:
        raise
    except errors.GatedRepoError:
        raise GatedError(f"{repo} asks you to accept its terms and to log in first: hf auth login") from None
    except errors.RevisionNotFoundError:
        raise CommandError(f"{repo} has no revision {revision}") from None
    except errors.RepositoryNotFoundError:
        raise CommandError(
            f"there is no {repo}, neither here nor on the hub (or it is private: hf auth login)"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise CommandError(f"{repo} is not in the cache, and the hub cannot be reached") from None
    except OSError as error:
        raise CommandError(f"cannot download {repo}: {error.strerror or error}") from None
    except Exception as error:  # the HTTP library's own errors differ between versions
        raise CommandError(f"cannot download {repo}: {' '.join(str(error).split())[:300]}") from None
