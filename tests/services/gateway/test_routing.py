"""Which scheduler gets a request, as a pure function."""

from __future__ import annotations

import dataclasses

import pytest

from octavo.services.gateway.schedulers.routing import (
    MIN_SESSION_TOKENS,
    RUNNING_TOKENS,
    RouteRequest,
    SchedulerView,
    choose,
)

IDLE = SchedulerView("idle", kv_blocks_free=1000)


def view(name: str, **fields: object) -> SchedulerView:
    return dataclasses.replace(IDLE, scheduler_id=name, **fields)  # type: ignore[arg-type]


def choice(*views: SchedulerView, **fields: object) -> str:
    request = RouteRequest(**{"request_id": "r", "num_tokens": 100, **fields})  # type: ignore[arg-type]
    return views[choose(request, views)].scheduler_id


@pytest.mark.parametrize(
    "busy",
    [
        {"waiting_uncached_tokens": 1},
        {"running": 1},
        {"sent_tokens": 1},
        {"sent_requests": 1},
        {"kv_blocks_free": 0},
        {"recently_refused": True},
    ],
)
def test_anything_that_keeps_a_scheduler_busy_sends_the_request_elsewhere(busy: dict[str, object]) -> None:
    for request_id in "abcdef":
        assert choice(view("busy", **busy), view("idle"), request_id=request_id) == "idle"


def test_a_cached_prefix_wins_until_the_queue_there_costs_more() -> None:
    cached = view("cached", cached_tokens=96, waiting_uncached_tokens=90)
    assert choice(view("idle"), cached) == "cached"
    assert choice(view("idle"), dataclasses.replace(cached, waiting_uncached_tokens=100)) == "idle"


def test_load_counts_for_each_worker() -> None:
    assert choice(view("one", running=4), view("four", running=8, workers_ready=4)) == "four"


def test_who_would_miss_the_deadline_is_the_last_choice() -> None:
    slow = view("slow", estimated_queue_ms=900, cached_tokens=96)
    assert choice(slow, view("idle"), remaining_ms=1000) == "slow"
    assert choice(slow, view("idle"), remaining_ms=800) == "idle"


def test_there_is_always_a_choice() -> None:
    hopeless = view("only", recently_refused=True, estimated_queue_ms=10**9, kv_blocks_free=0, workers_ready=0)
    assert choice(hopeless, remaining_ms=1) == "only"


def test_a_session_stays_at_its_scheduler_while_that_is_not_much_dearer() -> None:
    names = ["a", "b", "c"]
    home = choice(*map(view, names), session_id="s")
    assert home == choice(*map(view, reversed(names)), session_id="s")  # every gateway finds the same
    limit = MIN_SESSION_TOKENS // RUNNING_TOKENS
    for extra, wanted in ((limit, {home}), (limit + 1, set(names) - {home})):
        views = [view(name, running=extra if name == home else 0) for name in names]
        assert choice(*views, session_id="s") in wanted


def test_few_sessions_move_when_a_scheduler_goes() -> None:
    sessions = [f"session-{n}" for n in range(200)]
    names = ["a", "b", "c", "d"]
    before = {session: choice(*map(view, names), session_id=session) for session in sessions}
    after = {session: choice(*map(view, names[:-1]), session_id=session) for session in sessions}
    assert {session for session in sessions if before[session] != after[session]} == {
        session for session in sessions if before[session] == "d"
    }
    assert set(before.values()) == set(names)


def test_equal_schedulers_share_the_requests() -> None:
    chosen = [choice(view("a"), view("b"), request_id=f"r{n}") for n in range(100)]
    assert 25 < chosen.count("a") < 75
