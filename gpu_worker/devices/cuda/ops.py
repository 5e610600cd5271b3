# ruff: noqa: D102 - the protocol says what a method does
"""The operations of a forward pass on the `cuda` device: Triton kernels, and torch's matrix products.

Every call launches at once, on buffers that were there before; nothing is allocated, waited for or read back
to the host, so a whole pass can be captured as a graph. Values are tensors with a whole number of GEMM_ROWS
rows, of which the first T are the step's; the others hold numbers without a meaning.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from octavo.gpu_worker.devices.cuda.products import multiply, padded_rows
from octavo.gpu_worker.devices.cuda.weights import Buffers, Layer, Weights
from octavo.gpu_worker.ops import Activation, Experts, Heads, Linear, Norm, Rotary
from octavo.kernels.configs import GATED, ROTARY, AttentionConfig, LinearKind, experts_config, linear_config
from octavo.kernels.gated import gated
from octavo.kernels.moe import add_experts
from octavo.kernels.paged_attention import paged_attention
from octavo.kernels.quantized_linear import quantized_linear
from octavo.kernels.rms_norm import add_rms_norm
from octavo.kernels.rotary_kv import rotary_write_kv


@dataclass(frozen=True)
class AttentionWork:
    """A work list and what it combines, on the device: see `kernels/attention_plan.py`."""

    work: torch.Tensor
    combines: torch.Tensor


@dataclass(frozen=True)
class StepTensors:
    """A step on the device; S rows, T tokens, R rows that need logits. All int32.

    token_ids, positions, slot_mapping  [T]
    query_start_loc  [S + 1];  seq_lens  [S];  block_tables  [S, max_blocks]
    logits_rows      [R]
    attention        the work of each window size, one launch after the other
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    logits_rows: torch.Tensor
    attention: dict[int, list[AttentionWork]]


@dataclass
class Residual:
    """The residual stream [T, hidden_size] float32, and what is still to be added to it.

    The sum is made by the norm that reads it first; then `update` is None. Whoever must change an update
    before it is added, such as a sum over tensor-parallel ranks, changes the tensor in place.
    """

    stream: torch.Tensor
    update: torch.Tensor | None = None


@dataclass
class CudaOps:
    """`Ops` over the tensors of one step.

    kv_cache  [num_layers, num_blocks, 2, 16, num_kv_heads, head_dim]
    partial, stats  of `paged_attention`
    windows   filled while `forward` runs: which window sizes it has
    """

    step: StepTensors
    weights: Weights
    buffers: Buffers
    kv_cache: torch.Tensor
    partial: torch.Tensor
    stats: torch.Tensor
    attention: AttentionConfig
    target: str
    dtype: torch.dtype
    max_logits_rows: int
    windows: set[int] = field(default_factory=set)

    @property
    def _num_tokens(self) -> int:
        return len(self.step.token_ids)

    def _buffer(self, name: str, width: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.buffers.get(name, width, dtype or self.dtype)[: padded_rows(self._num_tokens)]

    def embed(self, table: torch.Tensor, scale: float = 1.0) -> Residual:
        weight = self.weights.matrix(table)
        rows = self._buffer("hidden", weight.shape[1])[: self._num_tokens]
        torch.index_select(weight, 0, self.step.token_ids, out=rows)
        stream = self._buffer("residual", weight.shape[1], torch.float32)
        stream[: self._num_tokens].copy_(rows)
        if scale != 1.0:
            stream[: self._num_tokens].mul_(scale)
        return Residual(stream)

    def norm(self, x: Residual | torch.Tensor, norm: Norm) -> torch.Tensor:
        """Return the norm of the residual stream, to which is added what is still to be added; or of an update."""
        count = self._num_tokens
        weight = self.weights.norm(norm.weight)
        if isinstance(x, torch.Tensor):
            hidden = self._buffer("normed_update", x.shape[1])
            stream = self._buffer("update_stream", x.shape[1], torch.float32)
            stream[:count].copy_(x[:count])
            add_rms_norm(stream[:count], None, weight, hidden[:count], norm.eps)
            return hidden
        hidden = self._buffer("hidden", x.stream.shape[1])
        update = None if x.update is None else x.update[:count]
        add_rms_norm(x.stream[:count], update, weight, hidden[:count], norm.eps)
        x.update = None
        return hidden

    def linear(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        layer = self.weights.layer(linear, has_part_of_inputs=linear.is_partial)
        return self._linear("update" if linear.is_partial else "linear", x, layer)

    def gated_linear(self, x: torch.Tensor, gate: Linear, up: Linear, activation: Activation) -> torch.Tensor:
        gate_up = self._linear("gate_up", x, self.weights.layer(gate, up))
        output = self._buffer("gated", len(gate.weight))
        count = self._num_tokens
        gated(gate_up[:count], output[:count], activation, GATED[self.target])
        return output

    def add(self, residual: Residual, x: torch.Tensor) -> Residual:
        assert residual.update is None, "a norm must read the residual before it is added to again"
        return Residual(residual.stream, x)

    def add_experts(self, residual: Residual, x: torch.Tensor, experts: Experts, activation: Activation) -> Residual:
        assert residual.update is None, "a norm must read the residual before it is added to again"
        self.sum_experts(x, experts, activation, residual.stream)
        return Residual(residual.stream)

    def rotary_write_kv(
        self, qkv: torch.Tensor, layer: int, heads: Heads, rotary: Rotary, q_norm: Norm | None, k_norm: Norm | None
    ) -> torch.Tensor:
        count, dim = self._num_tokens, heads.head_dim
        queries = self._buffer("queries", heads.num_heads * dim)
        rotary_write_kv(
            qkv[:count].view(count, heads.num_heads + 2 * heads.num_kv_heads, dim),
            queries[:count].view(count, heads.num_heads, dim),
            self.kv_cache[layer],
            self.step.positions,
            self.step.slot_mapping,
            self.weights.table(rotary.cos),
            self.weights.table(rotary.sin),
            config=ROTARY[self.target],
            q_norm=None if q_norm is None else self.weights.norm(q_norm.weight),
            k_norm=None if k_norm is None else self.weights.norm(k_norm.weight),
            eps=1e-6 if q_norm is None else q_norm.eps,
        )
        return queries

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
        self.windows.add(window)
        count = self._num_tokens
        attended = self._buffer("attended", queries.shape[1])
        shape = (count, heads.num_heads, heads.head_dim)
        for part in self.step.attention.get(window, ()):
            paged_attention(
                queries[:count].view(shape),
                self.kv_cache[layer],
                part.work,
                part.combines,
                self.step.query_start_loc,
                self.step.seq_lens,
                self.step.block_tables,
                attended[:count].view(shape),
                self.partial,
                self.stats,
                config=self.attention,
                scale=scale,
                window=window,
                soft_cap=soft_cap,
                sinks=None if sinks is None else self.weights.table(sinks),
            )
        return attended

    def sum_experts(self, hidden: torch.Tensor, experts: Experts, activation: Activation, sums: torch.Tensor) -> None:
        """Add the experts' weighted sum of each row of `hidden` to that of `sums` [T, hidden_size], float32."""
        logits = self._linear("router", hidden, self.weights.head(Linear(experts.router, experts.router_bias)))
        config = experts_config(self.target, is_float32=self.dtype == torch.float32)
        mixture = self.weights.mixture(experts)
        count = self._num_tokens
        add_experts(
            sums[:count],
            hidden[:count],
            logits[:count],
            self.step.slot_mapping,
            mixture,
            self.buffers.for_experts(mixture, config, self.dtype),
            activation,
            config,
            GATED[self.target],
        )

    def logits(self, hidden: torch.Tensor, head: Linear | None, soft_cap: float = 0.0) -> torch.Tensor:
        if head is None:  # of all tokens: the pooling chooses
            return hidden[: self._num_tokens]
        count = len(self.step.logits_rows)
        rows = padded_rows(self.max_logits_rows)
        chosen = self.buffers.get("chosen", hidden.shape[1], self.dtype, rows)[: padded_rows(count)]
        layer = self.weights.head(head)
        product = self.buffers.get("product", len(layer.weight), self.dtype, rows)[: padded_rows(count)]
        torch.index_select(hidden, 0, self.step.logits_rows, out=chosen[:count])
        multiply(chosen, layer.weight, layer.bias, product)
        if self.dtype == torch.float32:
            return _cap(product[:count], soft_cap)
        logits = self.buffers.get("logits", len(layer.weight), torch.float32, rows)[:count]
        logits.copy_(product[:count])
        return _cap(logits, soft_cap)

    def _linear(self, name: str, x: torch.Tensor, layer: Layer) -> torch.Tensor:
        output = self._buffer(name, len(layer.weight))
        if layer.scales is None:
            multiply(x, layer.weight, layer.bias, output)
            return output
        count = self._num_tokens
        kind: LinearKind = "int8" if layer.weight.dtype == torch.int8 else "fp8"
        is_float32 = self.dtype == torch.float32
        config = linear_config(self.target, kind, len(layer.weight), count, is_float32=is_float32)
        quantized_linear(x[:count], layer.weight, layer.scales, output[:count], config=config, bias=layer.bias)
        return output


def _cap(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """Make logits cap * tanh(logits / cap), in place; without a cap they stay as they are."""
    return logits if cap == 0 else logits.div_(cap).tanh_().mul_(cap)
