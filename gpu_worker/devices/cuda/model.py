"""A decoder on a GPU: its weights, buffers, block tables and cache; it sends steps and launches forward passes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from octavo.gpu_worker.devices.cuda.accelerator import Accelerator
from octavo.gpu_worker.devices.cuda.changes import Changes, TableWords
from octavo.gpu_worker.devices.cuda.ops import AttentionWork, CudaOps, StepTensors
from octavo.gpu_worker.devices.cuda.products import find_unstable_products, padded_rows
from octavo.gpu_worker.devices.cuda.step import Columns, Int32Array, Layout, Planner, Sizes, Staging, aligned
from octavo.gpu_worker.devices.cuda.weights import Buffers, Largest, Weights
from octavo.gpu_worker.errors import DeviceError
from octavo.gpu_worker.ops import Model, Ops
from octavo.gpu_worker.protocol import BLOCK_SIZE
from octavo.gpu_worker.quantization import Quantization
from octavo.gpu_worker.steps.batch import Step
from octavo.kernels.configs import FP8_TARGETS, LINEAR_KINDS, attention_config
from octavo.kernels.paged_attention import partial_buffers, tile_queries
from octavo.kernels.step_inputs import prepare_rows, scatter_words

log = logging.getLogger("octavo.worker")

_PARTIAL_BYTES = 256 << 20
_CHANGE_WORDS = 1 << 18


@dataclass(frozen=True)
class Limits:
    """Sizes that buffers are made for."""

    max_batch_tokens: int
    max_running: int
    max_blocks_per_sequence: int


@dataclass(frozen=True)
class Launched:
    """A forward pass that was launched; S rows, R rows that are sampled. All on the device.

    output           logits [R, vocab_size] float32; of a model without a head, hidden states [T, hidden_size]
    slots, seq_lens  [S];  query_start_loc [S + 1]
    sampled_slots, sampled_positions  [R], -1 in padding rows
    """

    output: torch.Tensor
    slots: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    sampled_slots: torch.Tensor
    sampled_positions: torch.Tensor


class DeviceModel:
    """Owner of what a forward pass needs. Everything but the cache is allocated when it is made.

    planner      makes the columns of steps
    last_tokens  [max_running] int32: the token that each slot sampled last, written by whoever samples
    dry_output   what a step of one padding token gave: logits [1, vocab_size] or hidden states
    """

    def __init__(
        self,
        model: Model,
        limits: Limits,
        accelerator: Accelerator,
        *,
        kv_cache_dtype: str = "auto",
        quantization: str = Quantization.NONE,
        wrap: Callable[[Ops], Ops] = lambda ops: ops,
        largest: Largest | None = None,
    ) -> None:
        """Move the weights and run a step of padding, which allocates every buffer; arguments as in `CudaRunner`."""
        self._accelerator = accelerator
        self._model = model
        self._wrap = wrap
        self._limits = limits
        heads, target, where = model.heads, accelerator.target, accelerator.device
        self._dtype = model.dtype
        self._cache_dtype = _cache_dtype(kv_cache_dtype, self._dtype, target)
        self._attention = attention_config(target, "mixed", heads.head_dim, is_float32=self._dtype == torch.float32)
        max_rows, max_blocks = limits.max_running, limits.max_blocks_per_sequence
        with torch.no_grad(), accelerator.computing():
            self.weights = Weights(where, self._dtype, _quantization(quantization, target), largest)
            self._buffers = Buffers(padded_rows(limits.max_batch_tokens), where)
            self.last_tokens = words(where, max_rows)
            self._block_tables = words(where, max_rows, max_blocks)
            self._row_tables = words(where, max_rows, max_blocks)
            self._tokens = words(where, 3, aligned(limits.max_batch_tokens))
            max_slots = self._count_partial_slots()
            self._partial, self._stats = partial_buffers(
                self._attention, max_slots, heads.num_kv_heads, heads.head_dim, where
            )
            self.kv_cache = self._make_cache(1)
            windows, self.dry_output = self._dry_run()
        queries = tile_queries(self._attention, heads.num_heads, heads.num_kv_heads)
        self.planner = Planner(self._attention, queries, windows, max_blocks, max_slots)
        num_words = self.planner.max_words(limits.max_batch_tokens, max_rows) + _CHANGE_WORDS
        with torch.no_grad(), accelerator.computing():
            self._staging = Staging(accelerator, num_words)

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, beside the weights and the cache."""
        own = (self._block_tables, self._row_tables, self._tokens, self._partial, self._stats, self._staging.words)
        return sum(tensor.nbytes for tensor in (*own, self.last_tokens)) + self._buffers.num_bytes

    def kv_block_bytes(self) -> int:
        """Bytes that one block of 16 tokens takes, over all layers, keys and values."""
        heads = self._model.heads
        per_token = 2 * self._model.num_layers * heads.num_kv_heads * heads.head_dim * self._cache_dtype.itemsize
        return per_token * BLOCK_SIZE

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocate the zeroed cache. Inside `computing`, like all that follows."""
        self.kv_cache = self._make_cache(num_blocks)

    def changes(self, step: Step) -> Changes:
        """Return what a step changes in the block tables."""
        changes = Changes()
        counts = step.block_counts
        before = np.cumsum(counts) - counts
        rows = step.block_slots * self._block_tables.shape[1] + step.first_blocks
        places = np.arange(len(step.block_ids)) + np.repeat(rows - before, counts)
        changes.add(self._block_tables, places, step.block_ids.astype(np.int32))
        return changes

    def send(self, changes: Changes, columns: Columns | None) -> None:
        """Copy columns and changes to the device, and launch the writing of the changes."""
        *early, last = changes.pieces(_CHANGE_WORDS)
        for piece in early:  # more than has room beside a step
            self._send_piece(piece, self._staging.begin(), 0)
        words, end = self._staging.begin(), 0
        if columns is not None:
            layout = Layout(columns.sizes)
            layout.fill(words, columns)
            end = layout.end
        self._send_piece(last, words, end)

    def copy_blocks(self, pairs: Int32Array) -> None:
        """Copy blocks, pairs [N, 2] of (from, to), in order."""
        for source, target in pairs.tolist():
            self.kv_cache[:, target].copy_(self.kv_cache[:, source])

    def launch(self, sizes: Sizes) -> Launched:
        """Launch the forward pass of the columns that were sent last."""
        views = Layout(sizes).views(self._staging.words)
        slots, query_start_loc, seq_lens, sent, logits_rows, sampled_slots, positions = views[:7]
        lists = iter(views[7:])
        attention = {
            window: [AttentionWork(next(lists), next(lists)) for _ in launches] for window, launches in sizes.attention
        }
        step = self._step_tensors(sizes.num_rows, sizes.num_tokens, query_start_loc, seq_lens, logits_rows, attention)
        prepare_rows(
            sent,
            slots,
            query_start_loc,
            seq_lens,
            self.last_tokens,
            self._block_tables,
            step.token_ids,
            step.positions,
            step.slot_mapping,
            step.block_tables,
        )
        output: torch.Tensor = self._model.forward(self._wrap(self._ops(step)))
        return Launched(output, slots, query_start_loc, seq_lens, sampled_slots, positions)

    def _send_piece(self, piece: list[TableWords], words: Int32Array, start: int) -> None:
        """Send words, the first `start` of which are filled, with changes behind them."""
        launches = []
        for change in piece:
            count, width = len(change.places), aligned(len(change.places))
            words[start : start + count] = change.places
            words[start + width : start + width + count] = change.values
            launches.append((change, slice(start, start + count), slice(start + width, start + width + count)))
            start += 2 * width
        self._staging.send(start)
        for change, places, values in launches:
            scatter_words(change.table, self._staging.words[places], self._staging.words[values], change.seen)

    def _step_tensors(
        self,
        num_rows: int,
        num_tokens: int,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        logits_rows: torch.Tensor,
        attention: dict[int, list[AttentionWork]],
    ) -> StepTensors:
        token_ids, positions, slot_mapping = (self._tokens[row, :num_tokens] for row in range(3))
        return StepTensors(
            token_ids,
            positions,
            slot_mapping,
            query_start_loc,
            seq_lens,
            self._row_tables[:num_rows],
            logits_rows,
            attention,
        )

    def _ops(self, step: StepTensors) -> CudaOps:
        return CudaOps(
            step,
            self.weights,
            self._buffers,
            self.kv_cache,
            self._partial,
            self._stats,
            self._attention,
            self._accelerator.target,
            self._dtype,
            self._limits.max_running,
        )

    def _make_cache(self, num_blocks: int) -> torch.Tensor:
        heads = self._model.heads
        shape = (self._model.num_layers, num_blocks, 2, BLOCK_SIZE, heads.num_kv_heads, heads.head_dim)
        return torch.zeros(shape, dtype=self._cache_dtype, device=self._accelerator.device)

    def _count_partial_slots(self) -> int:
        """Return how many partial results of attention get memory: at least those of one tile."""
        heads, config = self._model.heads, self._attention
        slot_bytes = 4 * heads.num_kv_heads * config.block_m * (max(heads.head_dim, 16) + 2)
        pieces = -(-self._limits.max_blocks_per_sequence * BLOCK_SIZE // config.split_keys)
        return max(pieces, min(self._limits.max_running * pieces, _PARTIAL_BYTES // slot_bytes))

    def _dry_run(self) -> tuple[list[int], torch.Tensor]:
        """Run a step of one padding token: it moves every weight and makes every buffer.

        Returns the windows of the model's layers, and what the model gave.
        """
        device = self._accelerator.device
        self._tokens[2].fill_(-1)  # no place in the cache
        zero, one = words(device, 1), words(device, 1) + 1
        scatter_words(words(device, 1), zero, zero)  # changes are sent by the first step
        ends = torch.cat([zero, one])
        ops = self._ops(self._step_tensors(1, 1, ends, one, zero, {}))
        output: torch.Tensor = self._model.forward(self._wrap(ops))
        return sorted(ops.windows), output


def warn_of_unstable_products(weights: Weights) -> None:
    """Warn if this GPU's library gives a row other bits in another place. For start-up only."""
    if unstable := find_unstable_products(weights.matrices()):
        log.warning("matrix products of %s give a row bits that depend on its place in a step", unstable)


def words(device: torch.device, *shape: int) -> torch.Tensor:
    """Allocate zeroed int32 words."""
    return torch.zeros(shape, dtype=torch.int32, device=device)


def _cache_dtype(name: str, dtype: torch.dtype, target: str) -> torch.dtype:
    if name == "auto":
        return dtype
    if target not in FP8_TARGETS:
        raise DeviceError("kv_cache_dtype fp8 needs a GPU of compute capability 8.9 or above; use auto")
    return torch.float8_e4m3fn


def _quantization(name: str, target: str) -> Quantization:
    scheme = Quantization(name)
    if scheme is not Quantization.NONE and scheme.value not in LINEAR_KINDS[target]:
        raise DeviceError(f"quantization {name} needs a GPU of compute capability 8.9 or above; use none or int8")
    return scheme
