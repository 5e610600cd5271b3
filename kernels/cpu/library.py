"""The native CPU kernels as Python sees them: `abi.h`, mirrored with ctypes."""

from __future__ import annotations

import ctypes as c
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from octavo.kernels.cpu import build
from octavo.kernels.group_codes import CodeShape, holds

ABI_REVISION = 21
FAILED = -2
CHUNK_BYTES = 1 << 20  # that have a checksum of their own

BF16, F16, F32, CODES = range(4)
WEIGHT_BF16, WEIGHT_INT8, WEIGHT_INT4, WEIGHT_COMPRESSED = range(4)
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
CODE_FORMATS = {
    9: CodeShape(4, 32, table=_IQ4_VALUES),
    10: CodeShape(4, 32, table=_MXFP4_VALUES),
    WEIGHT_INT4: CodeShape(4, 32, has_minimum=True),
    4: CodeShape(5, 32, offset=16),
    7: CodeShape(4, 16, has_minimum=True),
    5: CodeShape(5, 32, has_minimum=True),
    6: CodeShape(6, 16, offset=32),
    WEIGHT_INT8: CodeShape(8, 32, offset=128),
    8: CodeShape(8, 16, offset=128, has_minimum=True),
}
"""What codes mean by their OctavoWeightFormat, smallest first."""
EMBED, NORM_LINEAR, ROTARY_WRITE_KV, PAGED_ATTENTION, LINEAR_RESIDUAL, NORM_GATED_LINEAR, LOGITS = range(7)
NORM_EXPERTS_RESIDUAL, HIDDEN, LINEAR, NORM_RESIDUAL = 7, 8, 9, 10
ROTATE_QUERIES, WRITE_LATENT, HEAD_LINEAR = 11, 12, 13
PROFILE_ROWWISE, PROFILE_PREPARE, PROFILE_SIZE = 14, 15, 16
PROFILE_NAMES = {
    EMBED: "embed",
    NORM_LINEAR: "norm_linear",
    ROTARY_WRITE_KV: "rotary_write_kv",
    PAGED_ATTENTION: "paged_attention",
    LINEAR_RESIDUAL: "linear_residual",
    NORM_GATED_LINEAR: "norm_gated_linear",
    LOGITS: "logits",
    NORM_EXPERTS_RESIDUAL: "norm_experts_residual",
    HIDDEN: "hidden",
    LINEAR: "linear",
    NORM_RESIDUAL: "norm_residual",
    ROTATE_QUERIES: "rotate_queries",
    WRITE_LATENT: "write_latent",
    HEAD_LINEAR: "head_linear",
    PROFILE_ROWWISE: "rowwise",
    PROFILE_PREPARE: "prepare",
}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "swigluoai": 2}


def format_of(shapes: Sequence[CodeShape]) -> int:
    """Return the smallest format that holds codes of all `shapes`; WEIGHT_BF16 if none does."""
    enough = (number for number, own in CODE_FORMATS.items() if all(holds(own, shape) for shape in shapes))
    return next(enough, WEIGHT_BF16)


# What a CPU must have for a variant, as /proc/cpuinfo names it.
_AVX2 = {"avx2", "fma", "f16c"}
_AVX512 = {*_AVX2, "avx512f", "avx512vl", "avx512bw", "avx512dq"}
_AVX512_BF16 = {*_AVX512, "avx512_vnni", "avx512_bf16"}
NEEDED_FLAGS = {
    "amx": {*_AVX512_BF16, "amx_tile", "amx_bf16"},
    "avx512_bf16": _AVX512_BF16,
    "avx512_vnni": {*_AVX512, "avx512_vnni"},
    "avx512": _AVX512,
    "avx2_vnni": {*_AVX2, "avx_vnni"},
    "avx2": _AVX2,
    "neon_bf16": {"bf16", "asimdhp", "asimddp"},
    "neon": set[str](),
    "portable": set[str](),
}


# Of Linux on x86-64: the system call, and what it is asked for.
_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18


class KernelError(Exception):
    """The system refused the kernels something other than memory; the message says what."""


class Matrix(c.Structure):
    """OctavoMatrix. `keeps` is what has the memory that it points to."""

    keeps: object = None
    _fields_ = (
        ("data", c.c_void_p),
        ("scales", c.c_void_p),
        ("minima", c.c_void_p),
        ("type", c.c_int32),
        ("rows", c.c_int32),
        ("columns", c.c_int32),
        ("group", c.c_int32),
    )


class Norm(c.Structure):
    """OctavoNorm."""

    _fields_ = (("weight", c.c_void_p), ("eps", c.c_float), ("size", c.c_int32))


class Linear(c.Structure):
    """OctavoLinear."""

    _fields_ = (
        ("weight", c.c_void_p),
        ("bias", c.c_void_p),
        ("in_features", c.c_int32),
        ("out_features", c.c_int32),
        ("format", c.c_int32),
    )


class Experts(c.Structure):
    """OctavoExperts."""

    _fields_ = (
        ("gated", Linear),
        ("down", Linear),
        ("num_experts", c.c_int32),
        ("num_chosen", c.c_int32),
        ("num_shared", c.c_int32),
        ("is_normalized", c.c_int32),
        ("bias", c.c_void_p),
        ("is_sigmoid", c.c_int32),
        ("num_groups", c.c_int32),
        ("num_chosen_groups", c.c_int32),
        ("num_best", c.c_int32),
        ("scale", c.c_float),
        ("has_shared_gate", c.c_int32),
    )


class Op(c.Structure):
    """OctavoOp."""

    _fields_ = (
        ("kind", c.c_int32),
        ("input", c.c_int32),
        ("output", c.c_int32),
        ("layer", c.c_int32),
        ("norm", Norm),
        ("q_norm", Norm),
        ("k_norm", Norm),
        ("linear", Linear),
        ("activation", c.c_int32),
        ("num_heads", c.c_int32),
        ("num_kv_heads", c.c_int32),
        ("head_dim", c.c_int32),
        ("scale", c.c_float),
        ("window", c.c_int32),
        ("sinks", c.c_void_p),
        ("soft_cap", c.c_float),
        ("table", c.c_void_p),
        ("table_stride", c.c_int32),
        ("vocab_size", c.c_int32),
        ("cos", c.c_void_p),
        ("sin", c.c_void_p),
        ("rotary_dim", c.c_int32),
        ("max_positions", c.c_int32),
        ("experts", Experts),
        ("latent_dim", c.c_int32),
    )


class Buffer(c.Structure):
    """OctavoBuffer."""

    _fields_ = (("data", c.c_void_p), ("stride", c.c_int32))


class ProgramInfo(c.Structure):
    """OctavoProgramInfo."""

    _fields_ = (
        ("ops", c.POINTER(Op)),
        ("buffers", c.POINTER(Buffer)),
        ("num_ops", c.c_int32),
        ("num_buffers", c.c_int32),
        ("num_layers", c.c_int32),
        ("num_kv_heads", c.c_int32),
        ("head_dim", c.c_int32),
        ("vocab_size", c.c_int32),
        ("max_batch_tokens", c.c_int32),
        ("max_running", c.c_int32),
        ("max_blocks_per_sequence", c.c_int32),
    )


class AdapterStripe(c.Structure):
    """OctavoAdapterStripe."""

    _fields_ = (("b", c.c_void_p), ("first_rank", c.c_int32), ("num_pairs", c.c_int32))


class AdapterLayer(c.Structure):
    """OctavoAdapterLayer."""

    _fields_ = (
        ("a", c.c_void_p),
        ("scales", c.c_void_p),
        ("stripes", c.c_void_p),
        ("num_ranks", c.c_int32),
        ("a_stride", c.c_int32),
        ("num_blocks", c.c_int32),
    )


class Step(c.Structure):
    """OctavoStep."""

    _fields_ = (
        ("token_ids", c.c_void_p),
        ("positions", c.c_void_p),
        ("slot_mapping", c.c_void_p),
        ("query_start_loc", c.c_void_p),
        ("seq_lens", c.c_void_p),
        ("block_tables", c.c_void_p),
        ("logits_rows", c.c_void_p),
        ("adapter_ids", c.c_void_p),
        ("adapters", c.c_void_p),
        ("num_adapters", c.c_int32),
        ("num_tokens", c.c_int32),
        ("num_sequences", c.c_int32),
        ("num_logits_rows", c.c_int32),
        ("max_blocks", c.c_int32),
    )


class Cache(c.Structure):
    """OctavoCache."""

    _fields_ = (("data", c.c_void_p), ("num_blocks", c.c_int32))


# Of these a null is an answer.
_NEVER_FAIL = ("octavo_last_error", "octavo_pool_progress", "octavo_arena_allocate")

_MatrixPointer = c.POINTER(Matrix)
_FUNCTIONS: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "octavo_last_error": (c.c_int32, (c.c_char_p, c.c_size_t)),
    "octavo_abi_revision": (c.c_int32, ()),
    "octavo_activation_bytes": (c.c_int32, ()),
    "octavo_rows_at_once": (c.c_int32, (c.c_int32,)),
    "octavo_pool_create": (c.c_void_p, (c.c_int32,)),
    "octavo_pool_destroy": (None, (c.c_void_p,)),
    "octavo_pool_progress": (c.c_uint64, (c.c_void_p,)),
    "octavo_arena_create": (c.c_void_p, (c.c_uint64,)),
    "octavo_arena_destroy": (None, (c.c_void_p,)),
    "octavo_arena_allocate": (c.c_void_p, (c.c_void_p, c.c_size_t)),
    "octavo_arena_touch": (c.c_int32, (c.c_void_p, c.c_void_p)),
    "octavo_packed_weight_size": (c.c_size_t, (c.c_int32, c.c_int32, c.c_int32)),
    "octavo_pack_linear": (c.c_int32, (c.c_void_p, c.c_int32, _MatrixPointer, c.c_int64, c.c_void_p)),
    "octavo_pack_gated": (
        c.c_int32,
        (c.c_void_p, c.c_int32, _MatrixPointer, _MatrixPointer, c.c_int64, c.c_void_p),
    ),
    "octavo_reads_compressed": (c.c_int32, ()),
    "octavo_compress": (c.c_int32, (c.c_void_p, c.c_void_p, c.c_int32, c.c_int32, c.c_void_p)),
    "octavo_to_bf16": (c.c_int32, (c.c_void_p, _MatrixPointer, c.c_void_p, c.c_int32)),
    "octavo_read_file": (
        c.c_int32,
        (c.c_void_p, c.c_int32, c.c_int64, c.c_size_t, c.c_void_p, c.c_void_p),
    ),
    "octavo_checksums": (None, (c.c_void_p, c.c_size_t, c.c_void_p)),
    "octavo_program_create": (c.c_void_p, (c.c_void_p, c.POINTER(ProgramInfo))),
    "octavo_program_destroy": (None, (c.c_void_p,)),
    "octavo_program_run": (
        c.c_int32,
        (c.c_void_p, c.POINTER(Step), c.POINTER(Cache), c.c_void_p, c.c_void_p, c.c_char_p, c.c_size_t),
    ),
    "octavo_program_profile": (None, (c.c_void_p, c.c_int32, c.c_void_p, c.c_void_p)),
    "octavo_measure_read": (c.c_int64, (c.c_void_p, c.c_void_p, c.c_int64)),
    "octavo_measure_dot": (c.c_int64, (c.c_void_p, c.c_int32)),
    "octavo_measure_integer_dot": (c.c_int64, (c.c_void_p, c.c_int32)),
    "octavo_mask": (None, (c.c_void_p, c.c_void_p, c.c_int32)),
    "octavo_draw": (
        c.c_int32,
        (c.c_void_p, c.c_void_p, c.c_int64, c.c_int32, c.c_int32, c.c_void_p, c.c_void_p),
    ),
    "octavo_argmax": (c.c_int32, (c.c_void_p, c.c_void_p, c.c_int64, c.c_int32, c.c_int32, c.c_void_p)),
}


def runnable_variants() -> list[str]:
    """Return the variants that this CPU can run, best first."""
    cpu = _cpu()
    runnable = [variant for variant in build.variants() if NEEDED_FLAGS[variant] <= cpu.flags]
    if "amx" in runnable and not _permits_amx():
        runnable.remove("amx")
    if cpu.vendor == "GenuineIntel" and "avx512_bf16" in runnable:
        # Intel's cores take four times as long for a product of bf16 pairs as for one of float32: half the rate.
        runnable.remove("avx512_bf16")
        runnable.insert(runnable.index("avx512_vnni") + 1, "avx512_bf16")
    return runnable


@functools.cache
def load(variant: str = "") -> c.CDLL:
    """Load the kernels: `variant`, or the best that this CPU can run.

    Compiles them first where no ready library is found. Raises build.BuildError without a compiler and
    for a library that cannot be loaded, ValueError for a variant that this CPU cannot run.
    """
    runnable = runnable_variants()
    if variant and variant not in runnable:
        raise ValueError(f"CPU kernels {variant!r}: this machine can run {', '.join(runnable)}")
    path = build.library_path(variant or runnable[0])
    try:
        library = c.CDLL(str(path))
    except OSError as error:
        raise build.BuildError(f"the CPU kernels in {path} cannot be loaded: {error}") from error
    for name, (result, arguments) in _FUNCTIONS.items():
        declare(library, name, result, *arguments)
    revision = library.octavo_abi_revision()
    assert revision == ABI_REVISION, f"library.py mirrors revision {ABI_REVISION} of abi.h, not {revision}"
    return library


def declare(library: c.CDLL, name: str, result: type | None, *arguments: type) -> None:
    """Say how a function is called: its calls raise MemoryError or KernelError where the system refuses something."""
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    if name in _NEVER_FAIL:
        return

    def check(value: int | None, _function: object, _arguments: object) -> int | None:
        if value == FAILED or (value is None and result is c.c_void_p):
            text = c.create_string_buffer(256)
            is_memory = library.octavo_last_error(text, len(text))
            raise (MemoryError if is_memory else KernelError)(f"{name}: {text.value.decode(errors='replace')}")
        return value

    function.errcheck = check


@functools.cache
def _permits_amx() -> bool:
    """Ask Linux whether this process's threads may use the tile registers, which are 8 KiB more of their state."""
    if sys.platform != "linux":
        return False
    answer: int = c.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)
    return answer == 0


class Cpu(NamedTuple):
    """What a processor says of itself."""

    vendor: str  # empty where it is not said: on Arm
    flags: set[str]


def _cpu() -> Cpu:
    """Return what /proc/cpuinfo says of the first core; nothing where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return Cpu("", set())
    facts: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    return Cpu(facts.get("vendor_id", ""), set(facts.get("flags", facts.get("Features", "")).split()))
