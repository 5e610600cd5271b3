"""What a client holds to pick a broken stream up: signed, so that any gateway of the deployment can believe it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from octavo.services.common.errors import ServingError, invalid_field
from octavo.services.common.files import WatchedFile

_VERSION = 1
_SIGNATURE_BYTES = 16
_MIN_KEY_BYTES = 16
_MAX_KEYS = 16


class KeyFileError(RuntimeError):
    """The key cannot be used; the message is one line."""


@dataclass(frozen=True, slots=True)
class ResumeToken:
    """Which request it is, and the shape of its outputs.

    scheduler_id   who admitted it: the first to ask
    first_offset   of the tokens that were produced: the length of `continue_output`
    logprobs       alternatives for each token
    """

    request_id: str
    scheduler_id: str
    tenant: str
    candidate_count: int
    first_offset: int
    chosen_logprob: bool
    logprobs: int


class ResumeTokens:
    """Signs and reads tokens, with keys that all gateways of a deployment share: the first signs, each is believed.

    So a key is changed without a stream that cannot be resumed: the new one is added behind the old one, then put
    before it, and once tokens of the old one are not used any more that one is taken away.
    """

    def __init__(self, *keys: bytes) -> None:
        self._keys: Callable[[], Sequence[bytes]] = lambda: keys

    @classmethod
    def load(cls, path: Path | None) -> ResumeTokens:
        """Follow a file of keys; without one make a key up, that no other gateway has. Raises KeyFileError."""
        if path is None:
            return cls(secrets.token_bytes(32))
        tokens = cls()
        try:
            tokens._keys = WatchedFile(path, _parse_keys).get
        except ValueError as error:
            raise KeyFileError(str(error)) from None
        return tokens

    def sign(self, token: ResumeToken) -> str:
        """Return the text that clients get."""
        payload = json.dumps([_VERSION, *astuple(token)], separators=(",", ":")).encode()
        return base64.urlsafe_b64encode(_signature(self._keys()[0], payload) + payload).decode().rstrip("=")

    def read(self, text: str, tenant: str) -> ResumeToken:
        """Return the token in a text. Raises INVALID_FIELD if it is not of this deployment, or of another tenant."""
        try:
            data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        except (ValueError, binascii.Error):
            raise _not_ours() from None
        signature, payload = data[:_SIGNATURE_BYTES], data[_SIGNATURE_BYTES:]
        if not any(hmac.compare_digest(signature, _signature(key, payload)) for key in self._keys()):
            raise _not_ours()
        version, *values = json.loads(payload)
        token = ResumeToken(*values) if version == _VERSION else None
        if token is None or token.tenant != tenant:
            raise _not_ours()
        return token


def _parse_keys(data: bytes) -> tuple[bytes, ...]:
    """Return the keys in a file: one a line, or all of it if that is no text. Raises ValueError."""
    data = data.strip()
    keys = tuple(line.strip() for line in data.splitlines() if line.strip()) if data.isascii() else (data,)
    if len(keys) > _MAX_KEYS:
        raise ValueError(f"holds {len(keys)} keys; at most {_MAX_KEYS} are tried")
    if shortest := [key for key in keys or (b"",) if len(key) < _MIN_KEY_BYTES]:
        raise ValueError(f"holds {len(shortest[0])} bytes; a key has at least {_MIN_KEY_BYTES}")
    return keys


def _signature(key: bytes, payload: bytes) -> bytes:
    return hmac.digest(key, payload, hashlib.sha256)[:_SIGNATURE_BYTES]


def _not_ours() -> ServingError:
    advice = "send what Started.resume_token said, to a gateway of the same deployment"
    return invalid_field("resume_token", f"is not a token of this deployment; {advice}")
