"""Which values of a recorded program share a buffer."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, TypeVar

Shape = TypeVar("Shape", bound=Hashable)


def share_buffers(ops: Iterable[Any], shapes: Sequence[Shape]) -> list[Shape]:
    """Give each value a buffer, and two values one where the first is read no more; number them in `ops`, in place.

    `ops` are structs whose `input` and `output` number values, -1 for none. Returns the buffers' shapes. Only values
    of the same shape share one: the padding of a row must stay zero.
    """
    last_use = {}
    for index, op in enumerate(ops):
        last_use.update({value: index for value in (op.input, op.output) if value >= 0})
    buffers: list[Shape] = []
    numbers: dict[int, int] = {}
    free: dict[Shape, list[int]] = {}
    for index, op in enumerate(ops):
        read, written = op.input, op.output
        if written >= 0 and written not in numbers:
            shape = shapes[written]
            reusable = free.get(shape)
            if not reusable:
                buffers.append(shape)
            numbers[written] = reusable.pop() if reusable else len(buffers) - 1
        op.input = -1 if read < 0 else numbers[read]
        op.output = -1 if written < 0 else numbers[written]
        for number in {read, written} - {-1}:
            if last_use[number] == index:
                free.setdefault(shapes[number], []).append(numbers[number])
    return buffers
