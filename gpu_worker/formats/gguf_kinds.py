"""The kinds in which a GGUF file may have a matrix: how each lays out codes and scales in its blocks.

A row of `KINDS` is all that a kind takes. A block is so many neighbours in a row; `read` takes blocks as bytes
[blocks, bytes of a block] and returns codes [blocks, values], scales and minima [blocks, groups].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from octavo.kernels.group_codes import Codes, CodeShape, Floats, GroupCodes

Parts = tuple[Codes, Floats, Floats | None]
_LOW, _TWO, _FOUR = np.uint8(15), np.uint8(2), np.uint8(4)
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the numbers of four bits: a sign, two bits of exponent, one of fraction."""


class Kind(NamedTuple):
    """A kind: its name in GGUF, values and bytes of a block, what its codes mean, and what reads blocks."""

    name: str
    block_values: int
    block_bytes: int
    shape: CodeShape
    read: Callable[[Codes], Parts]

    def codes(self, data: Codes) -> GroupCodes:
        """Return rows [rows, bytes of a row] in the common form."""
        rows = len(data)
        codes, scales, minima = self.read(np.ascontiguousarray(data).reshape(-1, self.block_bytes))
        in_rows = [None if part is None else part.reshape(rows, -1) for part in (scales, minima)]
        assert in_rows[0] is not None
        return GroupCodes(self.shape, codes.reshape(rows, -1), in_rows[0], in_rows[1])


def _half(blocks: Codes, at: int) -> Floats:
    """Return a number of half precision of each block, [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _halves(data: Codes) -> Codes:
    """Return the low halves of so many bytes, then the high ones."""
    return np.concatenate([data & _LOW, data >> _FOUR], axis=-1)


def _slices(data: Codes, width: int, bits: int) -> Codes:
    """Return the codes in pieces of `width` bytes: all lowest `bits` of a piece first, then the next ones."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    pieces: Codes = data.reshape(len(data), -1, 1, width) >> shifts & np.uint8((1 << bits) - 1)
    return pieces.reshape(len(data), -1)


def _fifth_bits(data: Codes) -> Codes:
    """Return 32 bits, of four bytes, as bit 4 of as many codes."""
    return np.unpackbits(data, axis=-1, bitorder="little") << _FOUR


def _six_bits(packed: Codes) -> tuple[Floats, Floats]:
    """Return the eight scales and minima of six bits in twelve bytes, as numbers."""
    low, mid, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=1)
    minima = np.concatenate([mid & 63, high >> 4 | mid >> 6 << 4], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _q4_0(blocks: Codes) -> Parts:
    return _halves(blocks[:, 2:]), _half(blocks, 0), None


def _q4_1(blocks: Codes) -> Parts:
    return _halves(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: Codes) -> Parts:
    return _halves(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6]), _half(blocks, 0), None


def _q5_1(blocks: Codes) -> Parts:
    return _halves(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8]), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Codes) -> Parts:
    return blocks[:, 2:] ^ np.uint8(128), _half(blocks, 0), None


def _q2_k(blocks: Codes) -> Parts:
    scales, minima = (blocks[:, :16] & 15).astype(np.float32), (blocks[:, :16] >> 4).astype(np.float32)
    return _slices(blocks[:, 16:80], 32, 2), _half(blocks, 80) * scales, -_half(blocks, 82) * minima


def _q3_k(blocks: Codes) -> Parts:
    low = _halves(blocks[:, 96:104])
    scales = (low | _slices(blocks[:, 104:108], 4, 2) << 4).astype(np.float32) - np.float32(32)
    codes = _slices(blocks[:, 32:96], 32, 2) | _slices(blocks[:, :32], 32, 1) << _TWO
    return codes, _half(blocks, 108) * scales, None


def _q4_k(blocks: Codes) -> Parts:
    scales, minima = _six_bits(blocks[:, 4:16])
    return _slices(blocks[:, 16:], 32, 4), _half(blocks, 0) * scales, -_half(blocks, 2) * minima


def _q5_k(blocks: Codes) -> Parts:
    scales, minima = _six_bits(blocks[:, 4:16])
    codes = _slices(blocks[:, 48:], 32, 4) | _slices(blocks[:, 16:48], 32, 1) << _FOUR
    return codes, _half(blocks, 0) * scales, -_half(blocks, 2) * minima


def _q6_k(blocks: Codes) -> Parts:
    codes = _slices(blocks[:, :128], 64, 4) | _slices(blocks[:, 128:192], 32, 2) << _FOUR
    return codes, _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32), None


def _iq4_xs(blocks: Codes) -> Parts:
    high = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=-1).reshape(len(blocks), -1)
    scales = (low | high << 4).astype(np.float32) - np.float32(32)
    return _halves(blocks[:, 8:].reshape(len(blocks), 8, 16)).reshape(len(blocks), -1), _half(blocks, 0) * scales, None


def power_of_two(exponents: npt.NDArray[np.uint8]) -> Floats:
    """Return half of what bytes of the type E8M0 tell, so that `MXFP4_VALUES` are right."""
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 128)


def _mxfp4(blocks: Codes) -> Parts:
    return _halves(blocks[:, 1:]), power_of_two(blocks[:, :1]), None


KINDS: dict[int, Kind] = {
    2: Kind("Q4_0", 32, 18, CodeShape(4, 32, offset=8), _q4_0),
    3: Kind("Q4_1", 32, 20, CodeShape(4, 32, has_minimum=True), _q4_1),
    6: Kind("Q5_0", 32, 22, CodeShape(5, 32, offset=16), _q5_0),
    7: Kind("Q5_1", 32, 24, CodeShape(5, 32, has_minimum=True), _q5_1),
    8: Kind("Q8_0", 32, 34, CodeShape(8, 32, offset=128), _q8_0),
    10: Kind("Q2_K", 256, 84, CodeShape(2, 16, has_minimum=True), _q2_k),
    11: Kind("Q3_K", 256, 110, CodeShape(3, 16, offset=4), _q3_k),
    12: Kind("Q4_K", 256, 144, CodeShape(4, 32, has_minimum=True), _q4_k),
    13: Kind("Q5_K", 256, 176, CodeShape(5, 32, has_minimum=True), _q5_k),
    14: Kind("Q6_K", 256, 210, CodeShape(6, 16, offset=32), _q6_k),
    20: Kind("IQ4_NL", 32, 18, CodeShape(4, 32, table=_IQ4_VALUES), _q4_0),
    23: Kind("IQ4_XS", 256, 136, CodeShape(4, 32, table=_IQ4_VALUES), _iq4_xs),
    39: Kind("MXFP4", 32, 17, CodeShape(4, 32, table=MXFP4_VALUES), _mxfp4),
}
"""By the number that GGUF has for a kind."""
