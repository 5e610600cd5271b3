"""CurveZMQ encrypts the hop to workers, and a list says which workers may connect.

ZeroMQ's RFC 25 (ZMTP-CURVE), 26 (CurveZMQ) and 27 (ZAP).
"""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from octavo.services.common.files import WatchedFile
from octavo.services.scheduler.config import CurveFiles

_KEY_BYTES = 32
_DOMAIN = "octavo"


class CurveServer:
    """The server's side: a socket's keys, and the answer to who may connect."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], files: CurveFiles) -> None:
        """Read the files and start to answer. Raises ValueError."""
        self._secret = read_key(files.secret_key)
        self._allowed = WatchedFile(files.allowed, parse_allowed)
        self._authenticator = ThreadAuthenticator(context, log=logging.getLogger("octavo.scheduler.curve"))
        self._authenticator.start()
        self._authenticator.configure_curve_callback(_DOMAIN, self)

    def protect(self, socket: zmq.Socket[bytes]) -> None:
        """Make a socket that is not bound yet talk to allowed workers only."""
        socket.curve_secretkey = self._secret
        socket.curve_publickey = zmq.curve_public(self._secret)
        socket.curve_server = True
        socket.zap_domain = (
            _DOMAIN.encode()
        )  # with one, a missing answer is a refusal; without, ZeroMQ lets all in that
        socket.zap_enforce_domain = True  # nobody answers for

    def callback(self, domain: str, key: bytes) -> bool:
        """Return whether a public key is allowed; called in the authenticator's thread."""
        del domain
        return key in self._allowed.get()

    def close(self) -> None:
        """Stop answering."""
        self._authenticator.stop()


def read_key(path: Path) -> bytes:
    """Return the Z85 key in a file. Raises ValueError."""
    return WatchedFile(path, _parse_key).get()


def parse_allowed(data: bytes) -> frozenset[bytes]:
    """Return the public keys of a list: one a line, the rest of the line is a comment. Raises ValueError."""
    lines = [line.split(maxsplit=1)[0] for line in data.splitlines() if line.strip()]
    return frozenset(_parse_key(line) for line in lines)


def _parse_key(data: bytes) -> bytes:
    key = data.strip()
    try:
        if len(z85.decode(key)) == _KEY_BYTES:
            return key
    except (ValueError, KeyError, struct.error):
        pass
    raise ValueError("holds no key of 40 Z85 characters; `octavo keys curve` makes them")
