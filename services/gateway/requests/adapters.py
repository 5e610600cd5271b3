"""The LoRA adapters of a gateway: which names there are, and what is behind them now."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from octavo.common.adapter_files import CONFIG_FILE, AdapterError, sha256_of, times_of
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.adapter_names import MAX_NAMES, is_name, key_of
from octavo.services.common.errors import Reason, Resource, ServingError, invalid_field
from octavo.services.gateway.schedulers.pool import SchedulerPool

_LOOK_AGAIN_S = 1.0  # whether the files of an adapter in the folder have changed
_MAX_SEEN = 10_000
_MAX_READS = 4  # at once
_IN_FOLDER = "/"  # which no name in the folder has


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that a request may have; `key` and `path` as in Submit."""

    name: str
    key: str
    path: str


@dataclass(slots=True)
class _Seen:
    """An adapter, as its files were when they were looked at: `times_of` before they were read."""

    times: tuple[tuple[int, int, int], ...]
    sha256: str
    looked_at: float


class Adapters:
    """Names that were given at the start, by operators, or by a folder. Those of operators are shared by gateways."""

    def __init__(self, taken: tuple[str, ...], folder: Path | None, schedulers: SchedulerPool) -> None:
        """taken: the names of the model, which no adapter may have."""
        self._taken = taken
        self._folder = folder
        self._schedulers = schedulers
        self._seen: OrderedDict[str, _Seen] = OrderedDict()
        self._reads: dict[Path, asyncio.Task[_Seen]] = {}  # that are under way, for all who wait for them
        self._turns = asyncio.Semaphore(_MAX_READS)

    @property
    def folder(self) -> Path | None:
        """Where adapters are found by the names of their folders."""
        return self._folder

    async def start(self, given: Mapping[str, Path]) -> None:
        """Take what was given at the start. Raises AdapterError."""
        for name, path in given.items():
            if name in self._taken:
                raise AdapterError(f"{path}: {name!r} is what the model is called; give the adapter another name")
            try:
                seen = await self._read(path)
            except AdapterError as error:
                raise AdapterError(f"{path}: {error}") from None
            version = max(time_ns for time_ns, *_ in seen.times) // 1_000_000
            entry = scheduler_pb2.AdapterName(name=name, path=str(path.resolve()), sha256=seen.sha256, version=version)
            self._schedulers.publish_adapters([entry])

    def knows(self, name: str) -> bool:
        """Return whether there is an adapter of this name."""
        return self._schedulers.adapter_names.get(name) is not None or self._is_in_folder(name)

    def names(self) -> list[str]:
        """Return all names."""
        found = {entry.name for entry in self._schedulers.adapter_names}
        if self._folder is not None and len(found) < MAX_NAMES:
            # Without the folder, or if it may not be read, there are those of operators.
            with contextlib.suppress(OSError), os.scandir(self._folder) as entries:
                for entry in entries:
                    if len(found) >= MAX_NAMES:
                        break
                    if self._is_in_folder(entry.name):
                        found.add(entry.name)
        return sorted(found)

    def entries(self) -> list[scheduler_pb2.AdapterName]:
        """Return those that were given names, by name."""
        return sorted(self._schedulers.adapter_names, key=lambda entry: entry.name)

    def path_of(self, name: str) -> Path | None:
        """Return the folder of an adapter that was given this name, None if there is none."""
        entry = self._schedulers.adapter_names.get(name)
        return None if entry is None else Path(entry.path)

    async def find(self, name: str) -> Adapter:
        """Return the adapter of a name. Raises ADAPTER_NOT_FOUND, ADAPTER_NOT_LOADED.

        A name with "@" and a SHA-256 behind it, as `Adapter.key` has it, means these files and no others.
        """
        name, _, wanted = name.partition("@")
        adapter = await self._find(name)
        if wanted and adapter.key != key_of(name, wanted):
            message = f"the adapter {name!r} has other files now than the request began with; send it again"
            raise ServingError(Reason.ADAPTER_NOT_LOADED, message)
        return adapter

    async def _find(self, name: str) -> Adapter:
        entry = self._schedulers.adapter_names.get(name)
        if entry is not None:
            return Adapter(name, key_of(name, entry.sha256), entry.path)
        if not self._is_in_folder(name):
            raise not_found(name)
        assert self._folder is not None, "it has the adapter"
        path = (self._folder / name).resolve()
        try:
            return Adapter(name, key_of(name, await self._sha256_in_folder(name, path)), str(path))
        except AdapterError as error:
            raise ServingError(Reason.ADAPTER_NOT_LOADED, f"the adapter {name!r} cannot be loaded: {error}") from None

    async def load(self, name: str, path: str) -> scheduler_pb2.AdapterName:
        """Have workers load an adapter and give it a name; tell other gateways. Raises ServingError."""
        self._check_name(name)
        folder = resolved(path)
        try:
            sha256 = (await self._read(folder)).sha256
        except AdapterError as error:
            raise invalid_field("path", str(error)) from None
        problem = await self._schedulers.check_adapter(key_of(name, sha256), str(folder))
        if problem:
            raise invalid_field("path", problem)
        names = self._schedulers.adapter_names
        version = names.version_after(name, int(time.time() * 1000))
        entry = scheduler_pb2.AdapterName(name=name, path=str(folder), sha256=sha256, version=version)
        self._schedulers.publish_adapters([entry])
        return entry

    def unload(self, name: str) -> None:
        """Take a name away, for all gateways. Raises ADAPTER_NOT_FOUND."""
        names = self._schedulers.adapter_names
        known = names.get(name)
        if known is None:
            raise not_found(name)
        entry = scheduler_pb2.AdapterName()
        entry.CopyFrom(known)
        entry.is_removed = True
        entry.version = names.version_after(name, int(time.time() * 1000))
        self._schedulers.publish_adapters([entry])

    def _check_name(self, name: str) -> None:
        if not is_name(name):
            advice = "must begin with a letter or digit, and have letters, digits and ._:/- only, at most 200 bytes"
            raise invalid_field("name", advice)
        if name in self._taken:
            raise invalid_field("name", f"{name!r} is what the model is called; choose another one")
        names = self._schedulers.adapter_names
        if names.get(name) is None and sum(1 for _ in names) >= MAX_NAMES:
            raise ServingError(Reason.QUEUE_FULL, f"there are {MAX_NAMES} adapters; unload some")

    def _is_in_folder(self, name: str) -> bool:
        if self._folder is None or _IN_FOLDER in name or not is_name(name) or name in self._taken:
            return False
        try:
            return (self._folder / name / CONFIG_FILE).is_file()
        except OSError:  # a name that no file can have, or a folder that may not be read
            return False

    async def _sha256_in_folder(self, name: str, path: Path) -> str:
        """Return what the files of an adapter are now. They are read when they have changed."""
        now = time.monotonic()
        seen = self._seen.get(name)
        if seen is not None and now - seen.looked_at < _LOOK_AGAIN_S:
            return seen.sha256
        if seen is None or seen.times != _times(path):
            seen = self._seen[name] = await self._read(path)
        else:
            seen.looked_at = now
        self._seen.move_to_end(name)
        while len(self._seen) > _MAX_SEEN:
            self._seen.popitem(last=False)
        return seen.sha256

    async def _read(self, path: Path) -> _Seen:
        """Read an adapter's files once for all who ask meanwhile. Raises AdapterError."""
        read = self._reads.get(path)
        if read is None:
            read = self._reads[path] = asyncio.ensure_future(self._read_in_turn(path))
            read.add_done_callback(lambda done: self._was_read(path, done))
        return await asyncio.shield(read)

    async def _read_in_turn(self, path: Path) -> _Seen:
        async with self._turns:
            times, sha256 = await asyncio.to_thread(lambda: (_times(path), sha256_of(path)))
        return _Seen(times, sha256, time.monotonic())

    def _was_read(self, path: Path, read: asyncio.Task[_Seen]) -> None:
        del self._reads[path]
        if not read.cancelled():
            read.exception()  # nobody may be left to hear of it


def _times(path: Path) -> tuple[tuple[int, int, int], ...]:
    """Return `times_of`, or nothing: reading the files then says what is wrong."""
    try:
        return times_of(path)
    except OSError:
        return ()


def resolved(path: str) -> Path:
    """Return a path without links in it. Raises INVALID_FIELD."""
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # loops of links, bytes of value 0
        raise invalid_field("path", f"is no path ({error})") from None


def not_found(name: str) -> ServingError:
    """Return the error of a name that no adapter has."""
    message = f"there is no adapter {name!r} here; GET /v1/models and ModelService list those that there are"
    return ServingError(Reason.ADAPTER_NOT_FOUND, message, resource=Resource("adapter", name))
