"""Cuts a step into steps of few tokens, for models that compute a number of tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from octavo.gpu_worker.ops import StepInput


def tiles(step: StepInput, num_tokens: int) -> Iterator[tuple[StepInput, npt.NDArray[np.int64]]]:
    """Yield steps of at most `num_tokens` tokens, and which of the step's `logits_rows` each has.

    Tokens go by their positions: a sequence may read blocks that another one fills in the same step, and what it
    reads there is at lower positions than its own.
    """
    row_of_token = np.repeat(np.arange(len(step.seq_lens)), np.diff(step.query_start_loc))
    order = np.argsort(step.positions, kind="stable")
    for start in range(0, len(order), num_tokens):
        tokens = np.sort(order[start : start + num_tokens])
        rows, counts = np.unique(row_of_token[tokens], return_counts=True)
        ends = np.cumsum(counts)
        wanted = np.isin(tokens, step.logits_rows)
        tile = StepInput(
            token_ids=step.token_ids[tokens],
            positions=step.positions[tokens],
            slot_mapping=step.slot_mapping[tokens],
            query_start_loc=np.concatenate([[0], ends]).astype(np.int32),
            seq_lens=step.positions[tokens[ends - 1]] + np.int32(1),
            block_tables=step.block_tables[rows],
            logits_rows=np.flatnonzero(wanted).astype(np.int32),
        )
        yield tile, np.searchsorted(step.logits_rows, tokens[wanted])
