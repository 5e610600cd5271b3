"""Where the schedulers are: addresses as configured, names looked up and files read again and again."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Sequence
from pathlib import Path

from octavo.services.common.logging import RateLimiter

FILE = "file:"

_log = logging.getLogger(__name__)


class AddressBook:
    """Turns configured addresses into those of single schedulers.

    A name, such as a headless Service's, stands for all addresses that DNS has for it, a file for those in its
    lines. A name that cannot be looked up and a file that cannot be read keep those they had.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        """`addresses`: host:port, unix:PATH or file:PATH."""
        self._found: dict[str, list[str]] = {
            address: [] if is_name(address) or is_file(address) else [address] for address in dict.fromkeys(addresses)
        }
        self._warnings = RateLimiter(_log)

    @property
    def can_change(self) -> bool:
        """Whether `refresh` can change the answer."""
        return self.has_files or any(map(is_name, self._found))

    @property
    def has_files(self) -> bool:
        """Whether a part of the answer is in files, which are cheap to read."""
        return any(map(is_file, self._found))

    @property
    def current(self) -> list[str]:
        """What is known, each address once."""
        return list(dict.fromkeys(address for found in self._found.values() for address in found))

    def name_of(self, address: str) -> str:
        """Return the host name that was looked up to find an address; empty if it was configured as it is."""
        if address in self._found:
            return ""
        names = (name for name, found in self._found.items() if address in found and not is_file(name))
        return next(names, "").rpartition(":")[0]

    async def refresh(self) -> None:
        """Look all names up and read all files again."""
        for name in filter(is_file, self._found):
            try:
                lines = _lines_of(name)
            except (OSError, UnicodeDecodeError) as error:
                self._warnings.warning(name, "cannot read %s: %s", name, error)
                continue
            self._found[name] = list(dict.fromkeys(lines))
        loop = asyncio.get_running_loop()
        for name in filter(is_name, self._found):
            host, _, port = name.rpartition(":")
            try:
                answers = await loop.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
            except OSError as error:
                self._warnings.warning(name, "cannot look up %s: %s", host, error)
                continue
            # A name with addresses of both families has two for each scheduler: one family names each once.
            family = answers[0][0]
            hosts = sorted({str(where[0]) for found, _, _, _, where in answers if found == family})
            self._found[name] = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts]


def _lines_of(name: str) -> list[str]:
    """Return what a file says: so little that reading it holds the event loop up no longer than a look-up does."""
    return Path(name.removeprefix(FILE)).read_text(encoding="utf-8").split()


def is_name(address: str) -> bool:
    """Return whether DNS has to say what an address means."""
    if address.startswith("unix:") or is_file(address):
        return False
    host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False


def is_file(address: str) -> bool:
    """Return whether a file has to say what an address means."""
    return address.startswith(FILE)
