"""Imports a copy of a kernel's module with one piece of its text replaced, to see the tests fail.

The interpreter reads and writes real addresses. A mutant must not hit another object's memory, so
what it may miss lies in the middle of a larger piece of memory: `guarded`.
"""

from __future__ import annotations

import importlib.util
import sys
from itertools import count
from pathlib import Path
from types import ModuleType

import torch

_NUMBER = count()


def mutated(module: ModuleType, tmp_path: Path, old: str, new: str) -> ModuleType:
    """Return a copy of `module` in which every `old` is `new`; `old` must be there."""
    assert module.__file__ is not None
    text = Path(module.__file__).read_text()
    assert old in text, f"{old!r} is not in {module.__file__}: the mutation is out of date"
    name = f"mutant_{next(_NUMBER)}"
    path = tmp_path / f"{name}.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    sys.modules[name] = mutant  # dataclasses and the interpreter look it up
    spec.loader.exec_module(mutant)
    return mutant


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy with as much memory before and behind it, and a page, that belongs to nobody."""
    margin = tensor.numel() + 4096
    memory = torch.zeros(2 * margin + tensor.numel(), dtype=tensor.dtype)
    view = memory[margin : margin + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view
