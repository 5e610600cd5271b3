"""The layouts in which safetensors files have quantised matrices: several tensors, from which codes are read.

A row of `LAYOUTS` is all that a layout takes. The tensors of a matrix are those whose names begin as its own does:
`model.layers.0.mlp.up_proj.qweight` and so on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from octavo.gpu_worker.errors import ModelError, shown
from octavo.gpu_worker.formats.gguf_kinds import MXFP4_VALUES, power_of_two
from octavo.kernels.group_codes import Codes, CodeShape, Floats, GroupCodes

Arrays = Mapping[str, npt.NDArray[Any]]
_AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # where in a word each of eight neighbours is
_FLOATS = ("F16", "BF16", "F32")
_INTEGERS = ("I32",)
_TYPE_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "I32": 4, "I64": 8, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E8M0": 1}


class Head(NamedTuple):
    """What a file says of a tensor: its type's name and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Settings:
    """What a checkpoint says of its quantised matrices.

    method       as `quantization_config` calls it
    layouts      names of those of LAYOUTS that its matrices may have
    bits         of a code
    group        inputs that share a scale; 0: all, or what the scales' shape says
    symmetric    whether codes have no zero point of their own
    is_ordered   whether inputs are in groups in another order than the matrix has them
    zero_shift   what is added to a stored zero point
    block        outputs and inputs that share a scale; empty without blocks
    """

    method: str
    layouts: tuple[str, ...]
    bits: int = 8
    group: int = 0
    symmetric: bool = True
    is_ordered: bool = False
    zero_shift: int = 0
    block: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A quantised matrix before it is read: its shape, what its codes mean, and its tensors' heads by suffix."""

    layout: Layout
    settings: Settings
    shape: tuple[int, int]
    codes: CodeShape
    heads: Mapping[str, Head]

    @property
    def kind(self) -> str:
        """What it is quantised as, for people."""
        bits = "fp8" if self.heads[self.layout.marker].dtype == "F8_E4M3" else f"{self.codes.bits} bits"
        return bits if self.settings.method == "fp8" else f"{self.settings.method} {bits}"

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors in the files."""
        return sum(_TYPE_BYTES[head.dtype] * math.prod(head.shape) for head in self.heads.values())


@dataclass(frozen=True)
class Layout:
    """A layout.

    marker    suffix of the tensor by which a matrix is known, and its types
    others    suffixes of tensors that belong to it
    outputs   by suffix: the dimension of the outputs, and how many outputs an element there is of
    """

    name: str
    marker: str
    types: tuple[str, ...]
    others: tuple[str, ...]
    plan: Callable[[Settings, Mapping[str, Head]], tuple[tuple[int, int], CodeShape]]
    read: Callable[[Plan, Arrays], GroupCodes]
    outputs: Callable[[Plan], Mapping[str, tuple[int, int]]]


class OddTensorError(ModelError):
    """A tensor of a quantised matrix is not what its layout asks for; the message begins with its suffix."""


def _check(heads: Mapping[str, Head], suffix: str, types: tuple[str, ...], *shapes: tuple[int, ...]) -> None:
    """Raise OddTensorError if a tensor is missing, or of another type or shape."""
    if suffix not in heads:
        raise OddTensorError(f"{suffix} is missing")
    head = heads[suffix]
    if head.dtype not in types:
        raise OddTensorError(f"{suffix} is of type {head.dtype}, expected {' or '.join(types)}")
    if head.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise OddTensorError(f"{suffix} has shape {list(head.shape)}, expected {wanted}")


def _two(heads: Mapping[str, Head], suffix: str) -> tuple[int, int]:
    shape = heads[suffix].shape
    if len(shape) != 2 or 0 in shape:
        raise OddTensorError(f"{suffix} has shape {list(shape)}, expected two dimensions")
    return shape[0], shape[1]


def _unpacked(words: npt.NDArray[np.int32], bits: int, axis: int) -> Codes:
    """Return the codes in words of 32 bits along an axis, from the lowest bits on."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (np.moveaxis(words, axis, -1).view(np.uint32)[..., None] >> shifts & ((1 << bits) - 1)).astype(np.uint8)
    return np.moveaxis(codes.reshape(*codes.shape[:-2], -1), -1, axis)


def _in_groups(plan: Plan, codes: Codes, scales: Floats, zeros: Floats | None, order: Any) -> GroupCodes:
    """Return codes [outputs, inputs] with scales and zero points [outputs, groups].

    order  of each input, the group that it is in; None without
    """
    own = np.arange(codes.shape[1]) // plan.settings.group if plan.settings.group else np.zeros(codes.shape[1], int)
    if order is not None:
        if order.min(initial=0) < 0 or order.max(initial=0) >= scales.shape[1]:
            raise OddTensorError(f"g_idx names groups outside of {scales.shape[1]}")
        if plan.settings.is_ordered:
            scales, zeros = scales[:, order], None if zeros is None else zeros[:, order]
        elif not np.array_equal(order, own):
            raise OddTensorError("g_idx puts inputs in another order, which quantization_config does not say")
    if not plan.codes.has_minimum:
        if zeros is not None and not np.all(zeros == plan.codes.offset):
            raise OddTensorError("zero points differ, but quantization_config says symmetric")
        return GroupCodes(plan.codes, codes, scales)
    assert zeros is not None
    return GroupCodes(plan.codes, codes, scales, -scales * zeros)


def _group_shape(settings: Settings, inputs: int, groups: int, suffix: str, has_zeros: bool) -> CodeShape:
    """Return what codes mean whose scales are in so many groups."""
    size = settings.group or inputs
    if groups != -(-inputs // size):
        raise OddTensorError(f"{suffix} has {groups} groups, expected {-(-inputs // size)} of {size} inputs")
    offset = 0 if has_zeros else 1 << (settings.bits - 1)
    return CodeShape(settings.bits, 1 if settings.is_ordered else size, offset, has_zeros)


# ---------------------------------------------------------------- GPTQ and AWQ


def _plan_gptq(settings: Settings, heads: Mapping[str, Head]) -> tuple[tuple[int, int], CodeShape]:
    words, outputs = _two(heads, "qweight")
    inputs, groups = words * 32 // settings.bits, _two(heads, "scales")[0] if "scales" in heads else 0
    _check(heads, "scales", _FLOATS, (groups, outputs))
    _check(heads, "qzeros", _INTEGERS, (groups, outputs * settings.bits // 32))
    if settings.is_ordered or "g_idx" in heads:
        _check(heads, "g_idx", _INTEGERS, (inputs,))
    return (outputs, inputs), _group_shape(settings, inputs, groups, "scales", not settings.symmetric)


def _read_gptq(plan: Plan, arrays: Arrays) -> GroupCodes:
    bits = plan.settings.bits
    codes = np.ascontiguousarray(_unpacked(arrays["qweight"], bits, 0).T)
    zeros = _unpacked(arrays["qzeros"], bits, 1).T.astype(np.float32) + np.float32(plan.settings.zero_shift)
    return _in_groups(plan, codes, np.ascontiguousarray(arrays["scales"].T), zeros, arrays.get("g_idx"))


def _plan_awq(settings: Settings, heads: Mapping[str, Head]) -> tuple[tuple[int, int], CodeShape]:
    inputs, words = _two(heads, "qweight")
    groups = _two(heads, "scales")[0] if "scales" in heads else 0
    _check(heads, "scales", _FLOATS, (groups, words * 8))
    _check(heads, "qzeros", _INTEGERS, (groups, words))
    return (words * 8, inputs), _group_shape(settings, inputs, groups, "scales", has_zeros=True)


def _read_awq(plan: Plan, arrays: Arrays) -> GroupCodes:
    def in_order(name: str) -> Codes:
        codes = _unpacked(arrays[name], 4, 1)
        return np.ascontiguousarray(codes.reshape(len(codes), -1, 8)[:, :, _AWQ_ORDER].reshape(len(codes), -1).T)

    scales = np.ascontiguousarray(arrays["scales"].T)
    return _in_groups(plan, in_order("qweight"), scales, in_order("qzeros").astype(np.float32), None)


def _packed_outputs(plan: Plan) -> dict[str, tuple[int, int]]:
    per_word = 32 // plan.settings.bits
    is_awq = plan.layout.name == "awq"
    return {"qweight": (1, per_word if is_awq else 1), "qzeros": (1, per_word), "scales": (1, 1)}


# ---------------------------------------------------------------- compressed-tensors, fp8


def _plan_words(settings: Settings, heads: Mapping[str, Head]) -> tuple[tuple[int, int], CodeShape]:
    outputs, words = _two(heads, "weight_packed")
    inputs, groups = words * 32 // settings.bits, _two(heads, "weight_scale")[1] if "weight_scale" in heads else 0
    _check(heads, "weight_scale", _FLOATS, (outputs, groups))
    _check(heads, "weight_shape", ("I64", "I32"), (2,))
    if has_zeros := "weight_zero_point" in heads:
        _check(heads, "weight_zero_point", _INTEGERS, (-(-outputs * settings.bits // 32), groups))
    if settings.is_ordered:
        _check(heads, "weight_g_idx", _INTEGERS, (inputs,))
    return (outputs, inputs), _group_shape(settings, inputs, groups, "weight_scale", has_zeros)


def _read_words(plan: Plan, arrays: Arrays) -> GroupCodes:
    bits = plan.settings.bits
    if arrays["weight_shape"].tolist() != list(plan.shape):
        raise OddTensorError(f"weight_shape is {shown(arrays['weight_shape'].tolist())}, expected {list(plan.shape)}")
    codes = _unpacked(arrays["weight_packed"], bits, 1)
    zeros = arrays.get("weight_zero_point")
    points = None if zeros is None else _unpacked(zeros, bits, 0)[: len(codes)].astype(np.float32)
    return _in_groups(plan, codes, arrays["weight_scale"], points, arrays.get("weight_g_idx"))


def _word_outputs(plan: Plan) -> dict[str, tuple[int, int]]:
    return {"weight_packed": (0, 1), "weight_scale": (0, 1), "weight_zero_point": (0, 32 // plan.settings.bits)}


def _scale_suffix(heads: Mapping[str, Any]) -> str:
    return "weight_scale_inv" if "weight_scale_inv" in heads else "weight_scale"


def _e4m3_values() -> tuple[float, ...]:
    """Return the number that each byte of the type E4M3 tells: a sign, four bits of exponent, three of fraction."""
    byte = np.arange(128)
    exponent, fraction = byte >> 3, byte & 7
    values = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7))
    values[127] = np.nan
    return (*values.tolist(), *(-values).tolist())


_E4M3_VALUES = _e4m3_values()


def _plan_bytes(settings: Settings, heads: Mapping[str, Head]) -> tuple[tuple[int, int], CodeShape]:
    outputs, inputs = _two(heads, "weight")
    suffix = _scale_suffix(heads)
    rows, columns = settings.block or (1, settings.group or inputs)
    of_blocks = (-(-outputs // rows), -(-inputs // columns))
    whole = ((), (1,), (1, 1), (outputs,)) if not settings.block and of_blocks[1] == 1 else ()
    _check(heads, suffix, _FLOATS, of_blocks, *whole)
    if heads["weight"].dtype == "F8_E4M3":
        return (outputs, inputs), CodeShape(8, columns, table=_E4M3_VALUES)
    if has_zeros := "weight_zero_point" in heads:
        _check(heads, "weight_zero_point", ("I8",), (outputs, of_blocks[1]))
    return (outputs, inputs), CodeShape(8, columns, 128, has_zeros)


def _read_bytes(plan: Plan, arrays: Arrays) -> GroupCodes:
    codes, scales = arrays["weight"].view(np.uint8), arrays[_scale_suffix(arrays)]
    rows = plan.settings.block[0] if plan.settings.block else 1
    if scales.size == 1 or scales.ndim < 2:
        scales = np.broadcast_to(scales.reshape(-1, 1), (len(codes), 1))
    scales = np.ascontiguousarray(np.repeat(scales, rows, axis=0)[: len(codes)])
    if plan.codes.table:
        return GroupCodes(plan.codes, codes, scales)
    zeros = arrays.get("weight_zero_point")
    minima = None if zeros is None else -scales * zeros.astype(np.float32)
    return GroupCodes(plan.codes, codes ^ np.uint8(128), scales, minima)


def _byte_outputs(plan: Plan) -> dict[str, tuple[int, int]]:
    suffix = _scale_suffix(plan.heads)
    per_output = plan.heads[suffix].shape[:1] not in ((), (1,)) or plan.shape[0] == 1
    rows = plan.settings.block[0] if plan.settings.block else 1
    scales = {suffix: (0, rows)} if per_output else {}
    return {"weight": (0, 1), "weight_zero_point": (0, 1), **scales}


# ---------------------------------------------------------------- MXFP4


def mxfp4_codes(blocks: npt.NDArray[np.uint8], exponents: npt.NDArray[np.uint8]) -> GroupCodes:
    """Return rows of numbers of four bits: blocks [rows, inputs / 2], the lower half of a byte first.

    exponents  [rows, inputs / 32]
    """
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(len(blocks), -1)
    return GroupCodes(CodeShape(4, 32, table=MXFP4_VALUES), codes, power_of_two(exponents))


def _plan_mxfp4(_: Settings, heads: Mapping[str, Head]) -> tuple[tuple[int, int], CodeShape]:
    outputs, halves = _two(heads, "weight_packed")
    _check(heads, "weight_scale", ("U8", "F8_E8M0"), (outputs, halves // 16))
    return (outputs, halves * 2), CodeShape(4, 32, table=MXFP4_VALUES)


def _read_mxfp4(_: Plan, arrays: Arrays) -> GroupCodes:
    return mxfp4_codes(arrays["weight_packed"], arrays["weight_scale"])


_NOT_NEEDED = ("input_scale", "input_zero_point", "activation_scale", "output_scale")
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("gptq", "qweight", ("I32",), ("qzeros", "scales", "g_idx"), _plan_gptq, _read_gptq, _packed_outputs),
        Layout("awq", "qweight", ("I32",), ("qzeros", "scales"), _plan_awq, _read_awq, _packed_outputs),
        Layout(
            "packed words", "weight_packed", ("I32",),
            ("weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
            _plan_words, _read_words, _word_outputs,
        ),
        Layout(
            "bytes", "weight", ("I8", "F8_E4M3"), ("weight_scale", "weight_scale_inv", "weight_zero_point"),
            _plan_bytes, _read_bytes, _byte_outputs,
        ),
        Layout("mxfp4", "weight_packed", ("U8",), ("weight_scale",), _plan_mxfp4, _read_mxfp4, _word_outputs),
    )
}  # fmt: skip
"""By name."""


def plan_matrix(settings: Settings, heads: Mapping[str, Head]) -> Plan | None:
    """Return how a matrix is read whose tensors' heads are given by suffix; None if it is not quantised.

    Raises OddTensorError.
    """
    for name in settings.layouts:
        layout = LAYOUTS[name]
        if layout.marker in heads and heads[layout.marker].dtype in layout.types:
            shape, codes = layout.plan(settings, heads)
            known = {layout.marker, *layout.others}
            return Plan(layout, settings, shape, codes, {suffix: heads[suffix] for suffix in known & heads.keys()})
    return None


def plans_of(settings: Settings, heads: Mapping[str, Head], where: str) -> tuple[dict[str, Plan], set[str]]:
    """Return how each quantised matrix is read, by the name of its numbers, and the tensors that are no others' names.

    The second is what a plan reads, and what belongs to a quantised matrix and is not needed. Raises ModelError.
    """
    groups: dict[str, dict[str, Head]] = {}
    for name, head in heads.items():
        prefix, _, suffix = name.rpartition(".")
        groups.setdefault(prefix, {})[suffix] = head
    plans: dict[str, Plan] = {}
    taken: set[str] = set()
    for prefix, members in groups.items():
        try:
            plan = plan_matrix(settings, members)
        except OddTensorError as error:
            raise ModelError(f"{where}: {prefix}.{error}") from None
        if plan is None:
            continue
        plans[f"{prefix}.weight"] = plan
        taken |= {f"{prefix}.{suffix}" for suffix in (*plan.heads, *_NOT_NEEDED) if suffix in members}
    if not plans:
        raise ModelError(
            f"{where}: quantization_config says {settings.method}, but no tensor is quantised so; "
            "the checkpoint is incomplete, or of a variant that is not supported"
        )
    return plans, taken


def biases_beside(plans: Iterable[str]) -> set[str]:
    """Return the names that biases of quantised matrices have."""
    return {name.removesuffix("weight") + "bias" for name in plans}
