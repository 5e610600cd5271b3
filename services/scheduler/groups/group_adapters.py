"""The LoRA adapters that the workers of a group hold, by number, and which of them has to go for another."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Mapping
from dataclasses import dataclass

MAX_LOADS = 2  # at once, of a group: the others wait in the order of the queue


@dataclass(eq=False)
class HeldAdapter:
    """An adapter that has a number.

    is_loaded    rows may have it; else it is being loaded
    num_running  sequences that are computed with it
    was_used     one was, since it was loaded
    """

    adapter_id: int
    is_loaded: bool = False
    num_bytes: int = 0
    num_running: int = 0
    was_used: bool = False

    @property
    def is_idle(self) -> bool:
        """Whether nothing needs it now."""
        return self.is_loaded and not self.num_running


class GroupAdapters:
    """Numbers and memory for adapters.

    held     by key, the one that was used least recently first
    closing  one that takes no more sequences: it has to go for another one, and new ones would keep it for ever
    """

    def __init__(self, max_adapters: int = 0, memory_bytes: int = 0) -> None:
        self.max_adapters = max_adapters
        self.memory_bytes = memory_bytes
        self.held: OrderedDict[str, HeldAdapter] = OrderedDict()
        self.closing = ""
        self._free_ids = list(range(max_adapters, 0, -1))

    @property
    def can_load(self) -> bool:
        """Whether one more may be loaded now, if there is room."""
        return bool(self.max_adapters) and sum(not held.is_loaded for held in self.held.values()) < MAX_LOADS

    def is_loaded(self, key: str) -> bool:
        """Return whether rows may have an adapter."""
        held = self.held.get(key)
        return held is not None and held.is_loaded

    def can_open(self, key: str) -> bool:
        """Return whether a sequence may begin to run with an adapter."""
        return key != self.closing and self.is_loaded(key)

    def close_one(self) -> None:
        """Let the one that was used least recently take no more sequences, unless one does so already."""
        if self.closing not in self.held:
            self.closing = next((key for key, held in self.held.items() if held.is_loaded and held.was_used), "")

    def acquire(self, key: str) -> int:
        """Count a sequence that runs with an adapter from now on; return the adapter's number."""
        held = self.held[key]
        held.num_running += 1
        held.was_used = True
        self.held.move_to_end(key)
        return held.adapter_id

    def release(self, key: str) -> None:
        """Count that it runs no more."""
        self.held[key].num_running -= 1
        self.held.move_to_end(key)

    def begin(self, key: str, num_bytes: int, wanted: Container[str]) -> tuple[list[int], int] | None:
        """Give a number to an adapter that is to be loaded; return the numbers that go for it, and its own.

        num_bytes  what it takes; 0 if that is not known
        wanted     that sequences wait for: one of these that was loaded for them stays until it is used

        None: there is no room, because others are in use
        """
        victims = self._victims(num_bytes, wanted)
        if victims is None:
            return None
        dropped = [self.drop(victim) for victim in victims]
        adapter_id = self._free_ids.pop()
        self.held[key] = HeldAdapter(adapter_id, num_bytes=num_bytes)
        return dropped, adapter_id

    def drop(self, key: str) -> int:
        """Take the number of an adapter back, and return it."""
        held = self.held.pop(key)
        assert not held.num_running, key
        self._free_ids.append(held.adapter_id)
        if key == self.closing:
            self.closing = ""
        return held.adapter_id

    def key_of(self, adapter_id: int) -> str | None:
        """Return which adapter has a number."""
        return next((key for key, held in self.held.items() if held.adapter_id == adapter_id), None)

    def _victims(self, num_bytes: int, wanted: Container[str]) -> list[str] | None:
        """Return who goes for so many bytes and a number; None if those that are in use leave too little."""
        used, num_held = sum(held.num_bytes for held in self.held.values()), len(self.held)
        victims: list[str] = []
        for key, held in self.held.items():
            if num_held < self.max_adapters and used + num_bytes <= self.memory_bytes:
                break
            if held.is_idle and (held.was_used or key not in wanted):
                victims.append(key)
                used -= held.num_bytes
                num_held -= 1
        has_room = num_held < self.max_adapters and used + num_bytes <= self.memory_bytes
        return victims if has_room else None

    def check_invariants(self, running: Mapping[str, int]) -> None:
        """Assert that numbers are given once, and uses are counted; `running` sequences by adapter."""
        ids = [held.adapter_id for held in self.held.values()] + self._free_ids
        assert sorted(ids) == list(range(1, self.max_adapters + 1)), ids
        for key, held in self.held.items():
            assert held.num_running == running.get(key, 0), (key, held)
        for key in running:
            assert self.is_loaded(key), f"{key} is used and not loaded"
