# ruff: noqa: N803 - constants of a kernel are upper case
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""One vector of the hidden states of each sequence: the first token's, the last one's, or the sum of all."""

from __future__ import annotations

from typing import Final, Literal

import torch
import triton
import triton.language as tl

from octavo.kernels.aot_spec import AotSpec

Mode = Literal["first", "last", "sum"]
_MODES: Final[dict[Mode, int]] = {"first": 0, "last": 1, "sum": 2}
_COLS = 128


@triton.jit
def _pool(
    hidden_ptr,
    slots_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    sums_ptr,
    output_ptr,
    HIDDEN: tl.constexpr,
    MODE: tl.constexpr,
    COLS: tl.constexpr,
):
    """Take COLS columns of one row of the step. Grid (S, ceil(HIDDEN / COLS)). Arguments as in `pool`."""
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask = cols < HIDDEN
    if slot >= 0:
        begin = tl.load(query_start_loc_ptr + row)
        end = tl.load(query_start_loc_ptr + row + 1)
        is_begun = tl.load(seq_lens_ptr + row) > end - begin  # by an earlier step
        sum_ptr = sums_ptr + slot.to(tl.int64) * HIDDEN
        state = tl.load(sum_ptr + cols, mask=cols < tl.where(is_begun, HIDDEN, 0), other=0.0)
        if MODE == 0:
            first = tl.load(hidden_ptr + begin.to(tl.int64) * HIDDEN + cols, mask=mask, other=0.0)
            state = tl.where(is_begun, state, first.to(tl.float64))
        elif MODE == 1:
            last = tl.load(hidden_ptr + (end - 1).to(tl.int64) * HIDDEN + cols, mask=mask, other=0.0)
            state = last.to(tl.float64)
        else:
            first_ptr = hidden_ptr + begin.to(tl.int64) * HIDDEN
            for number in tl.range(0, end - begin):
                added = tl.load(first_ptr + number * HIDDEN + cols, mask=mask, other=0.0)
                state += added.to(tl.float64)
        tl.store(sum_ptr + cols, state, mask=mask)
        tl.store(output_ptr + row.to(tl.int64) * HIDDEN + cols, state.to(tl.float32), mask=mask)


def pool(
    hidden: torch.Tensor,
    slots: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    sums: torch.Tensor,
    output: torch.Tensor,
    mode: Mode,
) -> None:
    """Write what each sequence has come to with this step; a sequence may come in chunks. Nothing allocates or waits.

    hidden           [T, hidden_size], any float type
    slots            [S] int32 slot of each row; -1 is padding, of which nothing is written
    query_start_loc  [S + 1] int32: row s owns tokens query_start_loc[s] .. query_start_loc[s + 1], one at least
    seq_lens         [S] int32: tokens of each sequence, those of this step included
    sums             [M, hidden_size] float64: each slot's state between chunks. Tokens are added one after the
                     other, so the bits do not depend on how a sequence is chunked
    output           [S, hidden_size] float32: the state of each row's sequence
    """
    num_rows, hidden_size = output.shape
    assert hidden.shape[1] == sums.shape[1] == hidden_size, (hidden.shape, sums.shape, output.shape)
    assert slots.shape == seq_lens.shape == (num_rows,), (slots.shape, seq_lens.shape, num_rows)
    assert query_start_loc.shape == (num_rows + 1,), query_start_loc.shape
    assert (sums.dtype, output.dtype) == (torch.float64, torch.float32), (sums.dtype, output.dtype)
    assert hidden.numel() < 2**31, f"{hidden.shape} has too many numbers"
    for tensor in (hidden, slots, query_start_loc, seq_lens, sums, output):
        assert tensor.is_contiguous(), "every tensor must be contiguous"
        assert tensor.device == hidden.device, (tensor.device, hidden.device)
    for tensor in (slots, query_start_loc, seq_lens):
        assert tensor.dtype == torch.int32, tensor.dtype
    if num_rows:
        _pool[(num_rows, -(-hidden_size // _COLS))](
            hidden,
            slots,
            query_start_loc,
            seq_lens,
            sums,
            output,
            HIDDEN=hidden_size,
            MODE=_MODES[mode],
            COLS=_COLS,
            num_warps=4,
        )


AOT_SPECS = [
    AotSpec(
        function="_pool",
        label=f"{mode} of 1024",
        signature={
            "hidden_ptr": "*bf16:16",
            **dict.fromkeys(("slots_ptr", "query_start_loc_ptr", "seq_lens_ptr"), "*i32:16"),
            "sums_ptr": "*fp64:16",
            "output_ptr": "*fp32:16",
        },
        constexprs={"HIDDEN": 1024, "MODE": number, "COLS": _COLS},
        num_warps=4,
    )
    for mode, number in _MODES.items()
]
