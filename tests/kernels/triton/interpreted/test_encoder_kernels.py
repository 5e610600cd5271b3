"""What encoders and vectors need, attention of whole sequences, add + LayerNorm and pooling, against plain torch."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from mutate import guarded, mutated

from octavo.kernels import encoder_attention as attention_kernel
from octavo.kernels import layer_norm as norm_kernel
from octavo.kernels import pooling as pooling_kernel
from octavo.kernels import reference
from octavo.kernels.configs import AttentionConfig

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["fp32", "fp16", "bf16"])
ATTENTION_TOLERANCE = {F32: 2e-5, F16: 4e-3, BF16: 3e-2}
NORM_TOLERANCE = {F32: 1e-5, F16: 4e-3, BF16: 3e-2}
TILE = AttentionConfig(16, 32, num_warps=4, num_stages=1, split_keys=1024)


def starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


# -- attention -------------------------------------------------------------------------------------


def attend(qkv: torch.Tensor, lengths: list[int], module: ModuleType = attention_kernel) -> torch.Tensor:
    query_start_loc = starts(lengths)
    # Any order is right; in this one a tile that goes too far spoils what was written before.
    work = torch.from_numpy(module.encoder_work(query_start_loc.numpy(), TILE)).flip(0)
    output = guarded(torch.full_like(qkv[:, 0], float("nan")))
    module.encoder_attention(qkv, work, query_start_loc, output, config=TILE, scale=qkv.shape[-1] ** -0.5)
    return output


def check_attention(
    lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype, module: ModuleType = attention_kernel
) -> None:
    random = torch.Generator().manual_seed(1)
    qkv = guarded((torch.randn(sum(lengths), 3, heads, head_dim, generator=random) * 2).to(dtype))
    expected = reference.encoder_attention(qkv, starts(lengths), scale=head_dim**-0.5)
    tolerance = ATTENTION_TOLERANCE[dtype]
    torch.testing.assert_close(attend(qkv, lengths, module).float(), expected, rtol=tolerance, atol=tolerance)


@DTYPES
@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim"),
    [([1], 1, 16), ([5, 1, 40, 17], 3, 32), ([33, 16], 2, 64), ([20], 2, 10), ([7, 0, 3], 1, 8)],
)
def test_tokens_see_all_of_their_own_sequence(
    lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    check_attention(lengths, heads, head_dim, dtype)


def test_a_sequence_has_the_same_bits_alone_and_in_any_place() -> None:
    qkv = torch.randn(70, 3, 2, 16, generator=torch.Generator().manual_seed(2))
    together = attend(qkv, [13, 40, 17])
    assert torch.equal(attend(qkv[13:53].contiguous(), [40]), together[13:53])


ATTENTION_MUTATIONS = [
    ("keys of the sequence before", "tl.range(begin, end, BLOCK_N)", "tl.range(0, end, BLOCK_N)"),
    ("keys of the next sequence", "is_key = key < end", "is_key = key < end + 1"),
    ("only the first keys", "tl.range(begin, end, BLOCK_N)", "tl.range(begin, begin + 1, BLOCK_N)"),
    ("queries of the next sequence written", "(query < end)[:, None]", "(query < end + 1)[:, None]"),
    ("keys for values", "qkv_ptr + 2 * ROW", "qkv_ptr + ROW"),
    ("queries for keys", "qkv_ptr + ROW", "qkv_ptr"),
    ("always the first head", "column = head * HEAD_DIM", "column = 0 * HEAD_DIM"),
    ("no rescaling of what was summed", "acc * shrink[:, None]", "acc"),
    ("no rescaling of the weights", "total * shrink +", "total +"),
    ("not divided", "acc / total[:, None]", "acc"),
    ("no scale", "scale * _LOG2_E", "_LOG2_E"),
    ("the next tile begins too late", "number * config.block_m", "number * (config.block_m + 1)"),
    ("a tile too few", "-(-np.diff(starts) // config.block_m)", "np.maximum(np.diff(starts) // config.block_m, 1)"),
]


@pytest.mark.gates
@pytest.mark.parametrize(("old", "new"), [m[1:] for m in ATTENTION_MUTATIONS], ids=[m[0] for m in ATTENTION_MUTATIONS])
def test_a_mutated_attention_is_caught(tmp_path: Path, old: str, new: str) -> None:
    mutant = mutated(attention_kernel, tmp_path, old, new)
    with pytest.raises(AssertionError):
        check_attention([5, 1, 40, 17], 3, 20, F32, mutant)


# -- norm ------------------------------------------------------------------------------------------


def check_norm(
    tokens: int,
    hidden: int,
    dtype: torch.dtype,
    *,
    update: bool = True,
    bias: bool = True,
    module: ModuleType = norm_kernel,
) -> None:
    random = torch.Generator().manual_seed(4)
    residual = torch.randn(tokens, hidden, generator=random) * 5 + 3
    added = guarded(torch.randn(tokens, hidden, generator=random).to(dtype)) if update else None
    weight = (torch.rand(hidden, generator=random) + 0.5).to(dtype)
    shift = torch.randn(hidden, generator=random).to(dtype) if bias else None
    expected = reference.layer_norm(residual if added is None else residual + added.float(), weight, shift, 0.3)
    stream, output = guarded(residual), guarded(torch.full((tokens, hidden), float("nan"), dtype=dtype))
    module.add_layer_norm(stream, added, weight, shift, output, 0.3)
    torch.testing.assert_close(stream, expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(output.float(), expected, rtol=NORM_TOLERANCE[dtype], atol=NORM_TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize(("update", "bias"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (3, 17), (2, 384), (0, 16)])
def test_the_norm_is_that_of_torch(tokens: int, hidden: int, dtype: torch.dtype, update: bool, bias: bool) -> None:
    check_norm(tokens, hidden, dtype, update=update, bias=bias)


NORM_MUTATIONS = [
    ("update left out", "if HAS_UPDATE:", "if False:"),
    ("residual not written", "tl.store(residual_ptr + row + cols, y, mask=mask)", "pass"),
    ("residual is the sum", "tl.store(residual_ptr + row + cols, y,", "tl.store(residual_ptr + row + cols, x,"),
    ("no mean", "x - tl.sum(x) / HIDDEN", "x"),
    ("variance of the padding", "tl.where(mask, x - tl.sum(x) / HIDDEN, 0.0)", "x - tl.sum(x) / HIDDEN"),
    ("mean over the padding", "tl.sum(x) / HIDDEN", "tl.sum(x) / COLS"),
    ("no epsilon", "/ HIDDEN + eps", "/ HIDDEN"),
    ("no weight", "* tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)", ""),
    ("no bias", "if HAS_BIAS:", "if False:"),
    ("always the first row", "tl.program_id(0).to(tl.int64) * HIDDEN", "tl.program_id(0).to(tl.int64) * 0"),
]


@pytest.mark.gates
@pytest.mark.parametrize(("old", "new"), [m[1:] for m in NORM_MUTATIONS], ids=[m[0] for m in NORM_MUTATIONS])
def test_a_mutated_norm_is_caught(tmp_path: Path, old: str, new: str) -> None:
    mutant = mutated(norm_kernel, tmp_path, old, new)
    with pytest.raises(AssertionError):
        check_norm(3, 17, F32, module=mutant)


# -- pooling ---------------------------------------------------------------------------------------


def check_pool(mode: str, dtype: torch.dtype, module: ModuleType = pooling_kernel) -> None:
    """Two steps: of the second one sequence is new in a slot that was used, and one goes on."""
    random = torch.Generator().manual_seed(5)
    hidden_size = 150  # more than one program takes
    sums = guarded(torch.randn(4, hidden_size, dtype=torch.float64, generator=random))
    expected_sums = sums.clone()
    for slots, lengths, contexts in (([2, -1, 0], [3, 2, 1], [0, 0, 0]), ([0, 2, 3], [1, 4, 5], [0, 3, 7])):
        hidden = guarded(torch.randn(sum(lengths), hidden_size, generator=random).to(dtype))
        rows = torch.tensor(slots, dtype=torch.int32)
        seq_lens = (torch.tensor(lengths) + torch.tensor(contexts)).int()
        output = guarded(torch.zeros(len(slots), hidden_size))
        module.pool(hidden, rows, starts(lengths), seq_lens, sums, output, mode)
        expected = reference.pool(hidden, rows, starts(lengths), seq_lens, expected_sums, mode)
        assert torch.equal(output, expected)
        assert torch.equal(sums, expected_sums)


@DTYPES
@pytest.mark.parametrize("mode", ["first", "last", "sum"])
def test_pooling_is_that_of_torch_to_the_bit(mode: str, dtype: torch.dtype) -> None:
    check_pool(mode, dtype)


def check_pools(module: ModuleType) -> None:
    for mode in ("first", "last", "sum"):
        check_pool(mode, F32, module)


POOL_MUTATIONS = [
    ("padding written", "if slot >= 0:", "if slot >= -1:"),
    ("earlier chunks forgotten", "tl.where(is_begun, HIDDEN, 0)", "0"),
    ("the slot's last sequence remembered", "tl.where(is_begun, HIDDEN, 0)", "HIDDEN"),
    ("the first of every chunk", "tl.where(is_begun, state, first.to(tl.float64))", "first.to(tl.float64)"),
    ("the first for the last", "(end - 1).to(tl.int64)", "begin.to(tl.int64)"),
    ("a token too few", "tl.range(0, end - begin)", "tl.range(1, end - begin)"),
    ("sums by row, not by slot", "slot.to(tl.int64) * HIDDEN", "row.to(tl.int64) * HIDDEN"),
    ("state not kept", "tl.store(sum_ptr + cols, state, mask=mask)", "pass"),
    ("columns of the first program", "tl.program_id(1) * COLS", "0"),
]


@pytest.mark.gates
@pytest.mark.parametrize(("old", "new"), [m[1:] for m in POOL_MUTATIONS], ids=[m[0] for m in POOL_MUTATIONS])
def test_a_mutated_pooling_is_caught(tmp_path: Path, old: str, new: str) -> None:
    mutant = mutated(pooling_kernel, tmp_path, old, new)
    with pytest.raises(AssertionError):
        check_pools(mutant)
