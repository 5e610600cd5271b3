"""Launch configurations of the Triton kernels, by target and shape: a table, not a search.

A search at run time would choose differently on a busy GPU than on an idle one, and so change the
order of a sum and with it the bits of a result. The values here were chosen from what the compiler
reports (`tools/kernels/aot.py`: registers, spills, shared memory, instructions). No GPU was at hand: none of them
is tuned, and `docs/gpu.md` says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TARGETS = ("cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942")
"""What kernels are compiled for: A100; A10 and RTX 30; L4, L40S and RTX 40; H100 and H200; B200; RTX 50; MI300."""

SMALL_TARGETS = ("cuda:86", "cuda:89", "cuda:120")
"""Those with the instructions of cuda:80 and 99 KiB of shared memory. They take its configurations."""

ROW_TARGETS = tuple(target for target in TARGETS if target not in SMALL_TARGETS)
"""Those that kernels of rows are compiled for by `aot.py`: without tiles in shared memory, they fit the others too."""

FP8_TARGETS = ("cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942")
"""Those that can read float8_e4m3fn."""

SHARED_MEMORY = {
    "cuda:80": 166912,
    **dict.fromkeys(SMALL_TARGETS, 101376),
    "cuda:90": 232448,
    "cuda:100": 232448,
    "hip:gfx942": 65536,
}
"""Most shared memory (LDS) in bytes that one block may have."""


@dataclass(frozen=True)
class Multiprocessor:
    """What blocks share: a multiprocessor of cuda, a compute unit of hip.

    registers  of all lanes of a unit, divided by those of a warp
    units      parts with registers of their own (hip: a wavefront stays in one)
    shared     bytes of shared memory;  reserved  bytes of them that each block takes beside its own
    """

    registers: int
    units: int
    shared: int
    reserved: int


MULTIPROCESSORS = {
    "cuda:80": Multiprocessor(512, 4, 167936, 1024),
    **dict.fromkeys(SMALL_TARGETS, Multiprocessor(512, 4, 102400, 1024)),
    "cuda:90": Multiprocessor(512, 4, 233472, 1024),
    "cuda:100": Multiprocessor(512, 4, 233472, 1024),
    "hip:gfx942": Multiprocessor(512, 4, 65536, 0),
}


def cuda_target(major: int, minor: int) -> str | None:
    """Return the target whose configurations fit a GPU of a compute capability; None if it is too old.

    Triton compiles for the GPU itself: a target only says how much is taken at once.
    """
    if major < 8:
        return None
    if major == 8:
        return "cuda:80" if minor == 0 else "cuda:89" if minor == 9 else "cuda:86"
    # What comes after is unknown: tiles that are small fit.
    return {9: "cuda:90", 10: "cuda:100", 11: "cuda:100"}.get(major, "cuda:120")


Step = Literal["decode", "mixed"]


@dataclass(frozen=True)
class AttentionConfig:
    """How paged attention is launched.

    block_m     rows of a tile: queries times the queries that share a key head, a power of two >= 16
    block_n     keys taken at once
    split_keys  most keys in one row of the work list; fixed, see `attention_plan.py`
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    split_keys: int


# By padded head dimension. "decode" has small tiles that leave bandwidth to many blocks; "mixed" has
# tiles large enough for the wide matrix instructions, and serves prompts and decodes in one launch.
_DECODE = {
    64: AttentionConfig(16, 64, 4, 2, 256),
    128: AttentionConfig(16, 32, 4, 2, 256),  # with 64 some releases of Triton spill
    256: AttentionConfig(16, 32, 4, 2, 256),
}
_MIXED = {
    64: AttentionConfig(64, 64, 4, 2, 1024),
    128: AttentionConfig(64, 64, 4, 2, 1024),
    256: AttentionConfig(64, 32, 8, 2, 1024),
}
# With 32 keys at once ptxas takes 128 registers on sm_80 and spills; with 64 it takes more and does not.
_DECODE_80 = {**_DECODE, 256: AttentionConfig(16, 64, 4, 2, 256)}
# The tile that suits sm_90 spills on sm_80; 64 KB of LDS hold smaller tiles.
_SMALL_MIXED = {**_MIXED, 128: AttentionConfig(64, 32, 4, 2, 1024)}
# Float32 has no matrix instruction, and larger tiles spill. It is for checking results, not for speed.
_FLOAT32 = {
    64: AttentionConfig(16, 32, 4, 1, 256),
    128: AttentionConfig(16, 32, 4, 1, 256),
    256: AttentionConfig(16, 16, 8, 1, 256),
}

_ATTENTION: dict[tuple[str, Step], dict[int, AttentionConfig]] = {
    ("cuda:80", "decode"): _DECODE_80,
    ("cuda:80", "mixed"): _SMALL_MIXED,
    **{(target, "decode"): _DECODE_80 for target in SMALL_TARGETS},
    **{(target, "mixed"): _SMALL_MIXED for target in SMALL_TARGETS},
    ("cuda:90", "decode"): _DECODE,
    ("cuda:90", "mixed"): _MIXED,
    ("cuda:100", "decode"): _DECODE,
    ("cuda:100", "mixed"): _MIXED,
    ("hip:gfx942", "decode"): _DECODE,
    ("hip:gfx942", "mixed"): _SMALL_MIXED,
}


def attention_config(target: str, step: Step, head_dim: int, *, is_float32: bool = False) -> AttentionConfig:
    """Return the configuration for a target of `TARGETS`; `is_float32` tells the type of the queries.

    Which of the two kinds of step computes a token may change its last bits. A device that promises
    bits takes "mixed" for all its steps.
    """
    assert target in TARGETS, f"{target} is none of {TARGETS}"
    padded = min(size for size in _DECODE if size >= head_dim)
    return _FLOAT32[padded] if is_float32 else _ATTENTION[target, step][padded]


LinearKind = Literal["int8", "fp8", "int8_int8", "fp8_fp8"]
"""Type of the weights of a quantised linear layer, and after "_" of its activations; without, they have 16 bits."""


@dataclass(frozen=True)
class LinearConfig:
    """How a quantised linear layer is launched.

    block_out, block_tokens  outputs and tokens of a tile
    block_in                 inputs taken at once; the order of the sum
    tma                      whether tiles are read through tensor descriptors
    """

    block_out: int
    block_tokens: int
    block_in: int
    num_warps: int
    num_stages: int
    tma: bool = False


# A sum of float32 has one tile for a shape of weights, whatever the number of tokens: other tiles may
# mean other matrix instructions. 64 tokens at once read weights of 8 bits from memory about as fast as
# they are multiplied. Few outputs want small tiles, or half of the multiprocessors would have none.
_NARROW_LINEAR = {
    **dict.fromkeys(("cuda:80", *SMALL_TARGETS), LinearConfig(64, 64, 64, 4, 3)),
    "cuda:90": LinearConfig(64, 64, 128, 4, 4, tma=True),
    "cuda:100": LinearConfig(64, 64, 128, 4, 3, tma=True),
    "hip:gfx942": LinearConfig(64, 64, 64, 4, 2),
}
_WIDE_LINEAR = {
    **_NARROW_LINEAR,
    "cuda:90": LinearConfig(128, 64, 64, 8, 4, tma=True),  # with 128 inputs one block fits instead of two
    "cuda:100": LinearConfig(128, 64, 128, 8, 3, tma=True),
}
_WIDE_FROM = 8192
# A sum of int32 is exact, so tiles may follow the number of tokens: up to 16, up to 64, more.
_INTEGER_LINEAR = {
    "cuda:80": (LinearConfig(64, 16, 128, 4, 3), _NARROW_LINEAR["cuda:80"], LinearConfig(128, 128, 64, 8, 3)),
    "cuda:90": (
        LinearConfig(64, 16, 256, 4, 4, tma=True),
        _NARROW_LINEAR["cuda:90"],
        LinearConfig(128, 128, 128, 8, 3, tma=True),
    ),
    "cuda:100": (
        LinearConfig(64, 16, 256, 4, 4, tma=True),
        _NARROW_LINEAR["cuda:100"],
        LinearConfig(128, 128, 128, 8, 3, tma=True),
    ),
    "hip:gfx942": (
        LinearConfig(64, 16, 128, 4, 2),
        _NARROW_LINEAR["hip:gfx942"],
        LinearConfig(128, 64, 64, 8, 2),
    ),
}
_FLOAT32_LINEAR = LinearConfig(32, 16, 32, 4, 1)  # for checking results, not for speed

LINEAR_KINDS: dict[str, tuple[LinearKind, ...]] = {
    "cuda:80": ("int8", "int8_int8"),  # which has no float8_e4m3fn, nor has cuda:86
    "cuda:86": ("int8",),
    **dict.fromkeys(("cuda:89", "cuda:120"), ("int8", "fp8")),
    "cuda:90": ("int8", "fp8", "int8_int8", "fp8_fp8"),
    "cuda:100": ("int8", "fp8", "int8_int8", "fp8_fp8"),
    "hip:gfx942": ("int8", "fp8", "int8_int8"),  # its fp8 products are of another fp8: float8_e4m3fnuz
}
"""The kinds of quantised linear layers that a target can do."""


def linear_config(
    target: str, kind: LinearKind, out_features: int, num_tokens: int, *, is_float32: bool = False
) -> LinearConfig:
    """Return the configuration of a quantised linear layer; `is_float32` tells the type of the activations.

    `num_tokens` only matters where the sum is exact, so that a row's bits never depend on it.
    """
    assert target in TARGETS, f"{target} is none of {TARGETS}"
    assert kind in LINEAR_KINDS[target], f"{target} cannot do {kind}: one of {LINEAR_KINDS[target]}"
    if is_float32:
        return _FLOAT32_LINEAR
    if kind == "int8_int8":
        few, some, many = _INTEGER_LINEAR[target]
        return few if num_tokens <= 16 else some if num_tokens <= 64 else many
    return (_WIDE_LINEAR if out_features >= _WIDE_FROM else _NARROW_LINEAR)[target]


@dataclass(frozen=True)
class ExpertsConfig:
    """How the products of a mixture of experts are launched.

    block_out    outputs of a tile; of a gated product, of the gate and of up each
    block_rows   rows of a tile: an expert's rows are padded to a multiple of it
    block_in     inputs taken at once; the order of the sum
    """

    block_out: int
    block_rows: int
    block_in: int
    num_warps: int
    num_stages: int


# One for all steps, so that a row's bits never depend on how many rows chose its experts.
_EXPERTS = {
    **dict.fromkeys(SMALL_TARGETS, ExpertsConfig(64, 64, 64, 4, 3)),
    "cuda:80": ExpertsConfig(64, 64, 64, 4, 3),
    "cuda:90": ExpertsConfig(64, 64, 64, 4, 3),
    "cuda:100": ExpertsConfig(64, 64, 64, 4, 3),
    "hip:gfx942": ExpertsConfig(64, 64, 64, 4, 2),
}
_FLOAT32_EXPERTS = ExpertsConfig(32, 16, 32, 4, 1)  # for checking results, not for speed


def experts_config(target: str, *, is_float32: bool = False) -> ExpertsConfig:
    """Return the configuration for a target of `TARGETS`; `is_float32` tells the type of the rows."""
    assert target in TARGETS, f"{target} is none of {TARGETS}"
    return _FLOAT32_EXPERTS if is_float32 else _EXPERTS[target]


@dataclass(frozen=True)
class RowConfig:
    """How a kernel that takes `block` elements at a time is launched."""

    block: int
    num_warps: int


def norm_config(hidden_size: int) -> RowConfig:
    """Return how RMSNorm takes a row in one piece: about 16 elements a thread, on every target."""
    block = max(power_of_two(hidden_size), 128)
    return RowConfig(block, min(max(block // 512, 1), 16))


# Eight elements of two bytes a thread are one 16-byte load. A warp has 32 threads on cuda, 64 on hip.
GATED = {target: RowConfig(1024, 2 if target.startswith("hip") else 4) for target in TARGETS}
# `block` is what one program takes of the first halves of its heads.
ROTARY = {target: RowConfig(512 if target.startswith("hip") else 256, 1) for target in TARGETS}
# Four logits of four bytes a thread are one 16-byte load.
LOGITS = {target: RowConfig(1024, 4 if target.startswith("hip") else 8) for target in TARGETS}
# With what the largest kernel keeps of a block of 1,024, the compiler spills on these two.
LOGITS |= {target: RowConfig(512, 4) for target in ("cuda:100", "cuda:120") if target in LOGITS}


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is at least `size`."""
    assert size > 0, size
    return 1 << (size - 1).bit_length()
