"""What the endpoint for workers needs to be safe. Apart from `curve.py`: a command line is read without ZeroMQ."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CurveFiles:
    """The server's secret key, and the list of public keys that may connect. The list is followed."""

    secret_key: Path
    allowed: Path


def is_exposed(endpoint: str) -> bool:
    """Return whether a ZeroMQ endpoint can be reached from other machines."""
    if not endpoint.startswith("tcp://"):
        return False
    host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"  # a name, an interface or *
