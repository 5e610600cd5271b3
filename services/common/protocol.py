"""The revisions that two sides of a hop compare before they talk."""

PROTOCOL_REVISION = 1
"""Of octavo.scheduler.v1 and octavo.worker.v1: both ends must have the same."""

API_REVISION = 1
"""Of the public API, octavo.inference.v1: grows with each addition, for clients to read."""
