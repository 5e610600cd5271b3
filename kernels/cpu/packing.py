"""From tensors to the layouts that the native kernels read.

All pointers handed out here point into the packer's arena: they live as long as it does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from octavo.kernels.cpu import library
from octavo.kernels.cpu.coded_rows import Coded, Part, Unread, num_rows, parts_of
from octavo.kernels.cpu.runtime import BLOCK_COLUMNS, GATED_COLUMNS, Arena, Runtime, padded
from octavo.kernels.group_codes import GroupCodes, holds, joined

_PIECE_VALUES = 1 << 22  # of codes that are read at once, over all threads
_ROWS = 128  # of which pieces are multiples: no block of a packed layer, or of a file, is of two


class Packer:
    """Packs tensors into an arena."""

    def __init__(self, runtime: Runtime, arena: Arena) -> None:
        self._pool = runtime.pool
        self._library = runtime.library
        self._num_threads = runtime.num_threads
        self._reads_compressed = runtime.reads_compressed
        self._arena = arena

    def store_floats(self, values: torch.Tensor, multiple: int = 1) -> int:
        """Copy `values` as float32, zero-padded to a multiple; return the address."""
        floats = values.detach().to(torch.float32).contiguous()
        address = self._arena.allocate(padded(floats.numel(), multiple) * 4)
        ctypes.memmove(address, floats.data_ptr(), floats.numel() * 4)
        return address

    def store_norm(self, weight: torch.Tensor, eps: float) -> library.Norm:
        """Copy an RMSNorm."""
        return library.Norm(self.store_floats(weight, BLOCK_COLUMNS), eps, weight.numel())

    def store_rows(self, matrix: torch.Tensor) -> tuple[int, int]:
        """Copy a matrix as bf16 rows; return address and stride."""
        stride = padded(matrix.shape[1], BLOCK_COLUMNS)
        address = self._arena.allocate(matrix.shape[0] * stride * 2)
        for first_row, view in self._views(matrix, library.WEIGHT_BF16):
            self._library.octavo_to_bf16(self._pool, view, address + 2 * stride * first_row, stride)
        return address, stride

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None, weight_format: int) -> library.Linear:
        """Pack weight [out_features, in_features], in a format of library.WEIGHT_..., and bias."""
        out_features, in_features = weight.shape

        def pack(place: int) -> None:
            for first_row, view in self._views(weight, weight_format):
                self._library.octavo_pack_linear(self._pool, weight_format, view, first_row, place)

        address, packed_format = self._pack(pack, weight_format, out_features, in_features)
        packed_bias = None if bias is None else self.store_floats(bias, BLOCK_COLUMNS)
        return library.Linear(address, packed_bias, in_features, out_features, packed_format)

    def pack_heads(self, weight: torch.Tensor, weight_format: int) -> library.Linear:
        """Pack a matrix for each head behind each other, [heads, out_features, in_features]; return the first."""
        num_heads, out_features, in_features = weight.shape
        num_bytes = self._packed_size(weight_format, out_features, in_features)

        def pack(place: int) -> None:
            for head, matrix in enumerate(weight):
                for first_row, view in self._views(matrix, weight_format):
                    self._library.octavo_pack_linear(
                        self._pool, weight_format, view, first_row, place + head * num_bytes
                    )

        address, packed_format = self._pack(pack, weight_format, out_features, in_features, num_heads)
        return library.Linear(address, None, in_features, out_features, packed_format)

    def pack_gated(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        gate_bias: torch.Tensor | None,
        up_bias: torch.Tensor | None,
        weight_format: int,
    ) -> library.Linear:
        """Pack a gated pair of layers, both [out_features, in_features], as one."""
        assert gate.shape == up.shape, f"gate {tuple(gate.shape)} and up {tuple(up.shape)} differ"
        assert len(parts_of(gate)) == len(parts_of(up)) == 1, "layers of a gated pair are not joined ones"
        out_features, in_features = gate.shape

        def pack(place: int) -> None:
            self._write_pair(gate, up, weight_format, place)

        columns = 2 * padded(out_features, GATED_COLUMNS)
        address, packed_format = self._pack(pack, weight_format, columns, in_features)
        packed_bias = None
        if gate_bias is not None or up_bias is not None:
            nothing = torch.zeros(out_features)
            packed_bias = self.store_floats(
                _paired(nothing if gate_bias is None else gate_bias, nothing if up_bias is None else up_bias)
            )
        return library.Linear(address, packed_bias, in_features, out_features, packed_format)

    def pack_experts(
        self,
        gate: Sequence[torch.Tensor],
        up: Sequence[torch.Tensor],
        down: Sequence[torch.Tensor],
        biases: tuple[torch.Tensor, torch.Tensor] | None,
        gated_format: int,
        down_format: int,
    ) -> tuple[library.Linear, library.Linear]:
        """Pack experts of one shape behind each other; return the first one's gated pair and down layer.

        gate, up  of each expert [intermediate_size, hidden_size];  down  [hidden_size, intermediate_size]
        biases    [num_experts, 2 * intermediate_size], gate and then up, and [num_experts, hidden_size]; or None
        """
        inner, hidden = gate[0].shape
        for expert, parts in enumerate(zip(gate, up, down, strict=True)):
            assert [tuple(part.shape) for part in parts] == [(inner, hidden), (inner, hidden), (hidden, inner)], expert
        gated_columns = 2 * padded(inner, GATED_COLUMNS)
        gated_bytes = self._packed_size(gated_format, gated_columns, hidden)
        down_bytes = self._packed_size(down_format, hidden, inner)

        def pack_gated(place: int) -> None:
            for expert, pair in enumerate(zip(gate, up, strict=True)):
                self._write_pair(*pair, gated_format, place + expert * gated_bytes)

        def pack_down(place: int) -> None:
            for expert, matrix in enumerate(down):
                target = place + expert * down_bytes
                for first_row, view in self._views(matrix, down_format):
                    self._library.octavo_pack_linear(self._pool, down_format, view, first_row, target)

        gated = self._pack(pack_gated, gated_format, gated_columns, hidden, len(gate))
        packed_down = self._pack(pack_down, down_format, hidden, inner, len(down))
        gated_bias = down_bias = None
        if biases is not None:
            shapes = [tuple(bias.shape) for bias in biases]
            assert shapes == [(len(gate), 2 * inner), (len(gate), hidden)], shapes
            pairs = [_paired(*bias.view(2, inner)) for bias in biases[0]]
            gated_bias = self.store_floats(torch.stack(pairs))
            missing = padded(hidden, BLOCK_COLUMNS) - hidden
            down_bias = self.store_floats(torch.nn.functional.pad(biases[1].float(), (0, missing)))
        return (
            library.Linear(gated[0], gated_bias, hidden, inner, gated[1]),
            library.Linear(packed_down[0], down_bias, inner, hidden, packed_down[1]),
        )

    def _pack(
        self, write: Callable[[int], None], weight_format: int, num_columns: int, in_features: int, num_layers: int = 1
    ) -> tuple[int, int]:
        """Have `write` pack layers of one shape behind each other, at an address; return the address and the format.

        What is to be packed as bf16 is compressed where the kernels read that and the weights fit; see compressed.h.
        """
        num_bytes = num_layers * self._packed_size(weight_format, num_columns, in_features)
        if weight_format != library.WEIGHT_BF16 or not self._reads_compressed:
            address = self._arena.allocate(num_bytes)
            write(address)
            return address, weight_format
        layer = np.zeros(num_bytes, np.uint8)
        write(layer.ctypes.data)
        num_blocks = num_layers * padded(num_columns, BLOCK_COLUMNS) // BLOCK_COLUMNS
        size = num_layers * self._packed_size(library.WEIGHT_COMPRESSED, num_columns, in_features)
        compressed = np.zeros(size, np.uint8)  # what is between its pieces goes to the packed file too
        if self._library.octavo_compress(
            self._pool, layer.ctypes.data, num_blocks, in_features, compressed.ctypes.data
        ):
            layer, weight_format = compressed, library.WEIGHT_COMPRESSED
        address = self._arena.allocate(len(layer))
        ctypes.memmove(address, layer.ctypes.data, len(layer))
        return address, weight_format

    def _packed_size(self, weight_format: int, out_features: int, in_features: int) -> int:
        return int(self._library.octavo_packed_weight_size(weight_format, out_features, in_features))

    def _write_pair(self, gate: torch.Tensor, up: torch.Tensor, weight_format: int, place: int) -> None:
        """Pack a gated pair."""
        pieces = zip(self._views(gate, weight_format, up), self._views(up, weight_format, gate), strict=True)
        for (first_row, gate_view), (_, up_view) in pieces:
            self._library.octavo_pack_gated(self._pool, weight_format, gate_view, up_view, first_row, place)

    def _views(
        self, matrix: torch.Tensor, weight_format: int, beside: torch.Tensor | None = None
    ) -> Iterator[tuple[int, library.Matrix]]:
        """Yield the pieces of a matrix, each with its first row, as the library sees them until the next one is taken.

        beside  a matrix in whose pieces it is cut as well: in one if either is of numbers
        """
        first_row, columns = 0, matrix.shape[1]
        parts = parts_of(matrix)
        are_coded = all(
            isinstance(part, Coded) for each in (matrix, beside) if each is not None for part in parts_of(each)
        )
        for part in parts:
            step = max(_PIECE_VALUES // columns // _ROWS, 1) * _ROWS if are_coded else num_rows(part)
            for start in range(0, num_rows(part), step):
                yield (
                    first_row + start,
                    self._view(part, slice(start, min(start + step, num_rows(part))), weight_format),
                )
            if isinstance(part, Coded | Unread):
                part.release()
            first_row += num_rows(part)

    def _view(self, part: Part, rows: slice, weight_format: int) -> library.Matrix:
        if isinstance(part, Coded):
            codes = self._read(part, rows)
            own = library.CODE_FORMATS.get(weight_format)
            if own is not None and holds(own, part.shape):
                return _view_of_codes(codes.as_shape(own))
            return _view_of_numbers(torch.from_numpy(codes.values()))
        return _view_of_numbers(part.read() if isinstance(part, Unread) else part)

    def _read(self, part: Coded, rows: slice) -> GroupCodes:
        """Read rows with all threads: numpy computes without the interpreter's lock."""
        step = -(-(rows.stop - rows.start) // self._num_threads // _ROWS) * _ROWS or _ROWS
        pieces = [slice(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]
        if len(pieces) == 1:
            return part.read(rows)
        with ThreadPoolExecutor(self._num_threads) as threads:
            return joined(list(threads.map(part.read, pieces)))


def _paired(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return the biases of a gated pair in the order of its packed columns."""
    pair = torch.zeros(2, padded(len(gate), GATED_COLUMNS))
    pair[0, : len(gate)], pair[1, : len(up)] = gate.detach(), up.detach()
    return pair.view(2, -1, GATED_COLUMNS).transpose(0, 1).flatten()


def _view_of_codes(codes: GroupCodes) -> library.Matrix:
    """Return codes as the library sees them; they live as long as what is returned."""
    data, scales = np.ascontiguousarray(codes.codes), np.ascontiguousarray(codes.scales, np.float32)
    minima = None if codes.minima is None else np.ascontiguousarray(codes.minima, np.float32)
    places = data.ctypes.data, scales.ctypes.data, None if minima is None else minima.ctypes.data
    view = library.Matrix(*places, library.CODES, *data.shape, codes.shape.group)
    view.keeps = data, scales, minima
    return view


def _view_of_numbers(numbers: torch.Tensor) -> library.Matrix:
    """The same of numbers."""
    tensor = numbers.detach().cpu().contiguous()
    if tensor.dtype not in _TYPES:
        tensor = tensor.to(torch.float32)
    rows, columns = tensor.shape
    view = library.Matrix(tensor.data_ptr(), None, None, _TYPES[tensor.dtype], rows, columns, 0)
    view.keeps = tensor
    return view


_TYPES = {torch.bfloat16: library.BF16, torch.float16: library.F16, torch.float32: library.F32}
