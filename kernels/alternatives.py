# ruff: noqa: N803 - constants of a kernel are upper case
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The best tokens of a row of logits with their log probabilities, best first, lower ids first on a tie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels.aot_spec import AotSpec
from octavo.kernels.configs import LOGITS, ROW_TARGETS, RowConfig
from octavo.kernels.sampling_kernels import log_total

MAX_ALTERNATIVES = 32


@triton.jit(do_not_specialize=["count"])
def _alternatives(logits_ptr, ids_ptr, logprobs_ptr, count, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Find the `count` best of one row. Grid (R,).

    Each pass finds the best token after the one before, so equal logits come in the order of ids. The
    log probability is computed as `token_logprobs` does it, to the bit.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * VOCAB
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in tl.range(0, VOCAB, BLOCK):
        token = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(logits_ptr + token, mask=token < VOCAB, other=float("-inf")))
    highest = tl.max(best)
    log_sum = log_total(logits_ptr, highest, VOCAB, BLOCK)
    last = highest
    last_id = tl.full((), -1, tl.int32)
    for place in tl.range(0, count):
        # Of the tokens after (last, last_id) the highest logit, and the lowest id that has it.
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        best_id = tl.full([BLOCK], VOCAB, tl.int32)
        for start in tl.range(0, VOCAB, BLOCK):
            token = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + token, mask=token < VOCAB, other=float("-inf"))
            is_after = ((x < last) | ((x == last) & (token > last_id))) & (token < VOCAB)
            is_better = is_after & ((x > best) | (best_id == VOCAB))  # ids of a lane ascend: the first stays
            best = tl.where(is_better, x, best)
            best_id = tl.where(is_better, token, best_id)
        last = tl.max(tl.where(best_id < VOCAB, best, float("-inf")))
        last_id = tl.min(tl.where(best == last, best_id, VOCAB))
        tl.store(ids_ptr + row * count + place, last_id)
        tl.store(logprobs_ptr + row * count + place, last - highest - log_sum)


def alternatives(logits: torch.Tensor, token_ids: torch.Tensor, logprobs: torch.Tensor, *, config: RowConfig) -> None:
    """Write the K best tokens of each row and their log probabilities.

    logits     [R, V] float32; a row with a NaN or +inf gives values without a meaning
    token_ids  [R, K] int32 written;  logprobs [R, K] float32 written; K at most MAX_ALTERNATIVES and V
    config     `configs.LOGITS` of the target
    """
    num_rows, vocab_size = logits.shape
    count = token_ids.shape[1]
    assert token_ids.shape == logprobs.shape == (num_rows, count), (token_ids.shape, logprobs.shape)
    assert 0 < count <= min(MAX_ALTERNATIVES, vocab_size), count
    assert logits.dtype == logprobs.dtype == torch.float32, (logits.dtype, logprobs.dtype)
    assert token_ids.dtype == torch.int32, token_ids.dtype
    for tensor in (logits, token_ids, logprobs):
        assert tensor.is_contiguous(), "every tensor must be contiguous"
    if num_rows:
        _alternatives[(num_rows,)](
            logits,
            token_ids,
            logprobs,
            count,
            VOCAB=vocab_size,
            BLOCK=config.block,
            num_warps=config.num_warps,
            num_stages=2,
            enable_fp_fusion=True,
        )


AOT_SPECS = [
    AotSpec(
        function="_alternatives",
        label="",
        signature={"logits_ptr": "*fp32:16", "ids_ptr": "*i32:16", "logprobs_ptr": "*fp32:16", "count": "i32"},
        constexprs={"VOCAB": 128256, "BLOCK": LOGITS[target].block},
        num_warps=LOGITS[target].num_warps,
        targets=(target,),
        require={"ld128": 1},
    )
    for target in ROW_TARGETS
]
