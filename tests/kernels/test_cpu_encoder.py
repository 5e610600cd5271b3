from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from octavo.kernels.cpu import encoder
from octavo.kernels.cpu.encoder import ALL_TOKENS, EncoderOp, EncoderProgram, EncoderStep, Table
from octavo.kernels.cpu.runtime import Runtime

NUM_HEADS, HEAD_DIM, VOCAB = 3, 16, 50
COLUMNS = 3 * NUM_HEADS * HEAD_DIM
LENGTHS = (300, 1, 0, 25, 12)


def attended(num_threads: int, before: int) -> npt.NDArray[np.float32]:
    """Return what attention makes of random queries, keys and values of some texts."""
    return run_attention(Runtime(num_threads=num_threads), before, LENGTHS)


def run_attention(runtime: Runtime, before: int, lengths: tuple[int, ...]) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(0)
    words = rng.standard_normal((VOCAB, COLUMNS + 16)).astype(np.float32)  # rows are padded
    ops = [
        EncoderOp(encoder.EMBED_SUM, -1, 0, COLUMNS, words=Table(words.ctypes.data, VOCAB, words.shape[1])),
        EncoderOp(
            encoder.SELF_ATTENTION,
            input=0,
            output=1,
            columns=NUM_HEADS * HEAD_DIM,
            num_heads=NUM_HEADS,
            num_kv_heads=NUM_HEADS,
            head_dim=HEAD_DIM,
            scale=HEAD_DIM**-0.5,
            before=before,
            after=ALL_TOKENS,
        ),
        EncoderOp(encoder.HIDDEN, 1, -1, NUM_HEADS * HEAD_DIM),
    ]
    total = sum(lengths)
    program = EncoderProgram(runtime, ops, [COLUMNS, NUM_HEADS * HEAD_DIM], total)
    columns = [rng.integers(0, VOCAB, total), np.zeros(total), np.cumsum([0, *lengths]), np.arange(total)]
    token_ids, positions, starts, rows = (np.ascontiguousarray(column, np.int32) for column in columns)
    pointers = (token_ids.ctypes.data, positions.ctypes.data, None, starts.ctypes.data, rows.ctypes.data)
    hidden = np.empty((total, NUM_HEADS * HEAD_DIM), np.float32)
    program.run(EncoderStep(*pointers, total, len(lengths), total), hidden)
    return hidden


@pytest.mark.parametrize("before", [40, ALL_TOKENS])
def test_bits_do_not_depend_on_how_many_threads_share_a_text(before: int) -> None:
    alone = attended(1, before)

    assert np.isfinite(alone).all()
    assert all((attended(num_threads, before) == alone).all() for num_threads in (2, 7, 64))


def test_each_thread_has_a_part_of_a_long_text() -> None:
    runtime = Runtime(num_threads=64)
    before = runtime.progress()

    run_attention(runtime, ALL_TOKENS, (1024,))

    rows_at_once = 8
    assert runtime.progress() - before - 2 * 1024 // rows_at_once >= 64, "pieces of work"
