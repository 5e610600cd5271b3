"""Log probabilities of prompt tokens: which rows of logits they take, and what they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from octavo.gpu_worker.ops import Float32Array, Int32Array, UInt32Array
from octavo.gpu_worker.sampling.sampler import Sampled, TokenLogprobs, logprobs_of, with_logprobs_before
from octavo.gpu_worker.sampling.settings import SamplingSettings
from octavo.gpu_worker.steps.batch import Step


@dataclass(frozen=True)
class PromptRows:
    """The tokens of a step that are followed by a token of their prompt, of slots that want to know about those.

    rows     [P] indexes into the step's tokens, ascending
    targets  [P] the tokens that follow
    widths   [P] how many alternatives are wanted
    """

    rows: Int32Array
    targets: UInt32Array
    widths: Int32Array


class PromptScores:
    """The prompts of slots whose log probabilities are wanted."""

    def __init__(self) -> None:
        self._slots: dict[int, SamplingSettings] = {}

    def open_slot(self, slot: int, settings: SamplingSettings) -> None:
        """Learn what a slot wants; what it held before is forgotten."""
        self._slots.pop(slot, None)
        if settings.prompt_logprobs:
            self._slots[slot] = settings

    def free_slot(self, slot: int) -> None:
        """Forget a slot."""
        self._slots.pop(slot, None)

    def rows_of(self, step: Step) -> PromptRows | None:
        """Return the rows of logits that a step needs for prompts; None if it needs none."""
        if not self._slots:
            return None
        rows: list[npt.NDArray[np.int32]] = []
        targets: list[UInt32Array] = []
        widths: list[npt.NDArray[np.int32]] = []
        starts = (step.rows.query_ends - step.rows.query_lengths).tolist()
        for index, slot in enumerate(step.rows.slots.tolist()):
            settings = self._slots.get(slot)
            if settings is None:
                continue
            length, context = int(step.rows.query_lengths[index]), int(step.context_lengths[index])
            following = settings.history_token_ids[context + 1 : min(context + length + 1, settings.prompt_length)]
            rows.append(np.arange(starts[index], starts[index] + len(following), dtype=np.int32))
            targets.append(following)
            widths.append(np.full(len(following), settings.prompt_logprobs, np.int32))
        if not any(map(len, rows)):
            return None
        return PromptRows(np.concatenate(rows), np.concatenate(targets), np.concatenate(widths))


def merged_rows(prompts: PromptRows, logits_rows: Int32Array) -> tuple[Int32Array, npt.NDArray[np.bool_]]:
    """Return all rows of logits of a step, ascending, and which of them are of prompts.

    logits_rows  those that tokens are drawn from: none is followed by a token of its prompt
    """
    rows = np.concatenate([prompts.rows, logits_rows])
    order = np.argsort(rows)
    return rows[order], order < len(prompts.rows)


def with_prompts(sampled: Sampled, prompts: PromptRows, logits: Float32Array) -> Sampled:
    """Return what a step made, with the log probabilities of prompts before those of drawn tokens.

    logits  [P, vocab_size] of the prompts' rows
    """
    columns = zip(logits, prompts.targets.tolist(), prompts.widths.tolist(), strict=True)
    scores: list[TokenLogprobs] = [logprobs_of(row, token_id, width) for row, token_id, width in columns]
    return with_logprobs_before(sampled, scores)
