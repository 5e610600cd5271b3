"""From tensors to the layouts that the native kernels read.

All pointers handed out here point into the packer's arena: they live as long as it does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import numpy as np
import torch

from octavo.kernels.cpu import library
from octavo.kernels.cpu.coded_rows import as_matrix, parts_of
from octavo.kernels.cpu.runtime import BLOCK_COLUMNS, GATED_COLUMNS, Arena, Runtime, padded


class Packer:
    """Packs tensors into an arena."""

    def __init__(self, runtime: Runtime, arena: Arena) -> None:
        self._pool = runtime.pool
        self._library = runtime.library
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
        with _MatrixView(matrix) as view:
            self._library.octavo_to_bf16(self._pool, view, address, stride)
        return address, stride

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None, weight_format: int) -> library.Linear:
        """Pack weight [out_features, in_features], in a format of library.WEIGHT_..., and bias."""
        out_features, in_features = weight.shape
        with _MatrixView(weight) as view:
            address, weight_format = self._pack(
                lambda place: self._library.octavo_pack_linear(self._pool, weight_format, view, len(view), place),
                weight_format,
                out_features,
                in_features,
            )
        packed_bias = None if bias is None else self.store_floats(bias, BLOCK_COLUMNS)
        return library.Linear(address, packed_bias, in_features, out_features, weight_format)

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
        with _MatrixView(gate) as gate_view, _MatrixView(up) as up_view:
            address, weight_format = self._pack(
                lambda place: self._library.octavo_pack_gated(self._pool, weight_format, gate_view, up_view, place),
                weight_format,
                2 * padded(out_features, GATED_COLUMNS),
                in_features,
            )
        packed_bias = None
        if gate_bias is not None or up_bias is not None:
            pair = torch.zeros(2, padded(out_features, GATED_COLUMNS))
            for row, bias in zip(pair, (gate_bias, up_bias), strict=True):
                if bias is not None:
                    row[:out_features] = bias.detach()
            packed_bias = self.store_floats(pair.view(2, -1, GATED_COLUMNS).transpose(0, 1).flatten())
        return library.Linear(address, packed_bias, in_features, out_features, weight_format)

    def pack_experts(
        self,
        gate: Sequence[torch.Tensor],
        up: Sequence[torch.Tensor],
        down: Sequence[torch.Tensor],
        weight_format: int,
    ) -> tuple[library.Linear, library.Linear]:
        """Pack experts of one shape behind each other; return the first one's gated pair and down layer.

        gate, up  of each expert [intermediate_size, hidden_size];  down  [hidden_size, intermediate_size]
        """
        inner, hidden = gate[0].shape
        for expert, parts in enumerate(zip(gate, up, down, strict=True)):
            assert [tuple(part.shape) for part in parts] == [(inner, hidden), (inner, hidden), (hidden, inner)], expert
        gated_columns = 2 * padded(inner, GATED_COLUMNS)
        gated_bytes = self._packed_size(weight_format, gated_columns, hidden)
        down_bytes = self._packed_size(weight_format, hidden, inner)

        def pack_gated(place: int) -> None:
            for expert, pair in enumerate(zip(gate, up, strict=True)):
                with _MatrixView(pair[0]) as gate_view, _MatrixView(pair[1]) as up_view:
                    target = place + expert * gated_bytes
                    self._library.octavo_pack_gated(self._pool, weight_format, gate_view, up_view, target)

        def pack_down(place: int) -> None:
            for expert, matrix in enumerate(down):
                with _MatrixView(matrix) as view:
                    target = place + expert * down_bytes
                    self._library.octavo_pack_linear(self._pool, weight_format, view, 1, target)

        gated = self._pack(pack_gated, weight_format, gated_columns, hidden, len(gate))
        packed_down = self._pack(pack_down, weight_format, hidden, inner, len(down))
        return (
            library.Linear(gated[0], None, hidden, inner, gated[1]),
            library.Linear(packed_down[0], None, inner, hidden, packed_down[1]),
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
        compressed = np.empty(size, np.uint8)
        if self._library.octavo_compress(
            self._pool, layer.ctypes.data, num_blocks, in_features, compressed.ctypes.data
        ):
            layer, weight_format = compressed, library.WEIGHT_COMPRESSED
        address = self._arena.allocate(len(layer))
        ctypes.memmove(address, layer.ctypes.data, len(layer))
        return address, weight_format

    def _packed_size(self, weight_format: int, out_features: int, in_features: int) -> int:
        return int(self._library.octavo_packed_weight_size(weight_format, out_features, in_features))


class _MatrixView:
    """A matrix as the library sees it, an array of its parts, kept alive for the length of a `with`."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._parts = [as_matrix(part, tensor.shape[1]) for part in parts_of(tensor)]

    def __enter__(self) -> ctypes.Array[library.Matrix]:
        return (library.Matrix * len(self._parts))(*(matrix for matrix, _ in self._parts))

    def __exit__(self, *_: object) -> None:
        self._parts.clear()
