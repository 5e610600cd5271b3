"""A TCP hop that can be cut, in one direction or in both: then nothing passes and nobody is told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.ports import free_port


class Relay:
    """Forwards connections to an address; `num_connections` were opened so far, those of which nothing passes too."""

    def __init__(self, target_port: int) -> None:
        self.port = free_port()
        self.num_connections = 0
        self._target_port = target_port
        self._there, self._back = asyncio.Event(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.heal()

    def cut(self, there: bool, back: bool) -> None:
        """Let nothing pass to the target, or from it."""
        for passes, is_cut in ((self._there, there), (self._back, back)):
            if is_cut:
                passes.clear()

    def heal(self) -> None:
        """Let everything pass, also what waited."""
        self._there.set()
        self._back.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Relay]:
        """Listen."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:  # nobody is there
            writer.close()
            return
        for source, sink, passes in ((reader, far_writer, self._there), (far_reader, writer, self._back)):
            task = asyncio.create_task(self._pump(source, sink, passes))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, passes: asyncio.Event) -> None:
        try:
            with contextlib.suppress(OSError):
                while data := await source.read(1 << 16):
                    await passes.wait()
                    sink.write(data)
                    await sink.drain()
        finally:
            sink.close()
