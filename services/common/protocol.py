"""The revisions that two sides of a hop compare before they talk."""

from __future__ import annotations

from collections.abc import Mapping

REVISIONS: Mapping[int, str] = {
    1: "requests, steps, load",
    2: "requests are taken over and given up (Reattach, Detach), caches watched, workers fenced",
}
"""Of octavo.scheduler.v1 and octavo.worker.v1: what each added that a peer of the one before does not understand.

A field that such a peer may ignore needs no revision. Whoever speaks an older one leaves out what later ones added:
ask for it by name, as `TAKEOVERS`, and not by comparing numbers.
"""

PROTOCOL_REVISION = max(REVISIONS)
"""The newest: this code's own."""

OLDEST_REVISION = PROTOCOL_REVISION - 1
"""Gateways and schedulers of one release work with those of the release before, whichever is upgraded first."""

TAKEOVERS = 2
"""The revision from which on Reattach and Detach are understood."""

API_REVISION = 1
"""Of the public API, octavo.inference.v1: grows with each addition, for clients to read."""


def is_spoken(revision: int) -> bool:
    """Return whether this code talks in a revision: its own, or the one before."""
    return OLDEST_REVISION <= revision <= PROTOCOL_REVISION


def choose_revision(newest: int, oldest: int) -> int:
    """Return the newest revision that this code and a peer with such a range speak; 0 if there is none.

    oldest  0: the peer speaks `newest` only
    """
    common = min(newest, PROTOCOL_REVISION)
    return common if common >= max(oldest or newest, OLDEST_REVISION) else 0
