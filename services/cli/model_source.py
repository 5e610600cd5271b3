"""Finds what `octavo serve MODEL` names: a folder, a GGUF file, a model of the hub, or the demo."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.services.cli import demo_model
from octavo.services.cli.demo_model import Report
from octavo.services.cli.errors import CommandError

# Weights as tensors only, and what a tokenizer needs: nothing that could be run.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.txt"]
# Of folders, those that sentence-transformers numbers: 1_Pooling and the like.
_HUB_FILES_NEVER = ["*.bin", "*.py", "*.pt", "*.pth", "*.pkl", "[!0-9]*/*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


@dataclass(frozen=True)
class Model:
    """A model on this machine's disk, and the name to serve it by; the commit, if it is from the hub."""

    path: Path
    name: str
    revision: str = ""


def find(text: str, report: Report) -> Model:
    """Return the model that `text` names, downloaded if need be. Raises CommandError."""
    if demo := demo_model.DEMOS.get(text):
        return Model(demo_model.fetch(demo_model.cache_dir(), report, demo), demo.name)
    path = Path(text).expanduser()
    if path.is_dir():
        return Model(_checked_folder(path, text).resolve(), path.resolve().name)
    if path.is_file():
        return Model(_checked_gguf(path).resolve(), path.stem)
    if _HUB_ID.fullmatch(text) and not text.endswith(".gguf"):
        folder = _from_hub(text)
        revision = folder.name if folder.parent.name == "snapshots" else ""
        return Model(_checked_folder(folder, text), text.split("@")[0], revision)
    raise CommandError(
        f"there is no {text}: MODEL is a folder, a .gguf file, a hub id such as org/name, demo or demo-embed"
    )


def _checked_folder(folder: Path, label: str) -> Path:
    """Return `folder`, which a person knows as `label`, if it has all that is needed. Raises CommandError."""
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
    raise CommandError(f"{label} is not a model that can be served: it has no {', no '.join(missing)}{hint}")


def _checked_gguf(path: Path) -> Path:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CommandError(f"{path} is not a GGUF file")
    return path


def _from_hub(text: str) -> Path:
    """Return the folder of a model of the hub: what is new there is downloaded, else the cache is used."""
    repo, _, revision = text.partition("@")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError:
        raise CommandError("huggingface_hub is not installed: pip install 'octavo[serve]'") from None
    download: Callable[..., Any] = huggingface_hub.snapshot_download
    try:
        folder = download(repo, revision=revision or None, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_FILES_NEVER)
    except errors.GatedRepoError:
        raise CommandError(f"{repo} asks you to accept its terms and to log in first: hf auth login") from None
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
    return Path(folder)
