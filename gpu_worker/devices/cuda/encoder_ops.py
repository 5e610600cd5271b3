# ruff: noqa: D102 - the protocol says what a method does
"""The operations of an encoder on the `cuda` device, as `ops.py` has those of a decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo.gpu_worker.devices.cuda.ops import Residual
from octavo.gpu_worker.devices.cuda.products import multiply, padded_rows
from octavo.gpu_worker.devices.cuda.weights import Buffers, Weights
from octavo.gpu_worker.ops import Activation, Heads, LayerNorm, Linear, Norm, Rotary
from octavo.kernels.configs import AttentionConfig
from octavo.kernels.encoder_attention import encoder_attention
from octavo.kernels.layer_norm import add_layer_norm


@dataclass(frozen=True)
class EncoderTensors:
    """A step on the device; S sequences, T tokens. All int32.

    token_ids, positions, segments  [T]
    query_start_loc  [S + 1]
    work             the tiles of attention, `encoder_work`
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    query_start_loc: torch.Tensor
    work: torch.Tensor


@dataclass(frozen=True)
class Normed:
    """A norm [T, hidden_size]: in float32, the residual that the next update is added to; and as products read it."""

    stream: torch.Tensor
    rounded: torch.Tensor


@dataclass
class CudaEncoderOps:
    """`EncoderOps` over the tensors of one step. Buffers are shared by all steps, as in `CudaOps`."""

    step: EncoderTensors
    weights: Weights
    buffers: Buffers
    attention: AttentionConfig
    dtype: torch.dtype

    @property
    def _num_tokens(self) -> int:
        return len(self.step.token_ids)

    def _buffer(self, name: str, width: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.buffers.get(name, width, dtype or self.dtype)[: padded_rows(self._num_tokens)]

    def embed_sum(self, words: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor) -> Residual:
        count, width = self._num_tokens, words.shape[1]
        rows = self._buffer("rounded", width)[:count]
        stream = self._buffer("residual", width, torch.float32)
        stream[:count].zero_()
        segment_ids = self.step.segments.clamp_(max=len(segments) - 1)
        for table, ids in ((positions, self.step.positions), (segments, segment_ids), (words, self.step.token_ids)):
            torch.index_select(self.weights.matrix(table), 0, ids, out=rows)
            stream[:count].add_(rows)
        return Residual(stream)

    def layer_norm(self, x: Residual, norm: LayerNorm) -> Normed:
        count = self._num_tokens
        rounded = self._buffer("rounded", x.stream.shape[1])
        add_layer_norm(
            x.stream[:count],
            None if x.update is None else x.update[:count],
            self.weights.matrix(norm.weight),
            None if norm.bias is None else self.weights.matrix(norm.bias),
            rounded[:count],
            norm.eps,
        )
        return Normed(x.stream, rounded)

    def linear(self, x: Normed, linear: Linear, activation: Activation | None = None) -> torch.Tensor:
        output = self._product("linear" if activation is None else "inner", x.rounded, linear)
        match activation:  # torch's, in place: they compute in float32 and round once
            case "gelu":
                torch.ops.aten.gelu_(output)
            case "gelu_tanh":
                torch.ops.aten.gelu_(output, approximate="tanh")
            case "silu":
                torch.nn.functional.silu(output, inplace=True)
        return output

    def linear_residual(self, x: torch.Tensor, linear: Linear, residual: Normed) -> Residual:
        return Residual(residual.stream, self._product("update", x, linear))

    def self_attention(self, qkv: torch.Tensor, heads: Heads, scale: float, reach: int = 0) -> torch.Tensor:
        assert not reach, "load_for_device refuses models with local attention"
        count = self._num_tokens
        attended = self._buffer("attended", heads.num_heads * heads.head_dim)
        encoder_attention(
            qkv[:count].view(count, 3, heads.num_heads, heads.head_dim),
            self.step.work,
            self.step.query_start_loc,
            attended[:count].view(count, heads.num_heads, heads.head_dim),
            config=self.attention,
            scale=scale,
        )
        return attended

    def embed(self, table: torch.Tensor) -> Residual:
        raise NotImplementedError("load_for_device refuses the models that need it; so with the next two")

    def gated_linear(self, x: Normed, gate: Linear, up: Linear, activation: Activation) -> torch.Tensor:
        raise NotImplementedError

    def rotate(
        self,
        qkv: torch.Tensor,
        heads: Heads,
        rotary: Rotary,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
    ) -> torch.Tensor:
        raise NotImplementedError

    def hidden(self, x: Normed) -> torch.Tensor:
        """Return x of all tokens, [T, hidden_size] float32: the pooling chooses."""
        return x.stream[: self._num_tokens]

    def _product(self, name: str, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        layer = self.weights.layer(linear)
        output = self._buffer(name, len(layer.weight))
        multiply(x, layer.weight, layer.bias, output)
        return output
