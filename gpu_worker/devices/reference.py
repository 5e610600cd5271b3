"""The oracle: executes each operation at once with plain torch.

A row's bits must not depend on the other rows of a step. So no product of matrices ever runs on a
shape that depends on the batch: linear layers run over tiles of exactly 16 rows, attention over
products of 16 queries with 64 keys that start at a multiple of 64 in the sequence, 8 such products
a call. What is left over is padding. The products of one query tile are added one after the
other, and a tile that is masked out adds exactly zero. Where in a tile a row lies changes none of
its bits: `tests/gpu_worker/test_reference.py` proves that for the machine it runs on.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import torch

from octavo.gpu_worker.devices import reference_encoder
from octavo.gpu_worker.devices.attention_plan import TILE_KEYS, TILE_ROWS, AttentionGroup, plan_attention
from octavo.gpu_worker.draw import best_tokens, draw_tokens
from octavo.gpu_worker.ops import (
    Activation,
    Draw,
    EncoderModel,
    Experts,
    Float32Array,
    Heads,
    Int32Array,
    LayerNorm,
    Linear,
    Model,
    Norm,
    Rotary,
    StepInput,
    UInt32Array,
)
from octavo.gpu_worker.protocol import BLOCK_SIZE

_PAIRS_PER_CALL = 8


class ReferenceDevice:
    """Plain torch on the CPU. Weights, cache and activations are of type `dtype` (float32 or float64)."""

    name = "reference"

    def __init__(
        self,
        model: Model | EncoderModel,
        max_batch_tokens: int,  # noqa: ARG002 - nothing here is sized in advance
        max_running: int,  # noqa: ARG002
        max_blocks_per_sequence: int,  # noqa: ARG002
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        self._model = model
        # By identity: the model keeps its weights alive, and tied ones are converted once.
        self._weights: dict[int, torch.Tensor] = {}
        self.keys = torch.empty(0)
        self.values = torch.empty(0)
        self.num_products = 0  # of matrices that were multiplied: a piece of work each

    def kv_block_bytes(self) -> int:
        """Bytes that one block takes, over all layers, keys and values."""
        heads = self._model.heads
        per_token = 2 * self._model.num_layers * heads.num_kv_heads * heads.head_dim * self.dtype.itemsize
        return per_token * BLOCK_SIZE

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocate [num_layers, num_blocks, num_kv_heads, 16, head_dim] for keys and for values."""
        heads = self._model.heads
        shape = (self._model.num_layers, num_blocks, heads.num_kv_heads, BLOCK_SIZE, heads.head_dim)
        self.keys = torch.zeros(shape, dtype=self.dtype)
        self.values = torch.zeros(shape, dtype=self.dtype)

    def touch_kv(self) -> bool:
        """Nothing: what is first written is slow here, and so is all else."""
        return False

    def forward(self, step: StepInput) -> Float32Array:
        """Run one step; return logits or hidden states [R, output_size]."""
        with torch.no_grad():
            logits: Float32Array = cast(Model, self._model).forward(_StepOps(self, step)).numpy()
        return logits

    def progress(self) -> int:
        """Count products of matrices; see `ops.Device.progress`."""
        return self.num_products

    def copy_blocks(self, pairs: Int32Array) -> None:
        """Copy blocks, pairs [N, 2] of (from, to), in order."""
        for source, target in pairs.tolist():
            self.keys[:, target] = self.keys[:, source]
            self.values[:, target] = self.values[:, source]

    def mask(self, row: Float32Array, allowed: UInt32Array) -> None:
        """Set what is not allowed in a row of logits [vocab_size] to -inf, in place; see `ops.Device.mask`."""
        bits = np.unpackbits(allowed.view(np.uint8), count=len(row), bitorder="little")
        row[bits == 0] = -np.inf

    def argmax(self, logits: Float32Array) -> Int32Array:
        """Return the lowest id of each row's highest logit, or -1; see `ops.Device.argmax`."""
        return best_tokens(logits)

    def draw(self, logits: Float32Array, draws: list[Draw]) -> Int32Array:
        """Draw a token for each row of processed `logits`."""
        return draw_tokens(logits, draws)

    def weight(self, stored: torch.Tensor) -> torch.Tensor:
        """Return a weight in the type that is computed in."""
        found = self._weights.get(id(stored))
        if found is None:
            found = self._weights[id(stored)] = stored.to(self.dtype)
        return found


class _StepOps:
    """The operations of one step. Values have a whole number of tiles of rows; the last ones are padding."""

    def __init__(self, device: ReferenceDevice, step: StepInput) -> None:
        self._device = device
        self._step = step
        self._num_rows = _padded(len(step.token_ids))
        slots = torch.from_numpy(step.slot_mapping).long()
        self._blocks, self._offsets = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        self._positions = self._pad(torch.from_numpy(step.positions).long())
        self._groups: dict[int, list[AttentionGroup]] = {}

    def embed(self, table: torch.Tensor) -> torch.Tensor:
        token_ids = torch.from_numpy(self._step.token_ids).long()
        return self._pad(table[token_ids].to(self._device.dtype))

    def norm_linear(self, x: torch.Tensor, norm: Norm, linear: Linear) -> torch.Tensor:
        return self._linear(self._norm(x, norm), linear)

    def rotary_write_kv(
        self, qkv: torch.Tensor, layer: int, heads: Heads, rotary: Rotary, q_norm: Norm | None, k_norm: Norm | None
    ) -> torch.Tensor:
        per_head = qkv.view(self._num_rows, heads.num_heads + 2 * heads.num_kv_heads, heads.head_dim)
        values_start = heads.num_heads + heads.num_kv_heads
        queries, keys = per_head[:, : heads.num_heads], per_head[:, heads.num_heads : values_start]
        values = per_head[:, values_start:]
        queries = self._rotate(queries if q_norm is None else self._norm(queries, q_norm), rotary)
        keys = self._rotate(keys if k_norm is None else self._norm(keys, k_norm), rotary)
        count = len(self._blocks)
        self._device.keys[layer][self._blocks, :, self._offsets] = keys[:count]
        self._device.values[layer][self._blocks, :, self._offsets] = values[:count]
        return queries.reshape(self._num_rows, -1)

    def paged_attention(
        self, queries: torch.Tensor, layer: int, heads: Heads, scale: float, window: int
    ) -> torch.Tensor:
        if window not in self._groups:
            self._groups[window] = plan_attention(self._step, window, multiple=_PAIRS_PER_CALL)
        attended = torch.zeros_like(queries)
        per_head = queries.view(self._num_rows, heads.num_kv_heads, -1, heads.head_dim)
        for group in self._groups[window]:
            output = self._attend(per_head[group.tile_rows], group, layer, scale)
            attended[group.tile_rows[group.row_is_real]] = output[group.row_is_real].flatten(1)
        return attended

    def linear_residual(self, x: torch.Tensor, linear: Linear, residual: torch.Tensor) -> torch.Tensor:
        return residual + self._linear(x, linear)

    def norm_gated_linear(
        self, x: torch.Tensor, norm: Norm, gate: Linear, up: Linear, activation: Activation
    ) -> torch.Tensor:
        return self.gated_linear(self._norm(x, norm), gate, up, activation)

    def norm_experts_residual(
        self, x: torch.Tensor, norm: Norm, experts: Experts, activation: Activation
    ) -> torch.Tensor:
        h = self._norm(x, norm)
        weights = _expert_weights(self._linear(h, Linear(experts.router)), experts)
        output = x.clone()
        for expert, (gate, up, down) in enumerate(zip(experts.gate, experts.up, experts.down, strict=True)):
            rows = weights[:, expert].nonzero()[:, 0]
            if len(rows):
                chosen = _whole_tiles(h[rows])
                gated = _activate(self._linear(chosen, Linear(gate)), activation) * self._linear(chosen, Linear(up))
                output[rows] += weights[rows, expert, None] * self._linear(gated, Linear(down))[: len(rows)]
        return output

    def logits(self, x: torch.Tensor, norm: Norm, head: Linear | None) -> torch.Tensor:
        rows = x[torch.from_numpy(self._step.logits_rows).long()]
        normed = self._norm(_whole_tiles(rows), norm)
        return (normed if head is None else self._linear(normed, head))[: len(rows)].float()

    def embed_sum(self, words: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        return self._pad(reference_encoder.embed_sum(self._device, self._step, words, positions, segments))

    def layer_norm(self, x: torch.Tensor, norm: LayerNorm) -> torch.Tensor:
        return reference_encoder.layer_norm(self._device, x, norm)

    def linear(self, x: torch.Tensor, linear: Linear, activation: Activation | None = None) -> torch.Tensor:
        product = self._linear(x, linear)
        return product if activation is None else _activate(product, activation)

    def gated_linear(self, x: torch.Tensor, gate: Linear, up: Linear, activation: Activation) -> torch.Tensor:
        return _activate(self._linear(x, gate), activation) * self._linear(x, up)

    def rotate(self, qkv: torch.Tensor, heads: Heads, rotary: Rotary) -> torch.Tensor:
        queries, keys, values = qkv.view(self._num_rows, 3, heads.num_heads, heads.head_dim).unbind(1)
        return torch.stack([self._rotate(queries, rotary), self._rotate(keys, rotary), values], dim=1).flatten(1)

    def self_attention(self, qkv: torch.Tensor, heads: Heads, scale: float, reach: int = 0) -> torch.Tensor:
        return reference_encoder.self_attention(self._step, qkv, heads, scale, reach)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return x[torch.from_numpy(self._step.logits_rows).long()].float()

    def _pad(self, rows: torch.Tensor) -> torch.Tensor:
        return _whole_tiles(rows)

    def _norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        mean = (x * x).sum(dim=-1, keepdim=True) / x.shape[-1]
        return x * torch.rsqrt(mean + norm.eps) * self._device.weight(norm.weight)

    def _linear(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        weight = self._device.weight(linear.weight)
        output = x.new_empty(len(x), len(weight))
        product = x.new_empty(len(weight), TILE_ROWS)
        for start in range(0, len(x), TILE_ROWS):
            torch.mm(weight, x[start : start + TILE_ROWS].t(), out=product)
            output[start : start + TILE_ROWS] = product.t()
            self._device.num_products += 1
        if linear.bias is not None:
            output += self._device.weight(linear.bias)
        return output

    def _rotate(self, x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """Rotate [rows, heads, head_dim]; each product is rounded on its own."""
        half = rotary.rotary_dim // 2
        cos = rotary.cos[self._positions, None].to(x.dtype)
        sin = rotary.sin[self._positions, None].to(x.dtype)
        one, two, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], dim=-1)

    def _attend(self, queries: torch.Tensor, group: AttentionGroup, layer: int, scale: float) -> torch.Tensor:
        """Attend with query tiles [tiles, 16, num_kv_heads, queries a key head, head_dim]; same shape back."""
        num_tiles, _, num_kv_heads, shared, head_dim = queries.shape
        num_pairs = len(group.tile_of_pair)
        tiles = queries.transpose(1, 2).reshape(num_tiles, num_kv_heads, TILE_ROWS * shared, head_dim)
        keys = self._gather(self._device.keys[layer], group)
        values = self._gather(self._device.values[layer], group)
        # What lies beyond a sequence's end was left by another one; a zero weight would not mask a NaN.
        ended = values.view(num_pairs, num_kv_heads, TILE_KEYS, head_dim)
        ended[group.ended_pairs] = ended[group.ended_pairs].masked_fill(group.ended_keys[:, None, :, None], 0)

        scores = (
            self._products(tiles.index_select(0, group.tile_of_pair).flatten(0, 1), keys.transpose(1, 2), num_kv_heads)
            * scale
        )
        by_query = scores.view(num_pairs, num_kv_heads, TILE_ROWS, shared, TILE_KEYS)
        by_query.masked_fill_(group.masked[:, None, :, None, :], -torch.inf)
        pair_best = scores.amax(dim=-1).view(num_pairs, num_kv_heads, -1)
        best = torch.full_like(pair_best[:num_tiles], -torch.inf)
        for pairs, owners in group.pairs_by_rank:
            best[owners] = torch.maximum(best[owners], pair_best.index_select(0, pairs))
        weights = scores.sub_(best.index_select(0, group.tile_of_pair).view(*scores.shape[:2], 1)).exp_()
        pair_sums = weights.sum(dim=-1).view(num_pairs, num_kv_heads, -1, 1)
        pair_outputs = self._products(weights, values, num_kv_heads).view(num_pairs, num_kv_heads, -1, head_dim)
        sums = torch.zeros_like(pair_sums[:num_tiles])
        outputs = torch.zeros_like(pair_outputs[:num_tiles])
        for pairs, owners in group.pairs_by_rank:
            sums.index_add_(0, owners, pair_sums.index_select(0, pairs))
            outputs.index_add_(0, owners, pair_outputs.index_select(0, pairs))
        attended = (outputs / sums).view(num_tiles, num_kv_heads, TILE_ROWS, shared, head_dim)
        return attended.transpose(1, 2).contiguous()

    def _products(self, left: torch.Tensor, right: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
        """Multiply matrices pairwise, always the same number of them in a call."""
        output = left.new_empty(*left.shape[:2], right.shape[2])
        step = _PAIRS_PER_CALL * num_kv_heads
        for start in range(0, len(left), step):
            torch.bmm(left[start : start + step], right[start : start + step], out=output[start : start + step])
            self._device.num_products += 1
        return output

    def _gather(self, cache: torch.Tensor, group: AttentionGroup) -> torch.Tensor:
        """Return the key tiles of `cache` [num_blocks, num_kv_heads, 16, head_dim]: [pairs * num_kv_heads, 64, ...]."""
        num_kv_heads, head_dim = cache.shape[1], cache.shape[3]
        rows = group.blocks[:, None, :] * num_kv_heads + torch.arange(num_kv_heads)[None, :, None]
        return cache.flatten(0, 1).flatten(1).index_select(0, rows.flatten()).view(-1, TILE_KEYS, head_dim)


def _activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Apply an activation, written with operations that give each element the same bits anywhere.

    torch's own silu and gelu may take another code path for the last elements of an array.
    """
    if activation == "silu":
        return x / (1 + torch.exp(-x))
    if activation == "gelu":
        halves: torch.Tensor = x * 0.5
        return halves * (1 + torch.erf(x * math.sqrt(0.5)))
    inner = 0.7978845608028654 * (x + 0.044715 * (x * x * x))
    return x * (1 - 1 / (torch.exp(2 * inner) + 1))


def _expert_weights(logits: torch.Tensor, experts: Experts) -> torch.Tensor:
    """Return how much each row weighs each expert, 0 for those it does not take: [rows, experts].

    logits  [rows, num_routed], one column more if there are shared experts
    """
    routed = logits[:, : experts.num_routed]
    chosen = routed.sort(dim=-1, descending=True, stable=True).indices[:, : experts.num_chosen]
    taken = torch.zeros_like(routed).scatter_(1, chosen, 1.0)
    powers = torch.exp(routed - routed.amax(dim=-1, keepdim=True))
    taken_powers = powers * taken
    weights = taken_powers / (taken_powers if experts.is_normalized else powers).sum(dim=-1, keepdim=True)
    shared = 1 / (1 + torch.exp(-logits[:, experts.num_routed :]))
    return torch.cat([weights, shared.expand(-1, experts.num_shared)], dim=-1) if experts.num_shared else weights


def _whole_tiles(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows with zeros behind them, up to whole tiles."""
    return torch.cat([rows, rows.new_zeros(_padded(len(rows)) - len(rows), *rows.shape[1:])])


def _padded(rows: int) -> int:
    """Round up to whole tiles."""
    return rows + -rows % TILE_ROWS
