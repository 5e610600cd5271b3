"""Requests with a resume window outlive their gateway's stream, so that another one can reattach to them."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.requests.outbox import Outbox
from octavo.services.scheduler.requests.sequence import Request, Sequence

# What a request takes in memory, measured: itself and its message, and each of its parts.
REQUEST_BYTES = 8192
SEQUENCE_BYTES = 4096
TOKEN_BYTES = 8
LOGPROB_BYTES = 320  # of a token, and of
ALTERNATIVE_BYTES = 16  # each of its alternatives


class EndedRequests:
    """Keeps each request for its time, as long as there is room.

    When there is none, the tenant that has most for its weight gives up what ended first. So a tenant pushes out
    its own, and never what another one keeps with less.
    """

    def __init__(self, max_bytes: int, weights: Mapping[str, float]) -> None:
        """`weights`: shares of tenants; others weigh 1."""
        self._max_bytes = max_bytes
        self._weights = weights
        self._by_tenant: dict[str, dict[Request, int]] = {}  # the bytes of each, the first to end first
        self._bytes: dict[str, int] = {}  # by tenant
        self._by_arrival: dict[int, Request] = {}
        # Heaps, with entries that are out of date: when each ends, by arrival, and the largest tenants.
        self._until: list[tuple[float, int]] = []
        self._largest: list[tuple[float, str]] = []
        self.num_bytes = 0

    def __contains__(self, request: Request) -> bool:
        return self._by_arrival.get(request.arrival) is request

    def __len__(self) -> int:
        return len(self._by_arrival)

    def add(self, request: Request, until: float) -> None:
        """Keep a request."""
        assert request not in self, request
        size = size_of(request)
        self._by_tenant.setdefault(request.submit.tenant, {})[request] = size
        self._by_arrival[request.arrival] = request
        heapq.heappush(self._until, (until, request.arrival))
        self._resize(request.submit.tenant, size)

    def remove(self, request: Request) -> None:
        """Keep a request no longer, if it is here."""
        if request not in self:
            return
        tenant = request.submit.tenant
        kept = self._by_tenant[tenant]
        size = kept.pop(request)
        if not kept:
            del self._by_tenant[tenant]
        del self._by_arrival[request.arrival]
        self._resize(tenant, -size)
        if len(self._until) > 64 + 4 * len(self._by_arrival):  # mostly of requests that are gone
            self._until = [entry for entry in self._until if entry[1] in self._by_arrival]
            heapq.heapify(self._until)

    def next_to_go(self, now: float) -> Request | None:
        """Return a request whose time is over, or that has no room; None if there is none."""
        while self._until and self._until[0][0] <= now:
            _, arrival = heapq.heappop(self._until)
            if arrival in self._by_arrival:
                return self._by_arrival[arrival]
        if self.num_bytes <= self._max_bytes:
            return None
        while True:
            weighed, tenant = self._largest[0]
            if -weighed == self._weighed(tenant):
                return next(iter(self._by_tenant[tenant]))
            heapq.heappop(self._largest)

    def _resize(self, tenant: str, change: int) -> None:
        """Count bytes of a tenant more or less."""
        self.num_bytes += change
        size = self._bytes[tenant] = self._bytes.get(tenant, 0) + change
        if not size:
            del self._bytes[tenant]
        else:
            heapq.heappush(self._largest, (-self._weighed(tenant), tenant))
        if len(self._largest) > 64 + 4 * len(self._bytes):  # mostly sizes of the past
            self._largest = [(-self._weighed(other), other) for other in self._bytes]
            heapq.heapify(self._largest)

    def _weighed(self, tenant: str) -> float:
        return self._bytes.get(tenant, 0) / self._weights.get(tenant, 1.0)

    def check_invariants(self) -> None:
        """Assert that bytes and requests agree."""
        assert self._bytes == {tenant: sum(kept.values()) for tenant, kept in self._by_tenant.items()}
        assert self.num_bytes == sum(self._bytes.values())
        everyone = {request for kept in self._by_tenant.values() for request in kept}
        assert everyone == set(self._by_arrival.values())
        assert {request.arrival for request in everyone} <= {arrival for _, arrival in self._until}


def size_of(request: Request) -> int:
    """Return about how many bytes of memory a request takes that has ended."""
    submit = request.submit
    size = REQUEST_BYTES + TOKEN_BYTES * len(submit.prompt_token_ids) + 2 * len(submit.gateway_state)
    size += 2 * submit.constraint.ByteSize()
    for seq in request.sequences:
        size += SEQUENCE_BYTES + TOKEN_BYTES * len(seq.token_ids)
        size += (LOGPROB_BYTES + ALTERNATIVE_BYTES * max(seq.num_logprobs, 0)) * len(seq.kept_logprobs)
    return size


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
        self._windows: list[tuple[float, int, Request]] = []  # heap of (end, number, request), some out of date
        self._num_windows = 0

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
        """Return whether a gateway can reattach to a request."""
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

    def detach(self, request: Request, now: float) -> None:
        """Let a request go on without a stream for its window."""
        request.resume_until = now + self.window_s(request)
        self.detached[request] = request.num_output_tokens
        self._num_windows += 1
        heapq.heappush(self._windows, (request.resume_until, self._num_windows, request))

    def _is_open(self, window: tuple[float, int, Request]) -> bool:
        end, _, request = window
        return request in self.detached and request.resume_until == end

    def ended(self, request: Request, now: float) -> None:
        """Keep a request that has ended for its window, if there is room."""
        self.detached.pop(request, None)
        if not self.holds(request):
            return
        for seq in request.sequences:
            seq.drop_hashes()
        self._ended.add(request, now + self.window_s(request))
        self._forget_ended(now)

    def expired(self, running: Iterable[Sequence], now: float) -> Iterator[Request]:
        """Forget the ended requests whose window is over; yield the detached ones that nobody took over in time.

        And those that have made too much meanwhile, of which some are among the sequences that are `running`. The
        caller ends all of them, once it has them all.
        """
        self._forget_ended(now)
        while self._windows and self._windows[0][0] <= now:
            window = heapq.heappop(self._windows)
            if self._is_open(window):
                yield window[-1]
        if len(self._windows) > 64 + 4 * len(self.detached):  # mostly of requests that are not detached any more
            self._windows = [window for window in self._windows if self._is_open(window)]
            heapq.heapify(self._windows)
        for request in dict.fromkeys(seq.request for seq in running) if self.detached else ():
            had = self.detached.get(request)
            if had is not None and request.num_output_tokens - had > MAX_UNREAD_TOKENS:
                yield request

    def _forget_ended(self, now: float) -> None:
        while (request := self._ended.next_to_go(now)) is not None:
            self.forget(request)

    def check_invariants(self, live: set[Request]) -> None:
        """Assert that what is kept has not been lost track of. `live` are all that have not ended."""
        assert self.detached.keys() <= live
        assert self.detached.keys() == {window[-1] for window in self._windows if self._is_open(window)}
        assert all(request in live or request in self._ended for request in self._by_id.values())
        assert len(self._ended) == sum(request in self._ended for request in self._by_id.values())
        self._ended.check_invariants()


def _key(request: Request) -> tuple[str, str]:
    return request.submit.tenant, request.submit.request_id


def replay(request: Request, next_token_offsets: list[int]) -> Iterator[scheduler_pb2.AttachResponse]:
    """Yield what a gateway that reattaches to `request` has not seen: tokens from the offsets on, and endings.

    None of it is new, so the step is 0. Log probabilities are there for what was made here.
    """
    box = Outbox()
    size = 0
    for index, seq in enumerate(request.sequences):
        offset = next_token_offsets[index] if index < len(next_token_offsets) else 0
        tokens = seq.token_ids[seq.num_prompt_tokens + offset :]
        for at in range(0, len(tokens), TOKENS_PER_MESSAGE):
            part = tokens[at : at + TOKENS_PER_MESSAGE]
            if size + len(part) > TOKENS_PER_MESSAGE and box.handles:
                yield _message(box)
                size = 0
            _add_row(box, seq, list(part), offset + at)
            size += len(part)
        if seq.finished is not None:
            box.finished.append(seq.finished)
            box.finished[-1].handle = request.handle
    if box.handles or box.finished:
        yield _message(box)


def can_replay_from(request: Request, next_token_offsets: list[int]) -> bool:
    """Return whether `replay` has what comes at these offsets: the tokens, and their log probabilities.

    An offset beyond the output is of another attempt at the same request, which had got further.
    """
    for index, seq in enumerate(request.sequences):
        offset = next_token_offsets[index] if index < len(next_token_offsets) else 0
        if offset > seq.num_output_tokens:
            return False
        if seq.num_logprobs >= 0 and offset < seq.num_output_tokens - len(seq.kept_logprobs):
            return False
    return True


def _add_row(box: Outbox, seq: Sequence, tokens: list[int], offset: int) -> None:
    box.handles.append(seq.handle)
    box.candidate_indexes.append(seq.candidate_index)
    box.token_counts.append(len(tokens))
    box.token_ids.extend(tokens)
    if seq.num_logprobs >= 0:
        first = offset - (seq.num_output_tokens - len(seq.kept_logprobs))
        for row in seq.kept_logprobs[first : first + len(tokens)]:
            box.add_logprobs(row)


def _message(box: Outbox) -> scheduler_pb2.AttachResponse:
    message = box.take(step_id=0)
    assert message is not None
    return message
