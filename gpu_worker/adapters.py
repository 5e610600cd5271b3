"""The LoRA adapters that a worker holds: loaded beside the steps, in a thread of their own, and kept by number."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict, deque
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.common.adapter_files import AdapterError, read_files
from octavo.gpu_worker.device_thread import HostThreads
from octavo.gpu_worker.errors import one_line
from octavo.gpu_worker.loading.adapters import PeftAdapter
from octavo.gpu_worker.steps.runner import Runner
from octavo.worker.v1 import worker_pb2

_VALUE_BYTES = 2  # bfloat16
_MAX_FILE_BYTES = 2.5  # for each byte in memory: float32, and what is between tensors
_SMALL_BYTES = 1 << 20
_NICENESS = 10  # of the thread that loads: steps have the cores first


@dataclass(frozen=True)
class _Adapter:
    packed: Any
    num_bytes: int


class _FullError(Exception):
    """There is no room for so many bytes, because of other adapters."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(f"{num_bytes} bytes")
        self.num_bytes = num_bytes


class Adapters:
    """Owner of the adapters of an engine. All methods are called by the thread that starts steps.

    ids  those that rows may have
    """

    def __init__(self, runner: Runner, max_adapters: int, memory_bytes: int) -> None:
        self._runner = runner
        self._modules = runner.adapter_modules() if max_adapters else {}
        self.max_adapters = max_adapters if self._modules else 0
        self.memory_bytes = memory_bytes
        self.ids: set[int] = set()
        self._loaded: dict[int, tuple[str, _Adapter]] = {}  # by number: SHA-256, and the adapter
        self._unused: OrderedDict[str, _Adapter] = OrderedDict()  # of earlier epochs, by SHA-256: oldest first
        self._waiting: deque[worker_pb2.AdapterLoad] = deque()
        self._running: tuple[worker_pb2.AdapterLoad, Future[_Adapter]] | None = None
        self._threads = HostThreads()

    @property
    def is_loading(self) -> bool:
        """Whether an adapter is being loaded."""
        return self._running is not None or bool(self._waiting)

    def load(self, load: worker_pb2.AdapterLoad) -> None:
        """Begin to load an adapter; `finished` tells of it."""
        if not self.is_loading:  # else there may be as many as a scheduler has numbers for: the others wait
            self._start(load)
        elif len(self._waiting) < max(self.max_adapters, 1):
            self._waiting.append(load)

    def drop(self, adapter_id: int) -> None:
        """Forget an adapter, or that it is to be loaded."""
        self._waiting = deque(load for load in self._waiting if load.adapter_id != adapter_id)
        if adapter_id in self._loaded:
            self._runner.set_adapter(adapter_id, None)
            self.ids.discard(adapter_id)
            del self._loaded[adapter_id]

    def finished(self) -> list[worker_pb2.AdapterLoaded]:
        """Return the answers to what was loaded, or could not be, since the last call."""
        answers = []
        while self._running is not None and self._running[1].done():
            load, future = self._running
            self._running = None
            answers.append(self._answer(load, future))
            if self._waiting:
                self._start(self._waiting.popleft())
        return answers

    def reset(self) -> None:
        """Have no adapter any more. What is in memory stays there, as long as there is room, and is found again."""
        self._waiting.clear()
        self._running = None  # what it makes is nobody's
        for adapter_id, (sha256, adapter) in self._loaded.items():
            self._runner.set_adapter(adapter_id, None)
            self._unused[sha256] = adapter
        self._loaded.clear()
        self.ids.clear()

    def _start(self, load: worker_pb2.AdapterLoad) -> None:
        known = self._unused.pop(load.sha256, None)
        if known is not None:
            future: Future[_Adapter] = Future()
            future.set_result(known)
        else:
            room = self.memory_bytes - sum(adapter.num_bytes for _, adapter in self._loaded.values())
            future = self._threads.submit(lambda: self._read(load, room))
        self._running = load, future

    def _read(self, load: worker_pb2.AdapterLoad, room: int) -> _Adapter:
        """Read, check and pack an adapter; in another thread. Raises AdapterError, _FullError."""
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        if not self._modules:
            raise AdapterError("this worker takes no adapters: it is one of several ranks, or has max_adapters 0")
        most = int(self.memory_bytes * _MAX_FILE_BYTES) + _SMALL_BYTES
        files = read_files(Path(load.path), most)
        if files.sha256 != load.sha256:
            raise AdapterError("its files were written anew since it got its name; load it again")
        adapter = PeftAdapter(files, self._modules)
        num_bytes = adapter.num_values * _VALUE_BYTES
        if num_bytes > self.memory_bytes:
            raise AdapterError(f"it takes {num_bytes} bytes of memory; raise --adapter-memory from {self.memory_bytes}")
        if num_bytes > room:
            raise _FullError(num_bytes)
        return _Adapter(self._runner.pack_adapter(adapter.pairs()), num_bytes)

    def _answer(self, load: worker_pb2.AdapterLoad, future: Future[_Adapter]) -> worker_pb2.AdapterLoaded:
        answer = worker_pb2.AdapterLoaded(adapter_id=load.adapter_id)
        error = future.exception()
        if isinstance(error, _FullError):
            answer.num_bytes, answer.is_full, answer.problem = error.num_bytes, True, "other adapters take the memory"
        elif isinstance(error, AdapterError):
            answer.problem = one_line(error)
        elif isinstance(error, MemoryError):
            answer.problem = "there is no memory for it"
        elif error is not None:
            raise error
        elif not 1 <= load.adapter_id <= self.max_adapters:
            answer.problem = f"number {load.adapter_id} is not one of {self.max_adapters}"
        else:
            self.drop(load.adapter_id)
            adapter = future.result()
            self._loaded[load.adapter_id] = load.sha256, adapter
            self._make_room()
            self._runner.set_adapter(load.adapter_id, adapter.packed)
            self.ids.add(load.adapter_id)
            answer.num_bytes = adapter.num_bytes
        return answer

    def _make_room(self) -> None:
        """Let go of adapters that nothing names, as many as the others need room of."""
        total = sum(adapter.num_bytes for _, adapter in self._loaded.values())
        total += sum(adapter.num_bytes for adapter in self._unused.values())
        while self._unused and (total > self.memory_bytes or len(self._unused) + len(self._loaded) > self.max_adapters):
            total -= self._unused.popitem(last=False)[1].num_bytes
