"""Endpoints that others can reach need keys. This is apart from `curve.py`: a command line is read without ZeroMQ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from octavo.services.common.addresses import is_exposed_address


@dataclass(frozen=True)
class CurveFiles:
    """The server's secret key, and the list of public keys that may connect. The list is followed."""

    secret_key: Path
    allowed: Path


def is_exposed(endpoint: str) -> bool:
    """Return whether a ZeroMQ endpoint can be reached from other machines."""
    return endpoint.startswith("tcp://") and is_exposed_address(endpoint.removeprefix("tcp://"))
