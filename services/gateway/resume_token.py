"""What a client holds to pick a broken stream up: signed, so that any gateway of the deployment can believe it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
from dataclasses import astuple, dataclass
from pathlib import Path

from octavo.services.common.errors import ServingError, invalid_field

_VERSION = 1
_SIGNATURE_BYTES = 16
_MIN_KEY_BYTES = 16


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
    """Signs and reads tokens, with a key that all gateways of a deployment share."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def load(cls, path: Path | None) -> ResumeTokens:
        """Read the key from a file; without one make a key up, that no other gateway has. Raises KeyFileError."""
        if path is None:
            return cls(secrets.token_bytes(32))
        try:
            key = path.read_bytes().strip()
        except OSError as error:
            raise KeyFileError(f"cannot read {path}: {error.strerror}") from None
        if len(key) < _MIN_KEY_BYTES:
            raise KeyFileError(f"{path} holds {len(key)} bytes; a key has at least {_MIN_KEY_BYTES}")
        return cls(key)

    def sign(self, token: ResumeToken) -> str:
        """Return the text that clients get."""
        payload = json.dumps([_VERSION, *astuple(token)], separators=(",", ":")).encode()
        return base64.urlsafe_b64encode(self._signature(payload) + payload).decode().rstrip("=")

    def read(self, text: str, tenant: str) -> ResumeToken:
        """Return the token in a text. Raises INVALID_FIELD if it is not of this deployment, or of another tenant."""
        try:
            data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        except (ValueError, binascii.Error):
            raise _not_ours() from None
        signature, payload = data[:_SIGNATURE_BYTES], data[_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._signature(payload)):
            raise _not_ours()
        version, *values = json.loads(payload)
        token = ResumeToken(*values) if version == _VERSION else None
        if token is None or token.tenant != tenant:
            raise _not_ours()
        return token

    def _signature(self, payload: bytes) -> bytes:
        return hmac.digest(self._key, payload, hashlib.sha256)[:_SIGNATURE_BYTES]


def _not_ours() -> ServingError:
    advice = "send what Started.resume_token said, to a gateway of the same deployment"
    return invalid_field("resume_token", f"is not a token of this deployment; {advice}")
