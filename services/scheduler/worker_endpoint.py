"""What the endpoints of a scheduler need to be safe. Apart from `curve.py`: a command line is read without ZeroMQ."""

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
    return endpoint.startswith("tcp://") and is_exposed_address(endpoint.removeprefix("tcp://"))


def is_exposed_address(address: str) -> bool:
    """Return whether a server's address, host:port or unix:PATH, can be reached from other machines."""
    if not address or address.startswith("unix:"):
        return False
    host = address.rpartition(":")[0].strip("[]")
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"  # a name, an interface or *
