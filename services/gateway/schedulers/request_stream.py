"""What the scheduler has sent about one request, and has not been read yet.

The scheduler's stream is read by one task that never waits for a client: it appends to these lists
and wakes the reader. They are bounded by construction, by the length of the output.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.errors import ServingError


class Logprobs:
    """Columns of a candidate that have not been read; an entry for each token that has not been, either."""

    __slots__ = ("candidate_logprobs", "candidate_token_ids", "chosen", "ranks")

    def __init__(self) -> None:
        self.chosen: list[float] = []
        self.ranks: list[int] = []
        self.candidate_token_ids: list[int] = []
        self.candidate_logprobs: list[float] = []

    def take(self, count: int, width: int) -> common_pb2.LogprobColumns:
        """Remove and return the entries of the first `count` tokens, `width` alternatives each."""
        columns = common_pb2.LogprobColumns(
            chosen=self.chosen[:count],
            ranks=self.ranks[:count],
            width=width,
            candidate_token_ids=self.candidate_token_ids[: count * width],
            candidate_logprobs=self.candidate_logprobs[: count * width],
        )
        del self.chosen[:count], self.ranks[:count]
        del self.candidate_token_ids[: count * width], self.candidate_logprobs[: count * width]
        return columns


class Place(Protocol):
    """Where requests are submitted: a SchedulerPeer."""

    def detach(self, stream: RequestStream, candidates: Sequence[CandidateInbox]) -> None:
        """Let candidates go on without a stream."""

    def drop(self, stream: RequestStream, candidates: Sequence[CandidateInbox]) -> None:
        """End candidates."""


class CandidateInbox:
    """One candidate: written by its scheduler's peer, read by the call's handler."""

    __slots__ = ("finished", "handle", "index", "logprobs", "num_read", "place", "token_ids", "vector")

    def __init__(self, index: int) -> None:
        self.index = index
        self.handle = 0
        """The handle it is submitted under now; 0 while it waits for a scheduler."""
        self.place: Place | None = None
        """Where `handle` is known, while it is not 0."""
        self.token_ids: list[int] = []
        """All its tokens after `continue_output`; also what another scheduler would go on from."""
        self.num_read = 0
        """Of these, how many the handler has taken."""
        self.logprobs = Logprobs()
        self.vector = b""
        """What is made of an input: float32, little-endian. It ends the candidate."""
        self.finished: scheduler_pb2.Finished | None = None


class RequestStream:
    """One request at the scheduler. `close` it in any case."""

    def __init__(
        self,
        submit: scheduler_pb2.Submit,
        deadline: float | None,
        end: Callable[[RequestStream, int | None, bool], None],
        session_id: str = "",
        num_output: int = 0,
    ) -> None:
        """`deadline` is a time of the event loop.

        num_output  most tokens of output, if the client said so: schedulers must have room for them

        end: tells the scheduler that a candidate ended, or (None) that the reader leaves; with True as the
            last argument the request goes on for its resume window.
        """
        self.submit = submit
        self.session_id = session_id
        self.block_hashes: dict[int, Sequence[int]] = {}
        """Those of the prompt, by the size of a block, as far as they were needed: output changes none of them."""
        self.deadline = deadline
        self.submitted_at = asyncio.get_running_loop().time()
        self.wants_logprobs = submit.chosen_logprob
        self.candidates = [CandidateInbox(index) for index in range(submit.candidate_count)]
        self.prompt_logprobs = common_pb2.LogprobColumns(width=submit.prompt_logprobs)
        """Of the prompt's tokens but the first, as far as they have come."""
        self.admitted: scheduler_pb2.Admitted | None = None
        self.reattached: scheduler_pb2.Reattached | None = None
        """The answer to a Reattach."""
        self.can_move = True
        """`submit` is complete: another scheduler could go on with it."""
        self.is_reading = True
        """The handler waits for tokens. While it does not, it writes, and may be held up by its client."""
        self.num_rounds = 0
        """How often the handler has looked for tokens."""
        self.interrupt: Callable[[], None] = lambda: None
        """Ends the handler's write, if it is in one, with TimeoutError."""
        self.progress: generation_pb2.Progress | None = None
        self.error: ServingError | None = None
        self.failovers = 0
        self.lost_at = 0.0
        """When it lost its scheduler, a time of the event loop; 0 while one has all of it."""
        self.takeovers: list[tuple[float, float]] = []
        """When it lost a scheduler, and when one went on with it."""
        self.max_output = num_output
        """Tokens of output that schedulers must have room for; 0: as many as there is room for."""
        self.refused_by: set[str] = set()
        """Addresses of schedulers that did not admit it."""
        self.scheduler_id = ""
        """Who has it now, or had it last."""
        self.model_version = ""
        """Of the weights that made its output; it goes on with no others."""
        self._end = end
        self._waiter: asyncio.Future[None] | None = None
        self._changed = False
        self._only_ends = False

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.error is not None or all(candidate.finished is not None for candidate in self.candidates)

    @property
    def num_prompt_logprobs_missing(self) -> int:
        """Prompt tokens whose log probabilities are wanted and have not come."""
        if not self.submit.prompt_logprobs:
            return 0
        return len(self.submit.prompt_token_ids) - 1 - len(self.prompt_logprobs.chosen)

    def add_prompt_logprobs(self, position: int, columns: common_pb2.LogprobColumns) -> None:
        """Append what is new of a stretch of the prompt. ValueError: it leaves a gap, or is another width."""
        known, width = self.prompt_logprobs, columns.width
        skipped = len(known.chosen) + 1 - position
        if skipped < 0 or width != known.width:
            raise ValueError(f"log probabilities from prompt token {position} on, after {len(known.chosen) + 1}")
        known.chosen.extend(columns.chosen[skipped:])
        known.ranks.extend(columns.ranks[skipped:])
        known.candidate_token_ids.extend(columns.candidate_token_ids[skipped * width :])
        known.candidate_logprobs.extend(columns.candidate_logprobs[skipped * width :])

    @property
    def num_longest(self) -> int:
        """Tokens of the longest sequence that a scheduler has to hold now, with the one to come."""
        if self.submit.HasField("pooling"):
            return max(self.submit.pooling.input_lengths, default=0)
        most = max((len(each.token_ids) for each in self.candidates), default=0)
        return len(self.submit.prompt_token_ids) + len(self.submit.continue_token_ids) + most + 1

    @property
    def num_wanted(self) -> int:
        """Tokens of the longest sequence when it ends, as far as the client said."""
        wanted = len(self.submit.prompt_token_ids) + self.max_output if self.max_output else 0
        return max(wanted, self.num_longest)

    @property
    def num_output_tokens(self) -> int:
        """Tokens of all candidates, `continue_output` not included."""
        return sum(len(candidate.token_ids) for candidate in self.candidates)

    async def wait(self) -> None:
        """Return when something has changed since the last wait. One task at a time may wait."""
        if not self._changed:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._changed = False

    async def hold(self, seconds: float) -> None:
        """Let tokens gather for so long, or until the request has ended."""
        if self.ended or seconds <= 0:
            return
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        self._only_ends = True
        timer = loop.call_later(seconds, self._release)
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None
            self._only_ends = False

    def wake(self) -> None:
        """Tell the reader that there are tokens."""
        self._changed = True
        if not self._only_ends:
            self._release()

    def wake_at_end(self) -> None:
        """Tell the reader that a candidate, or the request, has ended: no wait holds this back."""
        self._changed = True
        self._release()

    def fail(self, error: ServingError) -> None:
        """End the request with an error; the first one counts."""
        if not self.ended:
            self.error = error
            self.wake_at_end()

    def cut_off(self, error: ServingError) -> None:
        """End the request with an error, even in the middle of a write."""
        self.fail(error)
        if not self.is_reading:
            self.interrupt()

    def cancel(self, candidate_index: int) -> None:
        """End one candidate here, and tell the scheduler.

        With a resume window it is told when the stream is closed: until then the output could be asked for again.
        """
        candidate = self.candidates[candidate_index]
        if candidate.finished is None:
            if not self.submit.resume_window_ms:
                self._end(self, candidate_index, False)
            candidate.finished = scheduler_pb2.Finished(candidate_index=candidate_index)

    def close(self, keep: bool = False) -> None:
        """Forget the request; tell the scheduler, if it still has it.

        keep: it goes on for its resume window, if it has one.
        """
        self._end(self, None, keep and self.submit.resume_window_ms > 0)

    def _release(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def places_of(candidates: Iterable[CandidateInbox]) -> list[Place]:
    """Return where candidates are submitted now, each place once."""
    return list(dict.fromkeys(each.place for each in candidates if each.handle and each.place is not None))
