"""Adapters in the form that the native kernels read. Needs no torch."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.gpu_worker.ops import Float32Array, LoraPair, Module
from octavo.kernels.cpu import library
from octavo.kernels.cpu.runtime import BLOCK_COLUMNS, GATED_COLUMNS, padded

UInt16Array = npt.NDArray[np.uint16]

_STRIPE = 16  # outputs; two are a packed block, of a gated pair one of each layer
_LINE = 64
_HUGE_PAGE = 2 << 20
_CHUNK = 8 << 20  # takes memory where it is used only
_INPUTS, _RANKS = 32, 8  # of `a` that lie together; see adapters.cpp


@dataclass(frozen=True)
class LinearSite:
    """A linear layer of a program that adapters can add to.

    modules   what it was joined of
    is_gated  whether it is a gated pair, whose outputs lie alternately
    """

    in_features: int
    modules: tuple[Module, ...]
    is_gated: bool

    @property
    def num_blocks(self) -> int:
        """Blocks of its packed weights."""
        if self.is_gated:
            return padded(self.modules[0].out_features, GATED_COLUMNS) // GATED_COLUMNS
        return padded(sum(module.out_features for module in self.modules), BLOCK_COLUMNS) // BLOCK_COLUMNS

    def stripes(self, module: int) -> slice:
        """Return which stripes hold the outputs of a module."""
        if self.is_gated:
            return slice(module, 2 * self.num_blocks, 2)
        starts = [sum(each.out_features for each in self.modules[:index]) for index in (module, module + 1)]
        return slice(starts[0] // _STRIPE, padded(starts[1], _STRIPE) // _STRIPE)


class PackedAdapter:
    """An adapter of a program: what it adds to each of its operations, and the memory that holds it."""

    def __init__(
        self, num_ops: int, sites: Mapping[int, LinearSite], pairs: Iterable[LoraPair], splits_inputs: bool
    ) -> None:
        """Pack pairs, whose shapes fit; `sites` by number of the operation.

        splits_inputs  whether inputs that lie half a piece apart are a pair: see OctavoAdapterLayer
        """
        self._splits_inputs = splits_inputs
        self.layers = (library.AdapterLayer * num_ops)()
        self.num_bytes = ctypes.sizeof(self.layers)
        self._memory: list[npt.NDArray[np.uint8]] = []  # what the layers point into; the last one has room left
        self._room = 0
        place = {module.name: (op, index) for op, site in sites.items() for index, module in enumerate(site.modules)}
        packed: dict[int, dict[int, _Pair]] = {}
        for pair in pairs:
            op, index = place[pair.module]
            packed.setdefault(op, {})[index] = _pack(pair)
        for op, of_site in packed.items():
            self._add(op, sites[op], of_site)

    def _add(self, op: int, site: LinearSite, pairs: Mapping[int, _Pair]) -> None:
        stride = padded(site.in_features, _INPUTS)
        num_ranks = sum(len(pair.a) for pair in pairs.values())
        a, scales = np.zeros((num_ranks, stride), np.uint16), np.empty(num_ranks, np.float32)
        stripes = np.zeros((2 * site.num_blocks,), _STRIPE_TYPE)
        first = 0
        for index, pair in sorted(pairs.items()):
            end = first + len(pair.a)
            a[first:end, : site.in_features], scales[first:end] = pair.a, pair.scale
            of_module = stripes[site.stripes(index)]
            addresses = self._keep(pair.b) + np.arange(len(of_module)) * (len(pair.a) * _STRIPE * 2)
            of_module["b"], of_module["first_rank"], of_module["num_pairs"] = addresses, first, len(pair.a) // 2
            assert len(pair.b) == len(of_module), (site, index)
            first = end
        if self._splits_inputs:
            a = np.ascontiguousarray(a.reshape(-1, 2, _INPUTS // 2).swapaxes(1, 2)).reshape(num_ranks, stride)
        together = [a[at : at + _RANKS].reshape(-1, stride // _INPUTS, _INPUTS) for at in range(0, num_ranks, _RANKS)]
        a = np.concatenate([each.transpose(1, 0, 2).reshape(-1) for each in together])
        layer = self.layers[op]
        layer.a, layer.scales, layer.stripes = self._keep(a), self._keep(scales), self._keep(stripes)
        layer.num_ranks, layer.a_stride, layer.num_blocks = num_ranks, stride, site.num_blocks

    def _keep(self, array: npt.NDArray[Any]) -> int:
        """Copy an array to where it stays; return the address. Huge pages: a step reads many adapters at once."""
        size = padded(array.nbytes, _LINE)
        if size > self._room:
            pages = mmap.mmap(-1, max(padded(size, _HUGE_PAGE), _CHUNK))
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without them
                    pages.madvise(mmap.MADV_HUGEPAGE)
            self._memory.append(np.frombuffer(pages, np.uint8))
            self._room = len(pages)
        memory = self._memory[-1]
        place = memory[len(memory) - self._room :][: array.nbytes]
        place[:] = array.reshape(-1).view(np.uint8)
        self._room -= size
        self.num_bytes += size
        return place.ctypes.data


_STRIPE_TYPE = np.dtype([("b", np.uint64), ("first_rank", np.int32), ("num_pairs", np.int32)])
assert _STRIPE_TYPE.itemsize == ctypes.sizeof(library.AdapterStripe)


@dataclass(frozen=True)
class _Pair:
    """A pair in bfloat16: a [rank, in_features], b [stripes, rank / 2, 16, 2], zero-padded to an even rank."""

    a: UInt16Array
    b: UInt16Array
    scale: float


def _pack(pair: LoraPair) -> _Pair:
    out_features, rank = pair.b.shape
    even = padded(rank, 2)
    a = np.zeros((even, pair.a.shape[1]), np.uint16)
    a[:rank] = _to_bf16(pair.a)
    b = np.zeros((padded(out_features, _STRIPE), even), np.uint16)
    b[:out_features, :rank] = _to_bf16(pair.b)
    stripes = np.ascontiguousarray(b.reshape(-1, _STRIPE, even // 2, 2).transpose(0, 2, 1, 3))
    return _Pair(a, stripes, pair.scale)


def _to_bf16(values: Float32Array) -> UInt16Array:
    """Round finite values to the nearest, even in a tie."""
    words = np.ascontiguousarray(values).view(np.uint32)
    return ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)
