"""Records a model's forward pass as a program of the native kernels, and packs its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo.gpu_worker.devices.cpu.packed_model import PackedModel, PackedValue, check_head_linear, check_heads
from octavo.gpu_worker.ops import Activation, Experts, HeadLinear, Heads, Linear, Model, Module, Norm, Rotary
from octavo.gpu_worker.quantization import Quantization
from octavo.kernels.cpu import library
from octavo.kernels.cpu.coded_rows import CodedRows, shapes_of
from octavo.kernels.cpu.packing import Packer
from octavo.kernels.cpu.runtime import Arena, Runtime

_END = -1  # what `logits` returns
_LOG2_E = 1.4426950408889634


# The format of a scheme's linear layers; without a scheme, of those that have no codes of their own. The head and the
# embedding of a scheme, which most tokens' choice depends on, have 8 bits.
_FORMATS = {
    Quantization.NONE: library.WEIGHT_BF16,
    Quantization.INT8: library.WEIGHT_INT8,
    Quantization.INT4: library.WEIGHT_INT4,
}


def record(model: Model, runtime: Runtime, quantization: Quantization = Quantization.NONE) -> PackedModel:
    """Run the model's `forward` once and return what it did; the model may be dropped then. Raises DeviceError."""
    check_heads(model.heads)
    memory = Arena(runtime)
    recorder = _Recorder(Packer(runtime, memory), model, quantization)
    end = model.forward(recorder)
    assert end is _END, "a model's forward must return what ops.logits gave it"
    ops, values = tuple(recorder.ops), tuple(recorder.values)
    modules = recorder.modules
    return PackedModel(model.num_layers, model.heads, model.vocab_size, runtime, memory, ops, values, modules)


@dataclass(frozen=True)
class _Normed:
    """The norm of value `source`, which whatever reads it computes for itself."""

    source: int
    norm: Norm
    num_writes: int  # to `source` so far


@dataclass(frozen=True)
class Product:
    """A linear layer of value `source`, which whatever takes it computes."""

    source: int
    linear: Linear


class _Recorder:
    """An `Ops` whose values are numbers of `values`, or what is still to be joined with the operation that reads it.

    An embedding table is held in rows; one that the head is tied to is looked up in the head's
    packed weights instead, so that it is there once. A quantised one is always packed.
    """

    def __init__(self, packer: Packer, model: Model, quantization: Quantization) -> None:
        self.ops: list[library.Op] = []
        self.values: list[PackedValue] = []
        self.modules: dict[int, tuple[Module, ...]] = {}
        self._num_writes: list[int] = []  # to each value, after the first
        self._norms: dict[tuple[int, float], tuple[Norm, library.Norm]] = {}  # stored once, whoever reads them
        self._packer = packer
        self._format = _FORMATS[quantization]
        self._head_format = library.WEIGHT_BF16 if quantization is Quantization.NONE else library.WEIGHT_INT8
        self._keeps_codes = quantization is Quantization.NONE
        self._heads = model.heads
        self._num_layers = model.num_layers
        self._vocab_size = model.vocab_size
        self._embeddings: list[tuple[library.Op, torch.Tensor]] = []  # to be stored once the head is known
        # Rotary tables are shared between layers. The tensors are kept so that an id stays theirs.
        self._rotary_tables: dict[int, tuple[torch.Tensor, int]] = {}
        assert model.heads.num_heads % model.heads.num_kv_heads == 0, model.heads

    def embed(self, table: torch.Tensor, scale: float = 1.0) -> int:
        assert table.shape[0] >= self._vocab_size, f"embedding {tuple(table.shape)}, vocab_size {self._vocab_size}"
        op = library.Op(kind=library.EMBED, vocab_size=table.shape[0], scale=scale)
        self._embeddings.append((op, table))
        return self._record(op, None, PackedValue(table.shape[1], is_float=True))

    def norm(self, x: int | Product, norm: Norm) -> _Normed:
        source = self._float(x) if isinstance(x, Product) else x
        assert self.values[source] == PackedValue(norm.weight.numel(), is_float=True), (
            norm.weight.shape,
            self.values[source],
        )
        return _Normed(source, norm, self._num_writes[source])

    def linear(self, x: int | _Normed, linear: Linear) -> int | Product:
        if not isinstance(x, _Normed):
            assert not self.values[x].is_float, self.values[x]
            return Product(x, linear)
        self._next_op_adapts(linear)
        op = library.Op(kind=library.NORM_LINEAR, linear=self._linear(linear, x.source))
        return self._record_normed(op, x, PackedValue(linear.weight.shape[0], is_float=True))

    def gated_linear(self, x: _Normed, gate: Linear, up: Linear, activation: Activation) -> int:
        assert gate.weight.shape[1] == self.values[x.source].columns, (tuple(gate.weight.shape), x)
        self._next_op_adapts(gate, up)
        op = library.Op(
            kind=library.NORM_GATED_LINEAR,
            linear=self._packer.pack_gated(
                gate.weight, up.weight, gate.bias, up.bias, self._format_of(gate.weight, up.weight)
            ),
            activation=library.ACTIVATIONS[activation],
        )
        return self._record_normed(op, x, PackedValue(gate.weight.shape[0], is_float=False))

    def add(self, residual: int, x: Product | _Normed) -> int:
        if isinstance(x, _Normed):
            assert self.values[x.source] == self.values[residual], (self.values[x.source], self.values[residual])
            op = library.Op(kind=library.NORM_RESIDUAL)
            self._set_norm(op, x)
        else:
            assert self.values[residual] == PackedValue(x.linear.weight.shape[0], is_float=True), self.values[residual]
            self._next_op_adapts(x.linear)
            op = library.Op(kind=library.LINEAR_RESIDUAL, linear=self._linear(x.linear, x.source))
        return self._record_sum(op, x.source, residual)

    def add_experts(self, residual: int, x: _Normed, experts: Experts, activation: Activation) -> int:
        assert x.source == residual, "the native kernels add experts to what they are the norm of"
        columns = self.values[residual].columns
        assert experts.gate[0].shape[1] == columns, (tuple(experts.gate[0].shape), columns)
        num_logits = experts.num_routed + experts.has_shared_logit
        assert experts.router.shape == (num_logits, columns), (tuple(experts.router.shape), experts.num_routed)
        assert 0 < experts.num_chosen <= experts.num_routed, (experts.num_chosen, experts.num_routed)
        routing = experts.routing
        assert experts.bias is None or experts.bias.shape == (experts.num_routed,), experts.bias.shape
        formats = self._format_of(*experts.gate, *experts.up), self._format_of(*experts.down)
        gated, down = self._packer.pack_experts(experts.gate, experts.up, experts.down, experts.biases, *formats)
        op = library.Op(
            kind=library.NORM_EXPERTS_RESIDUAL,
            linear=self._linear(Linear(experts.router, experts.router_bias), residual, library.WEIGHT_BF16),
            activation=library.ACTIVATIONS[activation],
            experts=library.Experts(
                gated,
                down,
                len(experts.gate),
                experts.num_chosen,
                experts.num_shared,
                experts.is_normalized,
                None if experts.bias is None else self._packer.store_floats(experts.bias),
                routing.scores == "sigmoid",
                routing.num_groups,
                routing.num_chosen_groups,
                routing.num_best,
                routing.scale,
                routing.has_shared_gate,
            ),
        )
        self._set_norm(op, x)
        return self._record_sum(op, residual, residual)

    def rotary_write_kv(
        self, qkv: int, layer: int, heads: Heads, rotary: Rotary, q_norm: Norm | None, k_norm: Norm | None
    ) -> int:
        self._check_layer(layer, heads)
        columns = self.values[qkv].columns
        assert columns == (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim, (columns, heads)
        op = library.Op(kind=library.ROTARY_WRITE_KV, **self._attention_fields(layer, heads))
        self._set_rotary(op, rotary, heads.head_dim)
        if q_norm is not None:
            op.q_norm = self._head_norm(q_norm, heads.num_heads, heads.head_dim)
        if k_norm is not None:
            op.k_norm = self._head_norm(k_norm, heads.num_kv_heads, heads.head_dim)
        return self._record(op, qkv, PackedValue(heads.num_heads * heads.head_dim, is_float=False))

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
        self._check_layer(layer, heads)
        columns = self.values[queries].columns
        assert columns == heads.num_heads * heads.head_dim, (columns, heads)
        assert sinks is None or sinks.shape == (heads.num_heads,), (sinks.shape, heads)
        op = library.Op(
            kind=library.PAGED_ATTENTION,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            sinks=None if sinks is None else self._packer.store_floats(sinks.float() * _LOG2_E),
            **self._attention_fields(layer, heads),
        )
        return self._record(op, queries, PackedValue(heads.num_heads * heads.value_dim, is_float=False))

    def rotate_queries(self, queries: int, num_heads: int, rotary: Rotary) -> int:
        columns = self.values[queries].columns
        op = library.Op(kind=library.ROTATE_QUERIES, num_heads=num_heads, head_dim=columns // num_heads)
        self._set_rotary(op, rotary, columns // num_heads)
        return self._record(op, queries, PackedValue(columns, is_float=False))

    def write_latent(self, latent: int, layer: int, heads: Heads, rotary: Rotary, norm: Norm) -> None:
        self._check_layer(layer, heads)
        assert self.values[latent] == PackedValue(heads.head_dim, is_float=True), (self.values[latent], heads)
        assert norm.weight.shape == (heads.latent_dim,), norm.weight.shape
        op = library.Op(kind=library.WRITE_LATENT, input=latent, output=-1, **self._attention_fields(layer, heads))
        op.k_norm = self._packer.store_norm(norm.weight, norm.eps)
        self._set_rotary(op, rotary, heads.head_dim - heads.latent_dim)
        self.ops.append(op)

    def head_linear(self, x: int, linear: HeadLinear) -> int:
        num_heads, out_features, in_features = linear.weight.shape
        head_dim = self.values[x].columns // num_heads
        check_head_linear(in_features, out_features, head_dim)
        op = library.Op(kind=library.HEAD_LINEAR, num_heads=num_heads, head_dim=head_dim)
        op.linear = self._packer.pack_heads(linear.weight, library.WEIGHT_BF16)
        columns = num_heads * (head_dim - in_features + out_features)
        return self._record(op, x, PackedValue(columns, is_float=False))

    def logits(self, x: _Normed, head: Linear | None, soft_cap: float = 0.0) -> int:
        op = library.Op(kind=library.HIDDEN, input=x.source, output=_END)
        self._set_norm(op, x)
        if head is not None:
            assert head.weight.shape[0] == self._vocab_size, (tuple(head.weight.shape), self._vocab_size)
            weight_format = self._format_of(head.weight, otherwise=self._head_format)
            op.kind, op.linear = library.LOGITS, self._linear(head, x.source, weight_format)
            op.soft_cap = soft_cap
        self.ops.append(op)
        for embedding, table in self._embeddings:
            if head is not None and _is_same(table, head.weight):
                embedding.linear = op.linear
            elif (table_format := self._format_of(table, otherwise=self._head_format)) != library.WEIGHT_BF16:
                embedding.linear = self._packer.pack_linear(table, None, table_format)
            else:
                embedding.table, embedding.table_stride = self._packer.store_rows(table)
        self._embeddings.clear()
        return _END

    def _next_op_adapts(self, *layers: Linear) -> None:
        """Remember what the layers of the operation that is recorded next were joined of."""
        modules = tuple(module for layer in layers for module in layer.modules)
        if any(module.name for module in modules):
            self.modules[len(self.ops)] = modules

    def _record(self, op: library.Op, read: int | None, written: PackedValue) -> int:
        op.input = -1 if read is None else read
        op.output = len(self.values)
        self.ops.append(op)
        self.values.append(written)
        self._num_writes.append(0)
        return len(self.values) - 1

    def _record_normed(self, op: library.Op, x: _Normed, written: PackedValue) -> int:
        """Append an operation that reads a norm."""
        self._set_norm(op, x)
        return self._record(op, x.source, written)

    def _record_sum(self, op: library.Op, read: int, residual: int) -> int:
        """Append an operation that adds to a residual."""
        op.input, op.output = read, residual
        self._num_writes[residual] += 1
        self.ops.append(op)
        return residual

    def _float(self, product: Product) -> int:
        """Have a linear layer computed into a value of its own."""
        self._next_op_adapts(product.linear)
        op = library.Op(kind=library.LINEAR, linear=self._linear(product.linear, product.source))
        return self._record(op, product.source, PackedValue(product.linear.weight.shape[0], is_float=True))

    def _set_norm(self, op: library.Op, x: _Normed) -> None:
        assert self._num_writes[x.source] == x.num_writes, "what the norm was of has been added to"
        key = id(x.norm.weight), x.norm.eps
        if key not in self._norms:
            self._norms[key] = (x.norm, self._packer.store_norm(x.norm.weight, x.norm.eps))
        op.norm = self._norms[key][1]

    def _head_norm(self, norm: Norm, count: int, head_dim: int) -> library.Norm:
        assert norm.weight.shape in ((head_dim,), (count * head_dim,)), (tuple(norm.weight.shape), count, head_dim)
        return self._packer.store_norm(norm.weight, norm.eps)

    def _format_of(self, *matrices: torch.Tensor, otherwise: int | None = None) -> int:
        """Return the format of a layer: the smallest that holds the codes of all matrices, if all have some."""
        shapes = shapes_of(matrices) if self._keeps_codes else None
        if shapes is not None:
            return library.format_of(shapes)
        return self._format if otherwise is None else otherwise

    def _linear(self, linear: Linear, x: int, weight_format: int | None = None) -> library.Linear:
        assert linear.weight.shape[1] == self.values[x].columns, (tuple(linear.weight.shape), self.values[x])
        assert linear.bias is None or linear.bias.shape == linear.weight.shape[:1], linear.bias
        if weight_format is None:
            weight_format = self._format_of(linear.weight)
        return self._packer.pack_linear(linear.weight, linear.bias, weight_format)

    def _set_rotary(self, op: library.Op, rotary: Rotary, most_dims: int) -> None:
        assert rotary.rotary_dim in range(0, most_dims + 1, 2), rotary.rotary_dim
        assert rotary.cos.shape == rotary.sin.shape == (len(rotary.cos), rotary.rotary_dim // 2), rotary.cos.shape
        op.cos, op.sin = self._rotary_table(rotary.cos), self._rotary_table(rotary.sin)
        op.rotary_dim, op.max_positions = rotary.rotary_dim, len(rotary.cos)

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
            "latent_dim": heads.latent_dim,
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
