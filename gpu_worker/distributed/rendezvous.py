"""How the ranks of a group find each other: addresses that they listen at, and torch's store for more of them.

Nothing listens on all interfaces. On one machine (an ipc endpoint) the store is a file beside the
socket, in a folder that only this user should be able to enter.
"""

from __future__ import annotations

import secrets
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch.distributed

from octavo.gpu_worker.errors import RankError

dist: Any = torch.distributed  # its stubs lack stores and what process groups are made of
Store = Any
_LOOPBACK = "127.0.0.1"
_IPC = "ipc://"


def own_address(endpoint: str, rank: int) -> str:
    """Return the one address of this machine at which the rank listens for the others.

    Rank 0 listens at the endpoint's; the others at that by which this machine reaches it.
    """
    if endpoint.startswith(_IPC):
        return _LOOPBACK
    host, port = _host_and_port(endpoint)
    if rank == 0:
        return host
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing: only the route is looked up
            return str(probe.getsockname()[0])
    except OSError as error:
        raise RankError(f"rendezvous {endpoint}: there is no way to {host} ({error})") from error


def new_store(endpoint: str, world_size: int, timeout_s: float) -> tuple[str, Store]:
    """Make a store for one life of a group; return where the other ranks find it, and rank 0's end."""
    if endpoint.startswith(_IPC):
        socket_path = Path(endpoint.removeprefix(_IPC))
        for left in socket_path.parent.glob(f"{socket_path.name}.store-*"):
            left.unlink(missing_ok=True)  # of a rank 0 that was killed
        place = f"file:{socket_path}.store-{secrets.token_hex(8)}"
        return place, open_store(place, world_size, timeout_s)
    host, _ = _host_and_port(endpoint)
    # torch's own server would listen on all interfaces; it takes a socket that listens on one.
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        port = server.getsockname()[1]
        store = dist.TCPStore(
            host, port, world_size, True, timedelta(seconds=timeout_s), False,
            master_listen_fd=server.detach(), use_libuv=False,
        )  # fmt: skip
    return f"tcp:{host}:{port}", store


def open_store(place: str, world_size: int, timeout_s: float) -> Store:
    """Open what `new_store` made. Raises RankError."""
    kind, _, rest = place.partition(":")
    try:
        if kind == "file":
            return dist.FileStore(rest, world_size)
        host, _, port = rest.rpartition(":")
        return dist.TCPStore(host, int(port), world_size, False, timedelta(seconds=timeout_s), False, use_libuv=False)
    except (RuntimeError, ValueError) as error:
        raise RankError(f"the ranks' store {place} cannot be reached ({error})") from error


def _host_and_port(endpoint: str) -> tuple[str, int]:
    parts = urlsplit(endpoint)
    assert parts.hostname and parts.port, endpoint  # noqa: PT018 - the config has checked it
    return parts.hostname, parts.port
