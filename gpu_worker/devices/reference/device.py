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
from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import numpy as np
import torch

from octavo.gpu_worker.devices.reference import encoder as reference_encoder
from octavo.gpu_worker.devices.reference.attention_plan import TILE_KEYS, TILE_ROWS, AttentionGroup, plan_attention
from octavo.gpu_worker.devices.reference.tiles import tiles
from octavo.gpu_worker.ops import (
    Activation,
    CheckedModel,
    Draw,
    EncoderModel,
    Experts,
    Float32Array,
    HeadLinear,
    Heads,
    Int32Array,
    LayerNorm,
    Linear,
    LoraPair,
    Model,
    ModuleList,
    Norm,
    Rotary,
    StepInput,
    UInt32Array,
    kv_groups_of,
)
from octavo.gpu_worker.protocol import BLOCK_SIZE
from octavo.gpu_worker.sampling.draw import best_tokens, draw_tokens
from octavo.kernels.routing import Routing

_PAIRS_PER_CALL = 8

PackedAdapter = dict[str, tuple[torch.Tensor, torch.Tensor, float]]
"""By module: a, b and scale of a `LoraPair`."""


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
        max_kv_groups: int = 1,
    ) -> None:
        self.dtype = dtype
        self._model = model
        self.kv_groups = kv_groups_of(model, max_kv_groups)
        self.kv_windows = self.kv_groups.windows
        # By identity: the model keeps its weights alive, and tied ones are converted once.
        self._weights: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._module: torch.nn.Module | None = None
        self.keys = torch.empty(0)
        self.values = torch.empty(0)
        self.num_products = 0  # of matrices that were multiplied: a piece of work each
        self.adapters: dict[int, PackedAdapter] = {}

    def kv_block_bytes(self) -> int:
        """Bytes that one block takes, over all layers of a KV group, keys and values."""
        return self.kv_groups.num_layers * self._model.heads.cached_per_token * self.dtype.itemsize * BLOCK_SIZE

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocate [layers of a group, num_blocks, num_kv_heads, 16, head_dim] for keys and for values.

        Values of a latent cache are a part of the keys.
        """
        heads = self._model.heads
        shape = (self.kv_groups.num_layers, num_blocks, heads.num_kv_heads, BLOCK_SIZE, heads.head_dim)
        self.keys = torch.zeros(shape, dtype=self.dtype)
        self.values = self.keys[..., : heads.latent_dim] if heads.latent_dim else torch.zeros(shape, dtype=self.dtype)

    def touch_kv(self) -> bool:
        """Nothing: what is first written is slow here, and so is all else."""
        return False

    def forward(self, step: StepInput) -> Float32Array:
        """Run one step; return logits or hidden states [R, output_size]."""
        rows_at_once = getattr(self._model, "rows_at_once", 0)
        with torch.no_grad():
            if not rows_at_once:
                return self._logits(step)
            output = np.empty((len(step.logits_rows), self._model.vocab_size), np.float32)
            for tile, rows in tiles(step, rows_at_once):
                output[rows] = self._logits(tile)
        return output

    def _logits(self, step: StepInput) -> Float32Array:
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

    def adapter_modules(self) -> dict[str, tuple[int, int]]:
        """List the modules of a decoder; see `ops.Device.adapter_modules`. Those of transformers take none."""
        modules = ModuleList()
        if self._model.num_layers and not isinstance(self._model, CheckedModel):
            cast(Model, self._model).forward(modules)
        return modules.shapes

    def pack_adapter(self, pairs: Iterable[LoraPair]) -> PackedAdapter:
        """Return an adapter's pairs by module, in the type that is computed in."""

        def tensor(values: Float32Array) -> torch.Tensor:
            return torch.from_numpy(values).to(self.dtype)

        return {pair.module: (tensor(pair.a), tensor(pair.b), pair.scale) for pair in pairs}

    def set_adapter(self, adapter_id: int, packed: PackedAdapter | None) -> None:
        """See `ops.Device.set_adapter`."""
        if packed is None:
            self.adapters.pop(adapter_id, None)
        else:
            self.adapters[adapter_id] = packed

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

    def module(self, module: torch.nn.Module) -> torch.nn.Module:
        """Return a module whose weights are of the type that is computed in."""
        for parameter in module.parameters() if module is not self._module else ():
            parameter.data = parameter.data.to(self.dtype)  # one by one: the old one is gone before the next is made
        self._module = module
        return module

    def weight(self, stored: torch.Tensor) -> torch.Tensor:
        """Return a weight in the type that is computed in."""
        if id(stored) not in self._weights:  # which is its own as long as it is kept
            self._weights[id(stored)] = (stored, stored.to(self.dtype))
        return self._weights[id(stored)][1]


class _StepOps:
    """The operations of one step. Values have a whole number of tiles of rows; the last ones are padding."""

    def __init__(self, device: ReferenceDevice, step: StepInput) -> None:
        self._device = device
        self._step = step
        self._num_rows = _padded(len(step.token_ids))
        slots = torch.from_numpy(step.slot_mapping).long().view(-1, len(step.token_ids))
        self._blocks, self._offsets = slots // BLOCK_SIZE, slots % BLOCK_SIZE  # [groups, tokens]
        self._positions = self._pad(torch.from_numpy(step.positions).long())
        self._groups: dict[tuple[int, int], list[AttentionGroup]] = {}
        ids = np.empty(0, np.int32) if step.adapter_ids is None else step.adapter_ids
        self._rows_of_adapter = {int(each): torch.from_numpy(np.flatnonzero(ids == each)) for each in set(ids[ids > 0])}

    def embed(self, table: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        token_ids = torch.from_numpy(self._step.token_ids).long()
        rows = self._pad(table[token_ids].to(self._device.dtype))
        return rows if scale == 1.0 else rows * float(np.float32(scale))

    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        mean = (x * x).sum(dim=-1, keepdim=True) / x.shape[-1]
        return x * torch.rsqrt(mean + norm.eps) * self._device.weight(norm.weight)

    def add(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return residual + x

    def rotary_write_kv(
        self, qkv: torch.Tensor, layer: int, heads: Heads, rotary: Rotary, q_norm: Norm | None, k_norm: Norm | None
    ) -> torch.Tensor:
        queries, keys, values = self._rotated(qkv, heads, rotary, q_norm, k_norm)
        group, at = self._device.kv_groups.places[layer]
        blocks, offsets = self._blocks[group], self._offsets[group]
        self._device.keys[at][blocks, :, offsets] = keys[: len(blocks)]
        self._device.values[at][blocks, :, offsets] = values[: len(blocks)]
        return queries.reshape(self._num_rows, -1)

    def rotate_queries(self, queries: torch.Tensor, num_heads: int, rotary: Rotary) -> torch.Tensor:
        return self._rotate_last(queries.view(self._num_rows, num_heads, -1), rotary).flatten(1)

    def write_latent(self, latent: torch.Tensor, layer: int, heads: Heads, rotary: Rotary, norm: Norm) -> None:
        normed = self.norm(latent[:, : heads.latent_dim], norm)
        rotated = self._rotate_last(latent[:, None, heads.latent_dim :], rotary)[:, 0]
        keys = torch.cat([normed, rotated], dim=1)[: len(self._blocks[0]), None]
        self._device.keys[layer][self._blocks[0], :, self._offsets[0]] = keys

    def head_linear(self, x: torch.Tensor, linear: HeadLinear) -> torch.Tensor:
        weight = self._device.weight(linear.weight)
        num_heads, _, in_features = weight.shape
        per_head = x.view(self._num_rows, num_heads, -1)
        parts = [
            torch.cat([self._multiply(per_head[:, h, :in_features], weight[h]), per_head[:, h, in_features:]], dim=1)
            for h in range(num_heads)
        ]
        return torch.cat(parts, dim=1)

    def paged_attention(
        self,
        queries: torch.Tensor,
        layer: int,
        heads: Heads,
        scale: float,
        window: int,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        kv_group, at = self._device.kv_groups.places[layer]
        key = kv_group, window
        if key not in self._groups:
            num_rows = len(self._step.seq_lens)
            tables = self._step.block_tables[kv_group * num_rows : (kv_group + 1) * num_rows]
            of_group = replace(self._step, block_tables=tables)
            self._groups[key] = plan_attention(of_group, window, multiple=_PAIRS_PER_CALL)
        attended = queries.new_zeros(self._num_rows, heads.num_heads * heads.value_dim)
        per_head = queries.view(self._num_rows, heads.num_kv_heads, -1, heads.head_dim)
        for group in self._groups[key]:
            output = self._attend(per_head[group.tile_rows], group, at, scale, soft_cap, sinks)
            attended[group.tile_rows[group.row_is_real]] = output[group.row_is_real].flatten(1)
        return attended

    def linear_residual(self, x: torch.Tensor, linear: Linear, residual: torch.Tensor) -> torch.Tensor:
        return residual + self._adapted(x, linear)

    def add_experts(
        self, residual: torch.Tensor, x: torch.Tensor, experts: Experts, activation: Activation
    ) -> torch.Tensor:
        weights = _expert_weights(self._linear(x, Linear(experts.router, experts.router_bias)), experts)
        output = residual.clone()
        biases = None if experts.biases is None else [self._device.weight(bias) for bias in experts.biases]
        for expert, (gate, up, down) in enumerate(zip(experts.gate, experts.up, experts.down, strict=True)):
            rows = weights[:, expert].nonzero()[:, 0]
            if len(rows):
                chosen = _whole_tiles(x[rows])
                gates, ups = self._linear(chosen, Linear(gate)), self._linear(chosen, Linear(up))
                if biases is not None:
                    gate_bias, up_bias = biases[0][expert].chunk(2)
                    gates, ups = gates + gate_bias, ups + up_bias
                terms = self._linear(_gated(gates, ups, activation), Linear(down))
                if biases is not None:
                    terms = terms + biases[1][expert]
                output[rows] += weights[rows, expert, None] * terms[: len(rows)]
        return output

    def module(self, module: torch.nn.Module) -> torch.nn.Module:
        return self._device.module(module)

    def tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        self._device.num_products += 1
        return self._pad(torch.from_numpy(self._step.token_ids).long()), self._positions

    def logits(self, x: torch.Tensor, head: Linear | None, soft_cap: float = 0.0) -> torch.Tensor:
        rows = x[torch.from_numpy(self._step.logits_rows).long()]
        if head is not None:
            rows = _capped(self._linear(_whole_tiles(rows), head)[: len(rows)], soft_cap)
        return rows.float()

    def embed_sum(self, words: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        return self._pad(reference_encoder.embed_sum(self._device, self._step, words, positions, segments))

    def layer_norm(self, x: torch.Tensor, norm: LayerNorm) -> torch.Tensor:
        return reference_encoder.layer_norm(self._device, x, norm)

    def linear(self, x: torch.Tensor, linear: Linear, activation: Activation | None = None) -> torch.Tensor:
        product = self._adapted(x, linear)
        return product if activation is None else _activate(product, activation)

    def gated_linear(self, x: torch.Tensor, gate: Linear, up: Linear, activation: Activation) -> torch.Tensor:
        return _gated(self._adapted(x, gate), self._adapted(x, up), activation)

    def rotate(
        self,
        qkv: torch.Tensor,
        heads: Heads,
        rotary: Rotary,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
    ) -> torch.Tensor:
        return torch.cat(self._rotated(qkv, heads, rotary, q_norm, k_norm), dim=1).flatten(1)

    def self_attention(self, qkv: torch.Tensor, heads: Heads, scale: float, reach: int = 0) -> torch.Tensor:
        return reference_encoder.self_attention(self._step, qkv, heads, scale, reach)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return x[torch.from_numpy(self._step.logits_rows).long()].float()

    def _rotated(
        self, qkv: torch.Tensor, heads: Heads, rotary: Rotary, q_norm: Norm | None, k_norm: Norm | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries and keys, normed and rotated, and values, each [rows, its heads, head_dim]."""
        per_head = qkv.view(self._num_rows, heads.num_heads + 2 * heads.num_kv_heads, heads.head_dim)
        queries, keys, values = torch.split(per_head, [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads], dim=1)
        queries = self._rotate(queries if q_norm is None else self._norm_heads(queries, q_norm), rotary)
        keys = self._rotate(keys if k_norm is None else self._norm_heads(keys, k_norm), rotary)
        return queries, keys, values

    def _pad(self, rows: torch.Tensor) -> torch.Tensor:
        return _whole_tiles(rows)

    def _norm_heads(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """Norm [rows, heads, head_dim] head by head, or all heads of a row at once, as the weight is long."""
        is_of_head = norm.weight.numel() == x.shape[-1]
        return self.norm(x, norm) if is_of_head else self.norm(x.flatten(1), norm).view(x.shape)

    def _adapted(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """Return a layer of the step's tokens, with what the adapters of their rows add."""
        output = self._linear(x, linear)
        for adapter_id, rows in self._rows_of_adapter.items():
            adapter, start = self._device.adapters[adapter_id], 0
            for module in linear.modules:
                end = start + module.out_features
                if module.name in adapter:
                    a, b, scale = adapter[module.name]
                    added = self._multiply(self._multiply(_whole_tiles(x[rows]), a), b)
                    output[rows, start:end] += added[: len(rows)] * scale
                start = end
        return output

    def _linear(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        output = self._multiply(x, self._device.weight(linear.weight))
        if linear.bias is not None:
            output += self._device.weight(linear.bias)
        return output

    def _multiply(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the product of whole tiles of rows with a matrix [out_features, in_features]."""
        output = x.new_empty(len(x), len(weight))
        product = x.new_empty(len(weight), TILE_ROWS)
        for start in range(0, len(x), TILE_ROWS):
            torch.mm(weight, x[start : start + TILE_ROWS].t(), out=product)
            output[start : start + TILE_ROWS] = product.t()
            self._device.num_products += 1
        return output

    def _rotate(self, x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """Rotate [rows, heads, head_dim]; each product is rounded on its own."""
        half = rotary.rotary_dim // 2
        cos = rotary.cos[self._positions, None].to(x.dtype)
        sin = rotary.sin[self._positions, None].to(x.dtype)
        one, two, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], dim=-1)

    def _rotate_last(self, x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """Rotate the last dimensions of [rows, heads, head_dim]."""
        first = x.shape[-1] - rotary.rotary_dim
        return torch.cat([x[..., :first], self._rotate(x[..., first:], rotary)], dim=-1)

    def _attend(
        self,
        queries: torch.Tensor,
        group: AttentionGroup,
        layer: int,
        scale: float,
        soft_cap: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend with query tiles [tiles, 16, num_kv_heads, queries a key head, head_dim]; return [..., value_dim]."""
        num_tiles, _, num_kv_heads, shared, head_dim = queries.shape
        value_dim = self._device.values.shape[-1]
        num_pairs = len(group.tile_of_pair)
        tiles = queries.transpose(1, 2).reshape(num_tiles, num_kv_heads, TILE_ROWS * shared, head_dim)
        keys = self._gather(self._device.keys[layer], group)
        is_latent = value_dim < head_dim
        values = keys[..., :value_dim].contiguous() if is_latent else self._gather(self._device.values[layer], group)
        # What lies beyond a sequence's end was left by another one; a zero weight would not mask a NaN.
        ended = values.view(num_pairs, num_kv_heads, TILE_KEYS, value_dim)
        ended[group.ended_pairs] = ended[group.ended_pairs].masked_fill(group.ended_keys[:, None, :, None], 0)

        scores = (
            self._products(tiles.index_select(0, group.tile_of_pair).flatten(0, 1), keys.transpose(1, 2), num_kv_heads)
            * scale
        )
        scores = _capped(scores, soft_cap)
        by_query = scores.view(num_pairs, num_kv_heads, TILE_ROWS, shared, TILE_KEYS)
        by_query.masked_fill_(group.masked[:, None, :, None, :], -torch.inf)
        pair_best = scores.amax(dim=-1).view(num_pairs, num_kv_heads, -1)
        best = torch.full_like(pair_best[:num_tiles], -torch.inf)
        for pairs, owners in group.pairs_by_rank:
            best[owners] = torch.maximum(best[owners], pair_best.index_select(0, pairs))
        weights = scores.sub_(best.index_select(0, group.tile_of_pair).view(*scores.shape[:2], 1)).exp_()
        pair_sums = weights.sum(dim=-1).view(num_pairs, num_kv_heads, -1, 1)
        pair_outputs = self._products(weights, values, num_kv_heads).view(num_pairs, num_kv_heads, -1, value_dim)
        sums = torch.zeros_like(pair_sums[:num_tiles])
        outputs = torch.zeros_like(pair_outputs[:num_tiles])
        for pairs, owners in group.pairs_by_rank:
            sums.index_add_(0, owners, pair_sums.index_select(0, pairs))
            outputs.index_add_(0, owners, pair_outputs.index_select(0, pairs))
        if sinks is not None:  # [num_kv_heads, shared], for each of a tile's rows
            by_row = self._device.weight(sinks).view(1, num_kv_heads, 1, shared).expand(num_tiles, -1, TILE_ROWS, -1)
            sums = sums + torch.exp(by_row.reshape(best.shape) - best)[..., None]
        attended = (outputs / sums).view(num_tiles, num_kv_heads, TILE_ROWS, shared, value_dim)
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


def _gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Return what a gated layer makes of its two products."""
    if activation != "swigluoai":
        return _activate(gate, activation) * up
    gate = gate.clamp(max=7.0)
    return gate / (1 + torch.exp(-1.702 * gate)) * (up.clamp(-7.0, 7.0) + 1)


def _capped(x: torch.Tensor, cap: float) -> torch.Tensor:
    """Return cap * tanh(x / cap), written as `_activate` is; x without a cap."""
    return x if cap == 0 else cap * (1 - 2 / (torch.exp(x * (2 / cap)) + 1))


def _expert_weights(logits: torch.Tensor, experts: Experts) -> torch.Tensor:
    """Return how much each row weighs each expert, 0 for those it does not take: [rows, experts].

    logits  [rows, num_routed], one column more if shared experts have a gate
    """
    routing, routed = experts.routing, logits[:, : experts.num_routed]
    if routing.scores == "sigmoid":
        powers = 1 / (1 + torch.exp(-routed))
        total = torch.ones_like(powers[:, :1])
    else:
        powers = torch.exp(routed - routed.amax(dim=-1, keepdim=True))
        total = powers.sum(dim=-1, keepdim=True)
    choices = routed
    if experts.bias is not None or routing.num_groups > 1:
        choices = powers / total
        if experts.bias is not None:
            choices = choices + experts.bias.to(choices.dtype)
        choices = _in_best_groups(choices, routing)
    chosen = choices.sort(dim=-1, descending=True, stable=True).indices[:, : experts.num_chosen]
    taken = torch.zeros_like(routed).scatter_(1, chosen, 1.0)
    taken_powers = powers * taken
    weights = taken_powers / (taken_powers.sum(dim=-1, keepdim=True) if experts.is_normalized else total)
    weights = weights * routing.scale
    shared = 1 / (1 + torch.exp(-logits[:, experts.num_routed :]))
    if not routing.has_shared_gate:
        shared = torch.ones_like(logits[:, :1])
    return torch.cat([weights, shared.expand(-1, experts.num_shared)], dim=-1) if experts.num_shared else weights


def _in_best_groups(choices: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Return what experts are chosen by, -inf outside of a row's best groups."""
    if routing.num_groups == 1:
        return choices
    groups = choices.reshape(len(choices), routing.num_groups, -1)
    best = groups.sort(dim=-1, descending=True).values[..., : routing.num_best].sum(dim=-1)
    order = best.sort(dim=-1, descending=True, stable=True).indices
    outside = torch.ones_like(best, dtype=torch.bool).scatter_(1, order[:, : routing.num_chosen_groups], False)
    return groups.masked_fill(outside[..., None], -torch.inf).flatten(1)


def _whole_tiles(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows with zeros behind them, up to whole tiles."""
    return torch.cat([rows, rows.new_zeros(_padded(len(rows)) - len(rows), *rows.shape[1:])])


def _padded(rows: int) -> int:
    """Round up to whole tiles."""
    return rows + -rows % TILE_ROWS
