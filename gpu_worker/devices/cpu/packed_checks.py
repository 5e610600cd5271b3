"""Checks a program that was read from a file: nothing in it makes the native kernels leave the memory they are given.

The kernels believe a program. One that the recorder made fits together, by the recorder's own checks; these are the
same ones, with the place of each piece of weights in the file.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence

from octavo.gpu_worker.devices.cpu.packed_model import MAX_LATENT_HEAD_DIM, PackedValue, check_heads
from octavo.gpu_worker.errors import DeviceError
from octavo.gpu_worker.ops import Heads, Module
from octavo.kernels.cpu import library
from octavo.kernels.cpu.runtime import BLOCK_COLUMNS, GATED_COLUMNS, Runtime, padded

ALIGNMENT = 64  # of each piece of weights
_MAX_SIZE = (1 << 31) - 1 - ALIGNMENT  # sizes are int32, and are rounded up
_ATTENTION = {"layer", "num_heads", "num_kv_heads", "head_dim", "latent_dim"}
_ROTARY = {"cos", "sin", "rotary_dim", "max_positions"}
# The fields that each kind of operation has, besides its kind, input and output; all others are zero.
_FIELDS: dict[int, set[str]] = {
    library.EMBED: {"vocab_size", "table", "table_stride", "linear", "scale"},
    library.NORM_LINEAR: {"norm", "linear"},
    library.ROTARY_WRITE_KV: {*_ATTENTION, *_ROTARY, "q_norm", "k_norm"},
    library.ROTATE_QUERIES: {*_ROTARY, "num_heads", "head_dim"},
    library.WRITE_LATENT: {*_ATTENTION, *_ROTARY, "k_norm"},
    library.HEAD_LINEAR: {"linear", "num_heads", "head_dim"},
    library.PAGED_ATTENTION: {*_ATTENTION, "scale", "window", "soft_cap", "sinks"},
    library.LINEAR_RESIDUAL: {"linear"},
    library.LINEAR: {"linear"},
    library.NORM_RESIDUAL: {"norm"},
    library.NORM_GATED_LINEAR: {"norm", "linear", "activation"},
    library.NORM_EXPERTS_RESIDUAL: {"norm", "linear", "activation", "experts"},
    library.LOGITS: {"norm", "linear", "soft_cap"},
    library.HIDDEN: {"norm"},
}
_ADD_TO_OUTPUT = (library.LINEAR_RESIDUAL, library.NORM_RESIDUAL, library.NORM_EXPERTS_RESIDUAL)
_LAST = (library.LOGITS, library.HIDDEN)
_ADAPTED = (library.NORM_LINEAR, library.NORM_GATED_LINEAR, library.LINEAR, library.LINEAR_RESIDUAL)


class ProgramError(ValueError):
    """A program that no recorder makes."""


def check_program(
    ops: Sequence[library.Op],
    values: Sequence[PackedValue],
    num_layers: int,
    heads: Heads,
    vocab_size: int,
    num_bytes: int,
    runtime: Runtime,
) -> None:
    """Raise ProgramError if a program cannot run in its memory.

    ops        with offsets in place of pointers, plus one: 0 stays null
    num_bytes  of the weights that the offsets are in
    """
    sizes = (num_layers, heads.num_heads, heads.num_kv_heads, heads.head_dim, vocab_size, heads.value_dim)
    _check(all(type(size) is int and 1 <= size <= _MAX_SIZE for size in sizes), f"sizes {sizes}")
    try:
        check_heads(heads)
    except DeviceError as error:
        raise ProgramError(str(error)) from error
    _check(heads.value_dim <= heads.head_dim, f"{heads}")
    _check(heads.latent_dim == 0 or heads.num_kv_heads == 1, f"{heads}")
    _check(heads.num_heads % heads.num_kv_heads == 0, f"{heads}")
    for value in values:
        _check(type(value.columns) is int and 1 <= value.columns <= _MAX_SIZE, f"{value}")
        _check(type(value.is_float) is bool, f"{value}")
    _check(bool(ops) and ops[-1].kind in _LAST, "its last operation gives no result")
    checks = _Checks(values, num_layers, heads, vocab_size, num_bytes, runtime)
    for index, op in enumerate(ops):
        try:
            checks.check(op, is_last=index == len(ops) - 1)
        except ProgramError as error:
            raise ProgramError(f"operation {index}, {library.PROFILE_NAMES.get(op.kind, op.kind)}: {error}") from None
    _check(any(op.kind in (library.ROTARY_WRITE_KV, library.WRITE_LATENT) for op in ops), "has no layer")
    _check(checks.num_written == len(values), f"{checks.num_written} of {len(values)} values are written")


def check_modules(ops: Sequence[library.Op], modules: Mapping[int, tuple[Module, ...]]) -> None:
    """Raise ProgramError if modules are not what the linear layers of a program, which is right, were joined of."""
    for number, of_op in modules.items():
        _check(type(number) is int and 0 <= number < len(ops), f"modules of operation {number}")
        op, sizes = ops[number], [module.out_features for module in of_op]
        _check(all(type(size) is int and size > 0 for size in sizes), f"modules of sizes {sizes}")
        _check(all(isinstance(module.name, str) for module in of_op), f"names of modules of operation {number}")
        out_features = int(op.linear.out_features)
        if op.kind == library.NORM_GATED_LINEAR:
            fits = sizes == [out_features] * 2
        else:
            fits = sum(sizes) == out_features and not any(size % GATED_COLUMNS for size in sizes[:-1])
        _check(op.kind in _ADAPTED and fits, f"modules of sizes {sizes} in operation {number}")


def _check(is_right: bool, what: str) -> None:
    if not is_right:
        raise ProgramError(what)


class _Checks:
    """The checks of one program's operations, in order. `num_written` values are there before the next one."""

    def __init__(
        self,
        values: Sequence[PackedValue],
        num_layers: int,
        heads: Heads,
        vocab_size: int,
        num_bytes: int,
        runtime: Runtime,
    ) -> None:
        self.num_written = 0
        self._values = values
        self._num_layers = num_layers
        self._heads = heads
        self._vocab_size = vocab_size
        self._num_bytes = num_bytes
        self._packed_size = runtime.library.octavo_packed_weight_size
        self._formats = {library.WEIGHT_BF16, *library.CODE_FORMATS}
        if runtime.reads_compressed:
            self._formats.add(library.WEIGHT_COMPRESSED)

    def check(self, op: library.Op, *, is_last: bool) -> None:
        """Check an operation after those before it."""
        _check(op.kind in _FIELDS and (op.kind in _LAST) == is_last, "is not one of a program there")
        unused = [
            name
            for name, _ in op._fields_
            if name not in _FIELDS[op.kind] and name not in ("kind", "input", "output") and _is_set(getattr(op, name))
        ]
        _check(not unused, f"sets {', '.join(unused)}")
        read = None if op.kind == library.EMBED else self._written(op.input)
        written = None if is_last or op.kind == library.WRITE_LATENT else self._output(op)
        _check(read is not None or op.input == -1, f"reads {op.input}")
        _check(written is not None or op.output == -1, f"writes {op.output}")
        if op.kind == library.EMBED:
            self._embed(op, self._is(written, is_float=True))
        elif op.kind == library.ROTARY_WRITE_KV:
            self._rotary(op, self._is(read, is_float=True), self._is(written, is_float=False))
        elif op.kind == library.PAGED_ATTENTION:
            self._attention_fields(op)
            sizes = [self._heads.num_heads * dim for dim in (self._heads.head_dim, self._heads.value_dim)]
            _check([self._is(read, is_float=False), self._is(written, is_float=False)] == sizes, "columns")
            _check(op.window >= 0 and math.isfinite(op.scale), f"window {op.window}, scale {op.scale}")
            self._soft_cap(op)
            if op.sinks:
                self._piece(op.sinks, op.num_heads * 4)
        elif op.kind == library.WRITE_LATENT:
            self._attention_fields(op)
            _check(self._is(read, is_float=True) == self._heads.head_dim and self._heads.latent_dim > 0, "no latent")
            self._norm(op.k_norm, self._heads.latent_dim)
            self._rotary_tables(op, self._heads.head_dim - self._heads.latent_dim)
        elif op.kind == library.ROTATE_QUERIES:
            columns = self._is(read, is_float=True)
            self._heads_of_row(op, columns)
            _check(self._is(written, is_float=False) == columns, f"{columns} columns become others")
            self._rotary_tables(op, op.head_dim)
        elif op.kind == library.HEAD_LINEAR:
            self._head_linear(op, self._is(read, is_float=False), self._is(written, is_float=False))
        elif op.kind in (library.LINEAR, library.LINEAR_RESIDUAL):
            self._linear(op.linear, self._is(read, is_float=False), self._is(written, is_float=True))
        else:
            self._normed(op, self._is(read, is_float=True), written)

    def _normed(self, op: library.Op, columns: int, written: PackedValue | None) -> None:
        """Check an operation that begins with a norm."""
        self._norm(op.norm, columns)
        _check(op.activation in library.ACTIVATIONS.values(), f"activation {op.activation}")
        if op.kind == library.NORM_LINEAR:
            self._linear(op.linear, columns, self._is(written, is_float=True))
        elif op.kind == library.NORM_RESIDUAL:
            _check(self._is(written, is_float=True) == columns, "adds to a residual of another width")
        elif op.kind == library.NORM_GATED_LINEAR:
            self._gated(op.linear, columns, self._is(written, is_float=False), 1)
        elif op.kind == library.LOGITS:
            self._linear(op.linear, columns, self._vocab_size)
            self._soft_cap(op)
        elif op.kind == library.NORM_EXPERTS_RESIDUAL:
            _check(op.input == op.output, "does not add to what it reads")
            self._experts(op, columns)

    @staticmethod
    def _soft_cap(op: library.Op) -> None:
        _check(0 <= op.soft_cap < math.inf, f"a soft cap of {op.soft_cap}")

    def _written(self, number: int) -> PackedValue:
        _check(0 <= number < self.num_written, f"reads value {number} of {self.num_written}")
        return self._values[number]

    def _output(self, op: library.Op) -> PackedValue:
        if op.kind in _ADD_TO_OUTPUT:
            return self._written(op.output)
        number = self.num_written
        _check(op.output == number < len(self._values), f"writes value {op.output} after {number}")
        self.num_written += 1
        return self._values[number]

    @staticmethod
    def _is(value: PackedValue | None, *, is_float: bool) -> int:
        """Return a value's columns."""
        _check(value is not None and value.is_float is is_float, "reads or writes a value of another kind")
        assert value is not None
        return value.columns

    def _piece(self, pointer: int | None, num_bytes: int) -> None:
        offset = (pointer or 0) - 1
        is_inside = 0 <= offset <= self._num_bytes - num_bytes and offset % ALIGNMENT == 0
        _check(is_inside, f"{num_bytes} bytes at {offset} of {self._num_bytes}")

    def _norm(self, norm: library.Norm, size: int) -> None:
        _check(norm.size == size and math.isfinite(norm.eps), f"a norm of {norm.size} for {size}")
        self._piece(norm.weight, padded(size, BLOCK_COLUMNS) * 4)

    def _linear(self, linear: library.Linear, in_features: int, out_features: int) -> None:
        self._weights(linear, in_features, out_features, out_features, 1)
        if linear.bias:
            self._piece(linear.bias, padded(out_features, BLOCK_COLUMNS) * 4)

    def _gated(self, linear: library.Linear, in_features: int, out_features: int, num_layers: int) -> None:
        columns = 2 * padded(out_features, GATED_COLUMNS)
        self._weights(linear, in_features, out_features, columns, num_layers)
        if linear.bias:
            self._piece(linear.bias, num_layers * columns * 4)

    def _weights(self, linear: library.Linear, in_features: int, out_features: int, columns: int, layers: int) -> None:
        found = (linear.in_features, linear.out_features)
        _check(found == (in_features, out_features), f"a layer of {found} for {(in_features, out_features)}")
        _check(linear.format in self._formats, f"weights of format {linear.format}")
        self._piece(linear.weight, layers * self._packed_size(linear.format, columns, in_features))

    def _embed(self, op: library.Op, columns: int) -> None:
        _check(op.vocab_size >= self._vocab_size, f"{op.vocab_size} rows for {self._vocab_size} tokens")
        _check(math.isfinite(op.scale), f"a scale of {op.scale}")
        if op.table_stride == 0:
            _check(not op.table, "has two tables")
            self._linear(op.linear, columns, op.vocab_size)
        else:
            _check(not _is_set(op.linear) and op.table_stride == padded(columns, BLOCK_COLUMNS), "rows of another size")
            self._piece(op.table, op.vocab_size * op.table_stride * 2)

    def _attention_fields(self, op: library.Op) -> None:
        _check(0 <= op.layer < self._num_layers, f"layer {op.layer} of {self._num_layers}")
        _check(
            Heads(op.num_heads, op.num_kv_heads, op.head_dim, op.latent_dim) == self._heads,
            "heads that the cache is not for",
        )

    def _rotary(self, op: library.Op, read: int, written: int) -> None:
        self._attention_fields(op)
        heads = self._heads
        sizes = ((heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim, heads.num_heads * heads.head_dim)
        _check((read, written) == sizes, f"{read} columns become {written}")
        _check(heads.latent_dim == 0, "writes apart what is one")
        self._rotary_tables(op, heads.head_dim)
        for norm, count in ((op.q_norm, heads.num_heads), (op.k_norm, heads.num_kv_heads)):
            if _is_set(norm):
                is_of_row = norm.size == count * heads.head_dim
                self._norm(norm, count * heads.head_dim if is_of_row else heads.head_dim)

    def _rotary_tables(self, op: library.Op, most_dims: int) -> None:
        _check(op.rotary_dim in range(0, most_dims + 1, 2), f"{op.rotary_dim} rotary dimensions")
        _check(op.max_positions >= 1, f"{op.max_positions} positions")
        for table in (op.cos, op.sin):
            self._piece(table, op.max_positions * op.rotary_dim * 2)

    def _heads_of_row(self, op: library.Op, columns: int) -> None:
        _check(op.num_heads == self._heads.num_heads, f"{op.num_heads} heads")
        fits = 1 <= op.head_dim <= MAX_LATENT_HEAD_DIM and op.head_dim % 16 == 0
        _check(fits and op.num_heads * op.head_dim == columns, f"heads of {op.head_dim} in {columns} columns")

    def _head_linear(self, op: library.Op, read: int, written: int) -> None:
        self._heads_of_row(op, read)
        inner, outer = op.linear.in_features, op.linear.out_features
        _check(1 <= inner <= op.head_dim and outer >= 1, f"{inner} of {op.head_dim} dimensions become {outer}")
        _check(inner % 32 == 0 and outer % 16 == 0 and not op.linear.bias, "parts of heads that are not multiplied")
        _check(op.num_heads * (op.head_dim - inner + outer) == written, f"{read} columns become {written}")
        self._weights(op.linear, inner, outer, padded(outer, BLOCK_COLUMNS), op.num_heads)

    def _experts(self, op: library.Op, columns: int) -> None:
        experts = op.experts
        num_routed, inner = experts.num_experts - experts.num_shared, experts.gated.out_features
        is_mixture = experts.num_shared >= 0 and 1 <= experts.num_chosen <= num_routed <= _MAX_SIZE
        _check(is_mixture and 1 <= inner <= _MAX_SIZE, f"{experts.num_chosen} of {num_routed} experts of {inner}")
        self._linear(op.linear, columns, num_routed + (experts.num_shared > 0 and experts.has_shared_gate != 0))
        groups, chosen_groups = experts.num_groups, experts.num_chosen_groups
        _check(1 <= chosen_groups <= groups and num_routed % groups == 0, f"{chosen_groups} of {groups} groups")
        _check(experts.num_best in (1, 2) and math.isfinite(experts.scale), f"{experts.num_best} best, {experts.scale}")
        if experts.bias:
            self._piece(experts.bias, num_routed * 4)
        self._gated(experts.gated, columns, inner, experts.num_experts)
        self._weights(experts.down, inner, columns, columns, experts.num_experts)
        if experts.down.bias:
            self._piece(experts.down.bias, experts.num_experts * padded(columns, BLOCK_COLUMNS) * 4)


def _is_set(value: object) -> bool:
    return any(bytes(value)) if isinstance(value, ctypes.Structure) else bool(value)
