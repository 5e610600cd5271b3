"""Fails where a step reads the device from the host, or allocates on it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from octavo.gpu_worker.distributed.collectives import Collectives

_HOST_READS = (
    "item", "tolist", "cpu", "numpy", "nonzero", "unique", "__array__", "__bool__", "__int__", "__float__", "__index__",
)  # fmt: skip
_HOST_READING_OPS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "_to_copy")


class GuardError(AssertionError):
    """A step did what it must not do."""


class _Guard(TorchDispatchMode):
    """Lets operations through that write to memory which was there when the guard was set up."""

    def __init__(self) -> None:
        super().__init__()
        self.num_operations = 0
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        self._known = {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_operations += 1
        name = func.overloadpacket.__name__
        if name in _HOST_READING_OPS:
            raise GuardError(f"{func} reads the device, or copies from it")
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            is_known = not tensor.numel() or tensor.untyped_storage().data_ptr() in self._known
            if not is_known:
                raise GuardError(f"{func} allocates {tuple(tensor.shape)}")
        return output


@contextmanager
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Guard]:
    """Guard what is done inside. Kernels are let through: the interpreter copies what it runs on, and gloo too."""
    launch, finish = interpreter.GridExecutor.__call__, Collectives._finish

    def unguarded_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as inner, _disable_current_modes():
            for name, original in originals.items():
                inner.setattr(torch.Tensor, name, original)
            return launch(self, *args, **kwargs)

    def unguarded_finish(start: Any) -> None:
        with _disable_current_modes():
            finish(start)

    def refuse(name: str) -> Any:
        def read(*_: Any, **__: Any) -> Any:
            raise GuardError(f"Tensor.{name} reads the device")

        return read

    originals = {name: getattr(torch.Tensor, name) for name in _HOST_READS}
    guard = _Guard()
    with monkeypatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", unguarded_launch)
        patch.setattr(Collectives, "_finish", staticmethod(unguarded_finish))
        for name in _HOST_READS:
            patch.setattr(torch.Tensor, name, refuse(name))
        with guard:
            yield guard
