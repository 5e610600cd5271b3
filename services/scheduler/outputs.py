"""What goes back to the gateways: the columns of a step's outputs, and how an ending is described."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

from octavo.common.v1 import common_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.sequence import Sequence, SequenceState
from octavo.worker.v1 import worker_pb2


class WorkerMisbehavedError(Exception):
    """A worker's answer does not fit what it was asked. The caller gives the worker up."""


def read_column(code: str, data: bytes) -> array[Any]:
    """Return a column of a worker's answer, of 4 byte elements "I" or "f". Raises WorkerMisbehavedError."""
    if len(data) % 4:
        raise WorkerMisbehavedError(f"a column of a step's answer has {len(data)} bytes, and elements of 4")
    return array(code, data)


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

    def add_vector(self, seq: Sequence, vector: bytes) -> None:
        """Append the float32 vector that ends a sequence."""
        self.vector_handles.append(seq.handle)
        self.vector_candidate_indexes.append(seq.candidate_index)
        self.vector_sizes.append(len(vector) // 4)
        self.vectors.append(vector)

    def add_prompt_logprobs(self, seq: Sequence, start: int, rows: list[LogprobRow]) -> None:
        """Append what belongs to the prompt's tokens from `start` on."""
        columns = common_pb2.LogprobColumns(width=seq.request.submit.prompt_logprobs)
        for chosen, rank, ids, values in rows:
            columns.chosen.append(chosen)
            columns.ranks.append(rank)
            columns.candidate_token_ids.extend(ids)
            columns.candidate_logprobs.extend(values)
        row = scheduler_pb2.PromptLogprobs(handle=seq.handle, position=start, columns=columns)
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


class LogprobReader:
    """Walks through the log probability columns of a StepResult."""

    def __init__(self, result: worker_pb2.StepResult) -> None:
        self._chosen = read_column("f", result.logprobs)
        self._ranks = read_column("I", result.ranks)
        self._ids = read_column("I", result.candidate_token_ids)
        self._values = read_column("f", result.candidate_logprobs)
        self._row = self._candidate = 0

    def read(self, width: int) -> LogprobRow:
        """Return the next row, with `width` alternatives. Raises WorkerMisbehavedError."""
        row, begin, end = self._row, self._candidate, self._candidate + width
        rows, values = min(len(self._chosen), len(self._ranks)), min(len(self._ids), len(self._values))
        if row >= rows or end > values:
            raise WorkerMisbehavedError("log probabilities are missing from a step's answer")
        self._row, self._candidate = row + 1, end
        return self._chosen[row], self._ranks[row], self._ids[begin:end], self._values[begin:end]


def stop_reason(seq: Sequence, token: int) -> common_pb2.FinishReason:
    """Why `token` ends `seq`."""
    if token in seq.request.submit.end_of_sequence_ids:
        return common_pb2.FINISH_REASON_END_OF_SEQUENCE
    return common_pb2.FINISH_REASON_STOP_TOKEN


def length_reason(seq: Sequence) -> common_pb2.FinishReason:
    """Why `seq` ends at its greatest length."""
    limit = seq.request.submit.stop.max_new_tokens
    if limit and seq.num_output >= limit:
        return common_pb2.FINISH_REASON_MAX_TOKENS
    return common_pb2.FINISH_REASON_CONTEXT_LIMIT


def phase(seq: Sequence) -> int:
    """Where `seq` is: a number of octavo.inference.v1.Progress.Phase."""
    if seq.state is SequenceState.WAITING:
        return 4 if seq.num_preemptions or seq.num_recoveries else 1
    return 2 if seq.num_behind > 1 else 3


def usage(seq: Sequence) -> common_pb2.Usage:
    """What `seq` has used."""
    return common_pb2.Usage(
        prompt_tokens=seq.num_prompt,
        cached_prompt_tokens=seq.num_cached_tokens,
        output_tokens=seq.num_output,
        speculative_accepted_tokens=seq.num_accepted,
    )


def timing(seq: Sequence, now: float) -> common_pb2.Timing:
    """Where the time of `seq` went. A phase that never began took no time."""
    scheduled = seq.first_scheduled_at or now
    first = seq.first_token_at or now
    return common_pb2.Timing(
        queue_us=int(1e6 * (scheduled - seq.admitted_at)),
        prefill_us=int(1e6 * (first - scheduled)),
        decode_us=int(1e6 * ((seq.last_token_at or first) - first)),
        preemptions=seq.num_preemptions,
    )
