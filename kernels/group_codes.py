"""The common form of quantised matrices: integer codes, and for each group of neighbours in a row a scale.

Every kind of a file is brought into this form, and every device computes from it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class CodeShape:
    """What codes mean: value = scale * (code - offset) + minimum, or scale * table[code] + minimum.

    bits         of a code, 8 at most; codes are stored without a sign
    group        neighbours in a row that share a scale; 1 where each column has its own
    has_minimum  whether groups have a minimum; else it is 0
    table        the values that codes stand for, instead of `code - offset`
    """

    bits: int
    group: int
    offset: int = 0
    has_minimum: bool = False
    table: tuple[float, ...] = ()


@dataclass(frozen=True)
class GroupCodes:
    """Rows of a matrix.

    codes   [rows, columns]
    scales  [rows, groups of a row]; minima likewise, None if the shape has none
    """

    shape: CodeShape
    codes: Codes
    scales: Floats
    minima: Floats | None = None

    def values(self) -> Floats:
        """Return the numbers [rows, columns], each rounded to float32 as the kinds' definitions do it."""
        if self.shape.table:
            integers = np.array(self.shape.table, np.float32)[self.codes]
        else:
            integers = self.codes.astype(np.float32)
            if self.shape.offset:
                integers -= np.float32(self.shape.offset)
        rows, columns = self.codes.shape
        groups = self.scales.shape[1]
        if groups * self.shape.group != columns:  # the last group of a row is shorter
            each = np.arange(columns) // self.shape.group
            integers *= self.scales[:, each]
            return integers if self.minima is None else integers + self.minima[:, each]
        grouped = integers.reshape(rows, groups, self.shape.group)
        grouped *= self.scales[..., None]
        if self.minima is not None:
            grouped += self.minima[..., None]
        return integers

    def rows(self, some: slice | npt.NDArray[np.int64]) -> GroupCodes:
        """Return some of the rows."""
        minima = None if self.minima is None else self.minima[some]
        return GroupCodes(self.shape, self.codes[some], self.scales[some], minima)

    def as_shape(self, shape: CodeShape) -> GroupCodes:
        """Return the same values in another shape, for which `holds(shape, self.shape)` is true."""
        assert holds(shape, self.shape), (shape, self.shape)
        codes, scales, minima = self.codes, self.scales, self.minima
        own = self.shape
        if own.table != shape.table:  # integers within the other shape's range, from its lowest on
            codes = (np.array(own.table) + shape.offset).astype(np.uint8)[codes]
            own = replace(own, table=(), offset=shape.offset)
        if own.offset != shape.offset and not own.has_minimum and not shape.has_minimum:
            codes = codes + np.uint8(shape.offset - own.offset)
        elif own.offset != shape.offset:
            moved = scales * np.float32(shape.offset - own.offset)
            minima = moved if minima is None else minima + moved
        if shape.has_minimum and minima is None:
            minima = np.zeros_like(scales)
        return GroupCodes(replace(shape, group=self.shape.group), codes, scales, minima)


def joined(parts: Sequence[GroupCodes]) -> GroupCodes:
    """Return rows of one shape, one part after the other."""
    codes, scales = np.concatenate([part.codes for part in parts]), np.concatenate([part.scales for part in parts])
    minima = [part.minima for part in parts if part.minima is not None]
    return GroupCodes(parts[0].shape, codes, scales, np.concatenate(minima) if minima else None)


def holds(shape: CodeShape, other: CodeShape) -> bool:
    """Return whether codes of `shape` tell any values of `other`; its groups may be larger by a whole factor."""
    if other.group % shape.group or (other.has_minimum and not shape.has_minimum):
        return False
    if other.table:
        if shape.table:
            return shape.table == other.table
        integers = [value + shape.offset for value in other.table]
        return all(value.is_integer() and 0 <= value < 1 << shape.bits for value in map(float, integers))
    if shape.table or other.bits > shape.bits:
        return False
    moved = shape.offset - other.offset
    return shape.has_minimum or 0 <= moved <= (1 << shape.bits) - (1 << other.bits)
