"""Schedulers by how busy they are, as masks of their bits, so that the idle ones of any set are found at once."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator

_GRAIN_TOKENS = 64.0


class LoadOrder:
    """Puts each scheduler into a class of about equal backlogs: differences of 64 tokens, and then of an eighth."""

    def __init__(self) -> None:
        self._classes: list[int] = []  # those with members, least busy first
        self._members: dict[int, int] = {}  # class: mask
        self._class_of: dict[int, int] = {}  # bit: class

    def put(self, bit: int, backlog: float) -> None:
        """Note what a scheduler has to do: tokens for each of its workers."""
        number = int(8 * math.log2(1 + backlog / (8 * _GRAIN_TOKENS)))
        if self._class_of.get(bit) == number:
            return
        self.remove(bit)
        self._class_of[bit] = number
        if number not in self._members:
            self._members[number] = 0
            insort(self._classes, number)
        self._members[number] |= 1 << bit

    def remove(self, bit: int) -> None:
        """Leave a scheduler out, until it is put in again."""
        number = self._class_of.pop(bit, None)
        if number is None:
            return
        self._members[number] &= ~(1 << bit)
        if not self._members[number]:
            del self._members[number]
            del self._classes[bisect_left(self._classes, number)]

    def least_busy(self, of: int, count: int, start: int) -> Iterator[int]:
        """Yield up to `count` bits of the mask `of`, the least busy first; among equals from bit `start` on, around."""
        for number in self._classes:
            members = self._members[number] & of
            while members:
                if not count:
                    return
                behind = members >> start << start
                one = (behind or members) & -(behind or members)
                members ^= one
                count -= 1
                yield one.bit_length() - 1
