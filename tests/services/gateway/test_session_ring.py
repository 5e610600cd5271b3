"""To which scheduler a session belongs, while schedulers come and go."""

from __future__ import annotations

from octavo.services.gateway.schedulers.router import SessionRing

SESSIONS = [f"session {number}" for number in range(500)]


def homes(ring: SessionRing) -> list[int | None]:
    return [ring.home(session) for session in SESSIONS]


def test_only_sessions_of_a_scheduler_that_goes_get_another_home_and_it_gets_them_back() -> None:
    ring = SessionRing()
    for bit in range(4):
        ring.add(bit, f"s{bit}")
    before = homes(ring)
    assert set(before) == {0, 1, 2, 3}

    ring.remove(2, "s2")
    without = homes(ring)
    ring.add(2, "s2")

    assert 2 not in without
    assert all(new == old for new, old in zip(without, before, strict=True) if old != 2)
    assert homes(ring) == before


def test_without_schedulers_nobody_is_at_home() -> None:
    ring = SessionRing()
    ring.add(0, "s0")
    ring.remove(0, "s0")

    assert set(homes(ring)) == {None}
