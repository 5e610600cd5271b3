"""The log probability columns of a step, which have entries for some of its rows only."""

from __future__ import annotations

from collections.abc import Iterable

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.gateway.schedulers.request_stream import CandidateInbox


class StepColumns:
    """Walks through the columns, row after row."""

    def __init__(self, step: scheduler_pb2.StepOutputs, rows: Iterable[tuple[int, int | None]]) -> None:
        """`rows`: tokens of each row, and how many alternatives each of them has; None if it has no entry.

        Raises ValueError if the columns have other entries than these rows: then no entry's owner is known, and
        nothing of them may be given to anybody.
        """
        entries = [(count, count * width) for count, width in rows if width is not None]
        tokens, alternatives = sum(count for count, _ in entries), sum(count for _, count in entries)
        found = len(step.logprobs), len(step.ranks), len(step.candidate_token_ids), len(step.candidate_logprobs)
        wanted = tokens, tokens, alternatives, alternatives
        if found != wanted:
            raise ValueError(f"columns of log probabilities have {found} entries, their rows {wanted}")
        self._step = step
        self._tokens = slice(0, 0)
        self._alternatives = slice(0, 0)

    def next(self, count: int, width: int) -> None:
        """Go to the next row that has entries: `count` tokens with `width` alternatives each."""
        self._tokens = slice(self._tokens.stop, self._tokens.stop + count)
        self._alternatives = slice(self._alternatives.stop, self._alternatives.stop + count * width)

    def append_to(self, candidate: CandidateInbox) -> None:
        """Copy this row's entries."""
        step, logprobs = self._step, candidate.logprobs
        logprobs.chosen.extend(step.logprobs[self._tokens])
        logprobs.ranks.extend(step.ranks[self._tokens])
        logprobs.candidate_token_ids.extend(step.candidate_token_ids[self._alternatives])
        logprobs.candidate_logprobs.extend(step.candidate_logprobs[self._alternatives])
