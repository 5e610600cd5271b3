"""Records the forward pass of a model whose sequences are computed whole, and packs its weights in float32."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import cast

import torch

from octavo.gpu_worker.devices.cpu.packed_model import share_buffers
from octavo.gpu_worker.devices.cpu.recorder import Product
from octavo.gpu_worker.errors import DeviceError
from octavo.gpu_worker.ops import (
    Activation,
    EncoderModel,
    Experts,
    Heads,
    LayerNorm,
    Linear,
    Model,
    Norm,
    Ops,
    Rotary,
)
from octavo.kernels.cpu import encoder, library
from octavo.kernels.cpu.encoder import ALL_TOKENS, EncoderOp, Table
from octavo.kernels.cpu.runtime import Arena, Runtime, padded

_HEAD_MULTIPLE = 16
_END = -1  # what `hidden` and `logits` return


@dataclass(frozen=True, eq=False)
class WholeProgram:
    """What a model's forward did.

    memory       where the pointers in `ops` point
    columns      widths of the buffers that `ops` number
    output_size  columns of the hidden states
    """

    memory: Arena
    ops: list[EncoderOp]
    columns: list[int]
    output_size: int


def record_whole(model: EncoderModel | Model, runtime: Runtime) -> WholeProgram:
    """Run the model's `forward` once. The model may be dropped afterwards. Raises DeviceError."""
    recorder = _Recorder(runtime)
    end = cast(Model, model).forward(cast(Ops, recorder))
    assert end is _END, "a model's forward must return what ops.hidden or ops.logits gave it"
    columns = share_buffers(recorder.ops, recorder.columns)
    return WholeProgram(recorder.memory, recorder.ops, columns, recorder.ops[-1].columns)


class _Recorder:
    """`EncoderOps` and `Ops` whose values are numbers of `columns`, or products that whatever takes them computes.

    What a step of a decoder writes to a cache is all that there is of a sequence, so it is read where it was made.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.memory = Arena(runtime)
        self.ops: list[EncoderOp] = []
        self.columns: list[int] = []
        # Tables of positions are shared between layers. The tensors are kept so that an id stays theirs.
        self._stored: dict[int, tuple[torch.Tensor, int]] = {}

    def embed(self, table: torch.Tensor, scale: float = 1.0) -> int:
        table = table if scale == 1.0 else table.float() * scale
        return self._record(EncoderOp(kind=encoder.EMBED_SUM, words=self._table(table)), -1, table.shape[1])

    def embed_sum(self, words: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor) -> int:
        tables = [self._table(table) for table in (words, positions, segments)]
        op = EncoderOp(kind=encoder.EMBED_SUM, words=tables[0], positions=tables[1], segments=tables[2])
        return self._record(op, -1, words.shape[1])

    def layer_norm(self, x: int | Product, norm: LayerNorm) -> int:
        source = self._value(x)
        op = EncoderOp(
            kind=encoder.LAYER_NORM,
            norm_weight=self._padded(norm.weight),
            norm_bias=None if norm.bias is None else self._padded(norm.bias),
            norm_eps=norm.eps,
        )
        return self._record(op, source, self.columns[source])

    def norm(self, x: int | Product, norm: Norm) -> int:
        source = self._value(x)
        op = EncoderOp(kind=encoder.RMS_NORM, norm_weight=self._padded(norm.weight), norm_eps=norm.eps)
        return self._record(op, source, self.columns[source])

    def linear(self, x: int, linear: Linear, activation: Activation | None = None) -> int | Product:
        return Product(x, linear) if activation is None else self._product(x, linear, activation)

    def linear_residual(self, x: int, linear: Linear, residual: int) -> int:
        return self.add(residual, Product(x, linear))

    def add(self, residual: int, x: int | Product) -> int:
        if isinstance(x, Product):
            op, source = self._linear(encoder.LINEAR_RESIDUAL, x.source, x.linear), x.source
        else:
            op, source = EncoderOp(kind=encoder.ADD), x
        op.input, op.output, op.columns = source, residual, self.columns[residual]
        self.ops.append(op)
        return residual

    def add_experts(self, residual: int, x: int, experts: Experts, activation: Activation) -> int:
        del residual, x, experts, activation
        raise DeviceError(
            "device cpu computes mixtures of experts for vectors in bfloat16 only: use --dtype bfloat16, or device "
            "reference"
        )

    def gated_linear(self, x: int, gate: Linear, up: Linear, activation: Activation) -> int:
        """Both layers are one, each padded: so the halves of its rows begin where vectors do."""
        size = gate.weight.shape[0]
        both = self._record(self._linear(encoder.LINEAR, x, gate, up), x, 2 * padded(size, encoder.ROW_MULTIPLE))
        return self._record(EncoderOp(kind=encoder.GATE, activation=encoder.ACTIVATIONS[activation]), both, size)

    def rotary_write_kv(
        self,
        qkv: int | Product,
        layer: int,
        heads: Heads,
        rotary: Rotary,
        q_norm: Norm | None,
        k_norm: Norm | None,
    ) -> int:
        del layer
        return self.rotate(qkv, heads, rotary, q_norm, k_norm)

    def paged_attention(
        self,
        queries: int,
        layer: int,
        heads: Heads,
        scale: float,
        window: int,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> int:
        del layer
        if soft_cap or sinks is not None:
            raise DeviceError(
                "device cpu makes vectors of models with soft caps or sinks in bfloat16 only: use --dtype bfloat16, or "
                "device reference"
            )
        return self._attend(queries, heads, scale, window - 1 if window else ALL_TOKENS, 0)

    def logits(self, x: int, head: Linear | None, soft_cap: float = 0.0) -> int:
        del soft_cap
        assert head is None, "a model that makes logits has a cache"
        return self.hidden(x)

    def self_attention(self, qkv: int | Product, heads: Heads, scale: float, reach: int = 0) -> int:
        return self._attend(qkv, heads, scale, reach or ALL_TOKENS, reach or ALL_TOKENS)

    def hidden(self, x: int) -> int:
        self.ops.append(EncoderOp(kind=encoder.HIDDEN, input=x, output=-1, columns=self.columns[x]))
        return _END

    def rotate(
        self,
        qkv: int | Product,
        heads: Heads,
        rotary: Rotary,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
    ) -> int:
        value = self._value(qkv)
        op = EncoderOp(
            kind=encoder.ROTATE,
            cos=self._shared(rotary.cos),
            sin=self._shared(rotary.sin),
            rotary_dim=rotary.rotary_dim,
            max_positions=len(rotary.cos),
            **_head_fields(heads),
        )
        for field, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
            if norm is not None:
                if norm.weight.numel() != heads.head_dim:
                    raise DeviceError(
                        "device cpu makes no vectors with norms over all heads at once; use device reference"
                    )
                setattr(op, field, library.Norm(self._padded(norm.weight), norm.eps, heads.head_dim))
        op.input, op.output, op.columns = value, value, self.columns[value]
        self.ops.append(op)
        return value

    def _attend(self, qkv: int | Product, heads: Heads, scale: float, before: int, after: int) -> int:
        value = self._value(qkv)
        op = EncoderOp(kind=encoder.SELF_ATTENTION, scale=scale, before=before, after=after, **_head_fields(heads))
        return self._record(op, value, heads.num_heads * heads.head_dim)

    def _value(self, x: int | Product) -> int:
        """Return the number of a value, which is computed now if it is a product."""
        return self._product(x.source, x.linear, None) if isinstance(x, Product) else x

    def _product(self, x: int, linear: Linear, activation: Activation | None) -> int:
        op = self._linear(encoder.LINEAR, x, linear)
        op.activation = encoder.ACTIVATIONS[activation]
        return self._record(op, x, linear.weight.shape[0])

    def _record(self, op: EncoderOp, read: int, columns: int) -> int:
        """Append an operation whose result is a new value; return its number."""
        self.columns.append(columns)
        op.input, op.output, op.columns = read, len(self.columns) - 1, columns
        self.ops.append(op)
        return len(self.columns) - 1

    def _linear(self, kind: int, x: int, *layers: Linear) -> EncoderOp:
        """Pack layers behind each other: [out / 32][in][32] each, as gemm_f32.h says."""
        in_features = self.columns[x]
        assert all(layer.weight.shape[1] == in_features for layer in layers), (layers[0].weight.shape, in_features)
        weights, biases = [], []
        for layer in layers:
            weight = _pad_rows(layer.weight.detach().float())
            weights.append(weight.view(-1, encoder.ROW_MULTIPLE, in_features).transpose(1, 2))
            biases.append(torch.zeros(len(weight)) if layer.bias is None else _pad_rows(layer.bias.detach().float()))
        has_bias = any(layer.bias is not None for layer in layers)
        bias = self._store(torch.cat(biases)) if has_bias else None
        return EncoderOp(kind=kind, in_features=in_features, weight=self._store(torch.cat(weights)), bias=bias)

    def _table(self, table: torch.Tensor) -> Table:
        stride = padded(table.shape[1], encoder.ROW_MULTIPLE)
        rows = torch.zeros(table.shape[0], stride)
        rows[:, : table.shape[1]] = table.detach().float()
        return Table(self._store(rows), table.shape[0], stride)

    def _padded(self, values: torch.Tensor) -> int:
        return self._store(_pad_rows(values.detach().float()))

    def _shared(self, table: torch.Tensor) -> int:
        if id(table) not in self._stored:
            self._stored[id(table)] = (table, self._store(table.float()))
        return self._stored[id(table)][1]

    def _store(self, values: torch.Tensor) -> int:
        """Copy float32 values; return their address."""
        values = values.contiguous()
        address = self.memory.allocate(values.numel() * 4)
        ctypes.memmove(address, values.data_ptr(), values.numel() * 4)
        return address


def _head_fields(heads: Heads) -> dict[str, int]:
    if heads.head_dim % _HEAD_MULTIPLE:
        problem = f"heads of {heads.head_dim} dimensions are no multiple of {_HEAD_MULTIPLE}"
        raise DeviceError(f"device cpu: {problem}; use device reference")
    return {"num_heads": heads.num_heads, "num_kv_heads": heads.num_kv_heads, "head_dim": heads.head_dim}


def _pad_rows(values: torch.Tensor) -> torch.Tensor:
    """Return values with zeros behind them, up to whole blocks of their first dimension."""
    missing = -len(values) % encoder.ROW_MULTIPLE
    return torch.cat([values, values.new_zeros(missing, *values.shape[1:])])
