"""Who can reach an address that a process listens at."""

from __future__ import annotations

import ipaddress


def is_exposed_address(address: str) -> bool:
    """Return whether a server's address, host:port or unix:PATH, can be reached from other machines."""
    if not address or address.startswith("unix:"):
        return False
    host = address.rpartition(":")[0].strip("[]")
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"  # a name, an interface or *
