"""The thread that uses the device: it builds engines, captures graphs and starts steps, for the life of the process.

Libraries keep state by thread. cuBLAS's workspace belongs to the thread that a graph was captured in, and a graph
that outlives its thread writes to memory that was given back; the threads of the CPU's kernels belong to the one
that starts them. So it is one thread, and never one that ends after building.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
_Task = tuple["Future[Any]", Callable[[], Any]]


class DeviceThread:
    """Does what it is given in order, one thing at a time."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        # A daemon: a process that is told to end does not wait for an engine that is being built.
        threading.Thread(target=self._run, name="device", daemon=True).start()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Do it in the background; what it raises is the future's."""
        future: Future[T] = Future()
        self._tasks.put((future, function))
        return future

    def call(self, function: Callable[[], T]) -> T:
        """Do it, and return what it returns or raise what it raises."""
        return self.submit(function).result()

    def close(self) -> None:
        """End the thread once it has done what it was given."""
        self._tasks.put(None)

    def _run(self) -> None:
        while _do(self._tasks.get()):
            pass


def _do(task: _Task | None) -> bool:
    """Do a task; False if there is none. A function of its own: what a task held is let go when it returns."""
    if task is None:
        return False
    future, function = task
    try:
        future.set_result(function())
    except BaseException as error:  # whoever waits for the future raises it again
        future.set_exception(error)
    return True


class HostThreads(DeviceThread):
    """Builds in a thread that ends, and does the rest in the thread that asks: for devices that compute on the CPU.

    Each thread that calls torch has a team of its own, and two living teams slow each other down by half.
    """

    def __init__(self) -> None:
        pass

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Do it in the background; what it raises is the future's."""
        future: Future[T] = Future()
        threading.Thread(target=_do, args=((future, function),), name="prepare", daemon=True).start()
        return future

    def call(self, function: Callable[[], T]) -> T:
        """Do it, and return what it returns or raise what it raises."""
        return function()

    def close(self) -> None:
        """Do nothing: no thread is kept."""
