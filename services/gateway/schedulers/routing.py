"""Which scheduler gets a request: a pure function of what the schedulers last said.

Costs are in tokens that have to be computed before the request's first one: those of the prompt that
the scheduler's cache lacks, those that wait there already, and a share for every running sequence,
all of it divided among the scheduler's workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

RUNNING_TOKENS = 32
"""What a running sequence counts for: it gets a token in every step that a new prompt takes."""
MIN_SESSION_TOKENS = 512
"""A session stays where it was for at least so many tokens of extra cost, and for its whole prompt."""
MISSING_BLOCK_FACTOR = 2
"""A block that is not free is paid for twice: by the new sequence, and by the one that loses it."""


@dataclass(frozen=True, slots=True)
class SchedulerView:
    """What the decision knows about one scheduler that takes requests.

    cached_tokens    tokens of this request's prompt that its prefix cache holds
    sent_tokens      tokens submitted since its last Load: it has not counted them yet
    recently_refused it refused a request a moment ago, and said that it will for a while
    """

    scheduler_id: str
    running: int = 0
    waiting_uncached_tokens: int = 0
    estimated_queue_ms: int = 0
    kv_blocks_free: int = 0
    kv_block_size: int = 16
    workers_ready: int = 1
    cached_tokens: int = 0
    sent_tokens: int = 0
    sent_requests: int = 0
    recently_refused: bool = False


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What the decision knows about the request. `remaining_ms` 0 means no deadline."""

    request_id: str
    num_tokens: int
    session_id: str = ""
    remaining_ms: int = 0


def choose(request: RouteRequest, views: Sequence[SchedulerView], home: int | None = None) -> int:
    """Return the index of the scheduler for a request; there must be at least one.

    Whoever can meet the deadline and did not just refuse comes first, then the cheapest. A session's
    own scheduler, the same one for every gateway, is kept while it is not much dearer; `home` is its index, where
    `views` are not all there are.
    """
    assert views, "a request without a scheduler"
    costs = [cost(request, view) for view in views]

    def rank(index: int) -> tuple[bool, bool, float]:
        view = views[index]
        late = bool(request.remaining_ms) and view.estimated_queue_ms > request.remaining_ms
        return late, view.recently_refused, costs[index]

    ranks = [rank(index) for index in range(len(views))]
    lowest = min(ranks)
    equals = [index for index, each in enumerate(ranks) if each == lowest]
    best = max(equals, key=lambda index: affinity(request.request_id, views[index].scheduler_id))
    if request.session_id:
        if home is None:
            home = max(range(len(views)), key=lambda index: affinity(request.session_id, views[index].scheduler_id))
        patience = max(MIN_SESSION_TOKENS, request.num_tokens)
        if ranks[home][:2] == lowest[:2] and costs[home] <= costs[best] + patience:
            return home
    return best


def cost(request: RouteRequest, view: SchedulerView) -> float:
    """Return how many tokens are computed, for each worker, before the first token of the request."""
    uncached = max(1, request.num_tokens - view.cached_tokens)
    busy = backlog(
        view.waiting_uncached_tokens + view.sent_tokens, view.running + view.sent_requests, view.workers_ready
    )
    missing = max(0, uncached + view.sent_tokens - view.kv_blocks_free * view.kv_block_size)
    return uncached + busy + MISSING_BLOCK_FACTOR * missing


def backlog(waiting_tokens: int, running: int, workers: int) -> float:
    """Return the tokens that come first, for each worker."""
    return (waiting_tokens + running * RUNNING_TOKENS) / max(1, workers)


def affinity(key: str, scheduler_id: str) -> int:
    """Return how much a key belongs to a scheduler: the same in every process, and little moves when one goes."""
    digest = hashlib.blake2b(f"{key}\0{scheduler_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
