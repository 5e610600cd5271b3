"""API keys: how they are made, what is kept of them, and how they are checked."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}")
"""A tenant's name."""

_KEY = re.compile(r"oct_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")


@dataclass(frozen=True)
class Caller:
    """Whose call it is. An admin may call octavo.admin.v1 as well."""

    tenant: str = ""
    is_admin: bool = False


@dataclass(frozen=True)
class StoredKey:
    """What is kept of an API key: enough to check it, too little to use it."""

    key_id: str
    salt: bytes
    digest: bytes
    caller: Caller


def make_key(tenant: str, *, is_admin: bool = False) -> tuple[str, dict[str, object]]:
    """Return a new key, which is shown once, and its entry for the file. Raises ValueError for a bad tenant.

    The secret has 256 random bits, so a fast hash is enough: there is nothing to guess.
    """
    if not TENANT.fullmatch(tenant):
        raise ValueError(f"tenant {tenant!r}: 1 to 128 of letters, digits and . _ : / @ -, a letter or digit first")
    key_id, secret, salt = secrets.token_hex(6), secrets.token_urlsafe(32), secrets.token_bytes(16)
    entry: dict[str, object] = {
        "id": key_id,
        "tenant": tenant,
        "salt": salt.hex(),
        "sha256": _digest(salt, secret).hex(),
    }
    if is_admin:
        entry["admin"] = True
    return f"oct_{key_id}_{secret}", entry


def parse_keys(data: bytes) -> Mapping[str, StoredKey]:
    """Return the keys of a file, by id. Raises ValueError."""
    import yaml  # a gateway without such a file starts sooner without

    try:
        content = yaml.safe_load(data)
    except yaml.YAMLError as error:
        raise ValueError(f"is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, list):
        raise ValueError("must hold a list of keys; `octavo keys add` makes them")
    keys = {}
    for number, entry in enumerate(content):
        try:
            keys[str(entry["id"])] = StoredKey(
                str(entry["id"]),
                bytes.fromhex(entry["salt"]),
                bytes.fromhex(entry["sha256"]),
                Caller(str(entry["tenant"]), entry.get("admin") is True),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"entry {number} is not one that `octavo keys add` made: {error}") from None
    return keys


def find_key(keys: Mapping[str, StoredKey], key: str) -> Caller | None:
    """Return whose key it is, or None. Takes the same time for an unknown id as for a wrong secret."""
    parts = _KEY.fullmatch(key)
    if parts is None:
        return None
    stored = keys.get(parts[1])
    salt, expected = (b"", b"\0" * 32) if stored is None else (stored.salt, stored.digest)
    is_right = hmac.compare_digest(_digest(salt, parts[2]), expected)
    return stored.caller if stored is not None and is_right else None


def _digest(salt: bytes, secret: str) -> bytes:
    return hashlib.sha256(salt + secret.encode()).digest()
