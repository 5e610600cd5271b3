"""Requests that outlive their gateway's stream, so that another one can take them over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.ended_requests import EndedRequests
from octavo.services.scheduler.outputs import Outbox
from octavo.services.scheduler.sequence import Request, Sequence

MAX_STATE_BYTES = 65_536  # of Submit.gateway_state
MAX_UNREAD_TOKENS = 4096  # made by a request while no stream takes them
TOKENS_PER_MESSAGE = 8192  # of a replay


class ResumableRequests:
    """The requests with a resume window, by id: those that run, and for the window those that ended.

    `detached` are those without a stream, each with the tokens it had when its stream broke.
    """

    def __init__(self, max_window_ms: int, max_bytes: int, weights: Mapping[str, float]) -> None:
        """Keep ended requests in at most `max_bytes`, shared among tenants by their `weights`."""
        self._max_window_ms = max_window_ms
        self._by_id: dict[tuple[str, str], Request] = {}  # by tenant and id: one cannot touch another's
        self._ended = EndedRequests(max_bytes, weights)
        self.detached: dict[Request, int] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, request: Request) -> None:
        """Remember a request that was admitted."""
        if request.submit.resume_window_ms and not request.submit.HasField("pooling"):  # vectors are not kept
            old = self._by_id.get(_key(request))
            if old is not None:
                self.forget(old)
            self._by_id[_key(request)] = request

    def window_s(self, request: Request) -> float:
        """Return how long a request is kept, without a stream or ended."""
        return min(request.submit.resume_window_ms, self._max_window_ms) / 1000

    def holds(self, request: Request) -> bool:
        """Return whether a request can be taken over."""
        return self._by_id.get(_key(request)) is request

    def replaced_by(self, request: Request) -> Request | None:
        """Return the request without a stream that `request` has the id of: it starts over."""
        old = self._by_id.get(_key(request))
        return old if old in self.detached else None

    def get(self, request_id: str, tenant: str) -> Request | None:
        """Return a request of a tenant that runs or is still kept."""
        return self._by_id.get((tenant, request_id))

    def forget(self, request: Request) -> None:
        """Keep a request no longer."""
        if self.holds(request):
            del self._by_id[_key(request)]
        self._ended.remove(request)
        self.detached.pop(request, None)

    def ended(self, request: Request, now: float) -> None:
        """Keep a request that has ended for its window, if there is room."""
        self.detached.pop(request, None)
        if not self.holds(request):
            return
        for seq in request.sequences:
            seq.block_hashes = []  # it will compute nothing more
        self._ended.add(request, now + self.window_s(request))
        self._forget_ended(now)

    def expired(self, now: float) -> Iterator[Request]:
        """Forget the ended requests whose window is over; yield the running ones that nobody took over in time.

        The caller ends those.
        """
        self._forget_ended(now)
        for request, had in list(self.detached.items()):
            if request.resume_until <= now or num_output(request) - had > MAX_UNREAD_TOKENS:
                yield request

    def _forget_ended(self, now: float) -> None:
        while (request := self._ended.next_to_go(now)) is not None:
            self.forget(request)

    def check_invariants(self, live: set[Request]) -> None:
        """Assert that what is kept has not been lost track of. `live` are all that have not ended."""
        assert self.detached.keys() <= live
        assert all(request in live or request in self._ended for request in self._by_id.values())
        assert len(self._ended) == sum(request in self._ended for request in self._by_id.values())
        self._ended.check_invariants()


def _key(request: Request) -> tuple[str, str]:
    return request.submit.tenant, request.submit.request_id


def num_output(request: Request) -> int:
    """Return the output tokens of all candidates of a request."""
    return sum(seq.num_output for seq in request.sequences)


def replay(request: Request, next_token_offsets: list[int]) -> Iterator[scheduler_pb2.AttachResponse]:
    """Yield what a gateway that takes `request` over has not seen: tokens from the offsets on, and endings.

    None of it is new, so the step is 0. Log probabilities are there for what was made here.
    """
    box = Outbox()
    size = 0
    for index, seq in enumerate(request.sequences):
        offset = next_token_offsets[index] if index < len(next_token_offsets) else 0
        tokens = seq.tokens[seq.num_prompt + offset :]
        for at in range(0, len(tokens), TOKENS_PER_MESSAGE):
            part = tokens[at : at + TOKENS_PER_MESSAGE]
            if size + len(part) > TOKENS_PER_MESSAGE and box.handles:
                yield _message(box)
                size = 0
            _add_row(box, seq, list(part), offset + at)
            size += len(part)
        if seq.ending is not None:
            box.finished.append(seq.ending)
            box.finished[-1].handle = request.handle
    if box.handles or box.finished:
        yield _message(box)


def has_logprobs_from(request: Request, next_token_offsets: list[int]) -> bool:
    """Return whether the log probabilities that `replay` would need are there."""
    for index, seq in enumerate(request.sequences):
        offset = next_token_offsets[index] if index < len(next_token_offsets) else 0
        if seq.num_logprobs >= 0 and offset < seq.num_output - len(seq.kept_logprobs):
            return False
    return True


def _add_row(box: Outbox, seq: Sequence, tokens: list[int], offset: int) -> None:
    box.handles.append(seq.handle)
    box.candidate_indexes.append(seq.candidate_index)
    box.token_counts.append(len(tokens))
    box.token_ids.extend(tokens)
    if seq.num_logprobs >= 0:
        first = offset - (seq.num_output - len(seq.kept_logprobs))
        for row in seq.kept_logprobs[first : first + len(tokens)]:
            box.add_logprobs(row)


def _message(box: Outbox) -> scheduler_pb2.AttachResponse:
    message = box.take(step_id=0)
    assert message is not None
    return message
