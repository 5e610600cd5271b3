"""Records a model's forward pass as a program of the native kernels, and packs its weights."""

from __future__ import annotations

import torch

from octavo.gpu_worker.devices.packed_model import PackedModel, PackedValue
from octavo.gpu_worker.ops import Activation, Experts, Heads, Linear, Model, Norm, Rotary
from octavo.gpu_worker.quantization import Quantization
from octavo.kernels.cpu import library
from octavo.kernels.cpu.coded_rows import CodedRows
from octavo.kernels.cpu.packing import Packer
from octavo.kernels.cpu.runtime import Arena, Runtime

_MAX_HEAD_DIM = 256
_END = -1  # what `logits` returns


# The format of a scheme's linear layers. Its head and embedding, which most tokens' choice depends on, have 8 bits.
_FORMATS = {
    Quantization.NONE: library.WEIGHT_BF16,
    Quantization.INT8: library.WEIGHT_INT8,
    Quantization.INT4: library.WEIGHT_INT4,
}


def record(model: Model, runtime: Runtime, quantization: Quantization = Quantization.NONE) -> PackedModel:
    """Run the model's `forward` once and return what it did. The model may be dropped afterwards."""
    memory = Arena(runtime)
    recorder = _Recorder(Packer(runtime, memory), model, quantization)
    end = model.forward(recorder)
    assert end is _END, "a model's forward must return what ops.logits gave it"
    ops, values = tuple(recorder.ops), tuple(recorder.values)
    return PackedModel(model.num_layers, model.heads, model.vocab_size, runtime, memory, ops, values)


class _Recorder:
    """An `Ops` whose values are numbers of `values`.

    An embedding table is held in rows; one that the head is tied to is looked up in the head's
    packed weights instead, so that it is there once. A quantised one is always packed.
    """

    def __init__(self, packer: Packer, model: Model, quantization: Quantization) -> None:
        self.ops: list[library.Op] = []
        self.values: list[PackedValue] = []
        self._packer = packer
        self._format = _FORMATS[quantization]
        self._head_format = library.WEIGHT_BF16 if quantization is Quantization.NONE else library.WEIGHT_INT8
        self._heads = model.heads
        self._num_layers = model.num_layers
        self._vocab_size = model.vocab_size
        self._embeddings: list[tuple[library.Op, torch.Tensor]] = []  # to be stored once the head is known
        # Rotary tables are shared between layers. The tensors are kept so that an id stays theirs.
        self._rotary_tables: dict[int, tuple[torch.Tensor, int]] = {}
        heads = model.heads
        assert heads.head_dim % 16 == 0, f"head_dim {heads.head_dim} is not a multiple of 16"
        assert heads.head_dim <= _MAX_HEAD_DIM, f"head_dim {heads.head_dim} is above {_MAX_HEAD_DIM}"
        assert heads.num_heads % heads.num_kv_heads == 0, heads

    def embed(self, table: torch.Tensor) -> int:
        assert table.shape[0] >= self._vocab_size, f"embedding {tuple(table.shape)}, vocab_size {self._vocab_size}"
        op = library.Op(kind=library.EMBED, vocab_size=table.shape[0])
        self._embeddings.append((op, table))
        return self._record(op, None, PackedValue(table.shape[1], is_float=True))

    def norm_linear(self, x: int, norm: Norm, linear: Linear) -> int:
        op = library.Op(
            kind=library.NORM_LINEAR, norm=self._norm(norm, x), linear=self._linear(linear, x, self._format)
        )
        return self._record(op, x, PackedValue(linear.weight.shape[0], is_float=True))

    def rotary_write_kv(
        self, qkv: int, layer: int, heads: Heads, rotary: Rotary, q_norm: Norm | None, k_norm: Norm | None
    ) -> int:
        self._check_layer(layer, heads)
        columns = self.values[qkv].columns
        assert columns == (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim, (columns, heads)
        assert rotary.rotary_dim in range(0, heads.head_dim + 1, 2), rotary.rotary_dim
        assert rotary.cos.shape == rotary.sin.shape == (len(rotary.cos), rotary.rotary_dim // 2), rotary.cos.shape
        op = library.Op(
            kind=library.ROTARY_WRITE_KV,
            cos=self._rotary_table(rotary.cos),
            sin=self._rotary_table(rotary.sin),
            rotary_dim=rotary.rotary_dim,
            max_positions=len(rotary.cos),
            **self._attention_fields(layer, heads),
        )
        if q_norm is not None:
            op.q_norm = self._head_norm(q_norm, heads)
        if k_norm is not None:
            op.k_norm = self._head_norm(k_norm, heads)
        return self._record(op, qkv, PackedValue(heads.num_heads * heads.head_dim, is_float=False))

    def paged_attention(self, queries: int, layer: int, heads: Heads, scale: float, window: int) -> int:
        self._check_layer(layer, heads)
        columns = self.values[queries].columns
        assert columns == heads.num_heads * heads.head_dim, (columns, heads)
        op = library.Op(
            kind=library.PAGED_ATTENTION, scale=scale, window=window, **self._attention_fields(layer, heads)
        )
        return self._record(op, queries, PackedValue(columns, is_float=False))

    def linear_residual(self, x: int, linear: Linear, residual: int) -> int:
        assert not self.values[x].is_float, self.values[x]
        assert self.values[residual] == PackedValue(linear.weight.shape[0], is_float=True), self.values[residual]
        packed = self._linear(linear, x, self._format)
        op = library.Op(kind=library.LINEAR_RESIDUAL, linear=packed, input=x, output=residual)
        self.ops.append(op)
        return residual

    def norm_gated_linear(self, x: int, norm: Norm, gate: Linear, up: Linear, activation: Activation) -> int:
        assert gate.weight.shape[1] == self.values[x].columns, (tuple(gate.weight.shape), self.values[x])
        op = library.Op(
            kind=library.NORM_GATED_LINEAR,
            norm=self._norm(norm, x),
            linear=self._packer.pack_gated(gate.weight, up.weight, gate.bias, up.bias, self._format),
            activation=library.ACTIVATIONS[activation],
        )
        return self._record(op, x, PackedValue(gate.weight.shape[0], is_float=False))

    def norm_experts_residual(self, x: int, norm: Norm, experts: Experts, activation: Activation) -> int:
        assert experts.gate[0].shape[1] == self.values[x].columns, (tuple(experts.gate[0].shape), self.values[x])
        num_logits = experts.num_routed + (experts.num_shared > 0)
        assert experts.router.shape == (num_logits, self.values[x].columns), (
            tuple(experts.router.shape),
            experts.num_routed,
        )
        assert 0 < experts.num_chosen <= experts.num_routed, (experts.num_chosen, experts.num_routed)
        gated, down = self._packer.pack_experts(experts.gate, experts.up, experts.down, self._format)
        op = library.Op(
            kind=library.NORM_EXPERTS_RESIDUAL,
            norm=self._norm(norm, x),
            linear=self._linear(Linear(experts.router), x, library.WEIGHT_BF16),
            activation=library.ACTIVATIONS[activation],
            experts=library.Experts(
                gated, down, len(experts.gate), experts.num_chosen, experts.num_shared, experts.is_normalized
            ),
        )
        op.input = op.output = x
        self.ops.append(op)
        return x

    def logits(self, x: int, norm: Norm, head: Linear | None) -> int:
        op = library.Op(kind=library.HIDDEN, norm=self._norm(norm, x), input=x, output=_END)
        if head is not None:
            assert head.weight.shape[0] == self._vocab_size, (tuple(head.weight.shape), self._vocab_size)
            op.kind, op.linear = library.LOGITS, self._linear(head, x, self._head_format)
        self.ops.append(op)
        for embedding, table in self._embeddings:
            if head is not None and _is_same(table, head.weight):
                embedding.linear = op.linear
            elif self._head_format != library.WEIGHT_BF16:
                embedding.linear = self._packer.pack_linear(table, None, self._head_format)
            else:
                embedding.table, embedding.table_stride = self._packer.store_rows(table)
        self._embeddings.clear()
        return _END

    def _record(self, op: library.Op, read: int | None, written: PackedValue) -> int:
        op.input = -1 if read is None else read
        op.output = len(self.values)
        self.ops.append(op)
        self.values.append(written)
        return len(self.values) - 1

    def _norm(self, norm: Norm, x: int) -> library.Norm:
        assert self.values[x] == PackedValue(norm.weight.numel(), is_float=True), (norm.weight.shape, self.values[x])
        return self._packer.store_norm(norm.weight, norm.eps)

    def _head_norm(self, norm: Norm, heads: Heads) -> library.Norm:
        assert norm.weight.shape == (heads.head_dim,), (tuple(norm.weight.shape), heads)
        return self._packer.store_norm(norm.weight, norm.eps)

    def _linear(self, linear: Linear, x: int, weight_format: int) -> library.Linear:
        assert linear.weight.shape[1] == self.values[x].columns, (tuple(linear.weight.shape), self.values[x])
        assert linear.bias is None or linear.bias.shape == linear.weight.shape[:1], linear.bias
        return self._packer.pack_linear(linear.weight, linear.bias, weight_format)

    def _rotary_table(self, table: torch.Tensor) -> int:
        if id(table) not in self._rotary_tables:
            self._rotary_tables[id(table)] = (table, self._packer.store_floats(table))
        return self._rotary_tables[id(table)][1]

    def _check_layer(self, layer: int, heads: Heads) -> None:
        assert 0 <= layer < self._num_layers, f"layer {layer} of {self._num_layers}"
        assert heads == self._heads, f"layer {layer} has {heads}, the KV cache is laid out for {self._heads}"

    @staticmethod
    def _attention_fields(layer: int, heads: Heads) -> dict[str, int]:
        return {
            "layer": layer,
            "num_heads": heads.num_heads,
            "num_kv_heads": heads.num_kv_heads,
            "head_dim": heads.head_dim,
        }


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if isinstance(one, CodedRows) or isinstance(other, CodedRows):
        return one is other
    return (one.data_ptr(), one.dtype, one.shape, one.stride()) == (
        other.data_ptr(),
        other.dtype,
        other.shape,
        other.stride(),
    )
