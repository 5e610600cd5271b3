"""Addresses to listen on: what they mean, whether they are free, how to reach them."""

from __future__ import annotations

import errno
import os
import socket

from octavo.services.cli.errors import CommandError


def split(address: str) -> tuple[str, int]:
    """Return host and port of "host:port" or "[::1]:port". Raises CommandError."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise CommandError(f"{address} is not an address: write HOST:PORT, such as 127.0.0.1:50051")
    return host, int(port)


def join(host: str, port: int) -> str:
    """Return "host:port", with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def take_free(address: str, count: int) -> list[str]:
    """Return `count` addresses from `address` on, on consecutive ports, all free now. Raises CommandError.

    Port 0 means any free ports. Between this check and the use of a port another program could
    still take it; then the process that wants it fails and says so.
    """
    host, port = split(address)
    addresses = []
    held = []
    try:
        for index in range(count):
            listener = _bind(host, port and port + index)
            held.append(listener)  # until all are known, so that port 0 does not give one twice
            addresses.append(join(host, listener.getsockname()[1]))
    finally:
        for listener in held:
            listener.close()
    return addresses


def _bind(host: str, port: int) -> socket.socket:
    if port > 65535:
        raise CommandError(f"there is no port {port}: choose a smaller port or fewer gateways")
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise CommandError(f"cannot listen on {host}: {error.strerror}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        # As gRPC does it: an old connection that is still closing does not matter, a listener does.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(1)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise CommandError(
                f"{join(host, port)} is in use: stop what listens there, or choose another port"
            ) from None
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise CommandError(f"cannot listen on {join(host, port)}: {reason}") from None
    return listener
