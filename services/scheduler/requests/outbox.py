"""The outbox of a gateway gathers what it is owed of a step, and makes a message of it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

from octavo.common.v1 import common_pb2
from octavo.scheduler.v1 import scheduler_pb2

LogprobRow = tuple[float, int, "array[int]", "array[float]"]
"""Of one token: log probability, rank, alternatives and their log probabilities."""


@dataclass(eq=False)
class Outbox:
    """What one gateway is owed of the step being digested: columns of a StepOutputs, under their names there."""

    handles: list[int] = field(default_factory=list)
    candidate_indexes: list[int] = field(default_factory=list)
    token_counts: list[int] = field(default_factory=list)  # empty: 1 in each row
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    candidate_token_ids: list[int] = field(default_factory=list)
    candidate_logprobs: list[float] = field(default_factory=list)
    finished: list[scheduler_pb2.Finished] = field(default_factory=list)
    vector_handles: list[int] = field(default_factory=list)
    vector_candidate_indexes: list[int] = field(default_factory=list)
    vector_sizes: list[int] = field(default_factory=list)
    vectors: list[bytes] = field(default_factory=list)  # there one after the other
    prompt_logprobs: list[scheduler_pb2.PromptLogprobs] = field(default_factory=list)

    def add_vector(self, handle: int, candidate_index: int, vector: bytes) -> None:
        """Append the float32 vector that ends a sequence."""
        self.vector_handles.append(handle)
        self.vector_candidate_indexes.append(candidate_index)
        self.vector_sizes.append(len(vector) // 4)
        self.vectors.append(vector)

    def add_prompt_logprobs(self, handle: int, width: int, start: int, rows: list[LogprobRow]) -> None:
        """Append the log probabilities of the prompt's tokens from `start` on, each with `width` alternatives."""
        columns = common_pb2.LogprobColumns(width=width)
        for chosen, rank, ids, values in rows:
            columns.chosen.append(chosen)
            columns.ranks.append(rank)
            columns.candidate_token_ids.extend(ids)
            columns.candidate_logprobs.extend(values)
        row = scheduler_pb2.PromptLogprobs(handle=handle, position=start, columns=columns)
        self.prompt_logprobs.append(row)

    def add_logprobs(self, row: LogprobRow) -> None:
        """Append what belongs to one token of a row that wants it."""
        chosen, rank, ids, values = row
        self.logprobs.append(chosen)
        self.ranks.append(rank)
        self.candidate_token_ids.extend(ids)
        self.candidate_logprobs.extend(values)

    def take(self, step_id: int) -> scheduler_pb2.AttachResponse | None:
        """Return its content as a message, StepOutputs, and empty it; None if there is none.

        This is done for every step: a column that is empty costs nothing, and what is filled is written once.
        """
        filled = {name: column for name, column in vars(self).items() if column}
        if not filled:
            return None
        outputs: dict[str, Any] = {"step_id": step_id, **filled}
        if not any(self.candidate_indexes):
            outputs.pop("candidate_indexes", None)
        if self.vectors:
            outputs["vectors"] = b"".join(self.vectors)
        message = scheduler_pb2.AttachResponse(step_outputs=outputs)
        for column in filled.values():
            column.clear()
        return message
