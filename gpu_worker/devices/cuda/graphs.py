"""Which sizes of decode steps are captured as graphs, in which order, and which of them a step takes.

A captured graph is a recorded step of a fixed size. A smaller step is padded to the next size, and its
padding is data: rows of slot -1, work of sequence -1. Plain Python; a capture itself is the accelerator's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

_MAX_SIZE = 512
_COMMON_SIZES = 8


def graph_sizes(max_running: int) -> list[int]:
    """Return the sizes, ascending: 1, 2, 4, by 8 to 256, by 16 to 512; cut at max_running, which is one."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, _MAX_SIZE + 1, 16)]
    last = min(max_running, _MAX_SIZE)
    return [size for size in sizes if size < last] + [last]


def common_sizes(sizes: list[int]) -> list[int]:
    """Return the sizes that are captured before a worker is ready: each about twice the one before."""
    common = [sizes[-1]]
    for size in reversed(sizes):
        if size * 2 <= common[-1] and len(common) < _COMMON_SIZES:
            common.append(size)
    if sizes[0] not in common:
        common.append(sizes[0])
    return common[::-1]


class Graphs:
    """The captured graphs of a device."""

    def __init__(self, sizes: list[int], capture: Callable[[int], Callable[[], None]]) -> None:
        """Capture nothing yet. `capture` captures the step of a size and returns what replays it."""
        self._capture = capture
        self._replays: dict[int, Callable[[], None]] = {}
        self._captured: list[int] = []  # ascending
        common = common_sizes(sizes)
        # The largest first: later ones fit into the memory that it took.
        self._first = sorted(common, reverse=True)
        self._rest = sorted(set(sizes) - set(common), reverse=True)

    def capture_common(self) -> None:
        """Capture what is wanted before the first step."""
        while self._first:
            self._add(self._first.pop(0))

    def capture_next(self) -> bool:
        """Capture one more; False if none is left."""
        if not self._rest:
            return False
        self._add(self._rest.pop(0))
        return True

    def size_for(self, num_rows: int) -> int | None:
        """Return the smallest captured size with room for `num_rows` rows, if there is one."""
        index = bisect_left(self._captured, num_rows)
        return self._captured[index] if index < len(self._captured) else None

    def replay(self, size: int) -> None:
        """Run the step of a captured size."""
        self._replays[size]()

    def _add(self, size: int) -> None:
        self._replays[size] = self._capture(size)
        self._captured = sorted([*self._captured, size])
