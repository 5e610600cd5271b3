"""The revisions that two sides of a hop compare before they talk."""

PROTOCOL_REVISION = 2
"""Of octavo.scheduler.v1 and octavo.worker.v1. 2: requests are taken over, caches watched, workers fenced."""

API_REVISION = 1
"""Of the public API, octavo.inference.v1: grows with each addition, for clients to read."""


def is_spoken(revision: int) -> bool:
    """Return whether a scheduler talks to a gateway or worker of this revision: its own, or the one before."""
    return PROTOCOL_REVISION - 1 <= revision <= PROTOCOL_REVISION
