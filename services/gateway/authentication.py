"""Who calls: API keys, JSON Web Tokens and client certificates, and the tenant that each stands for.

The tenant always comes from the credential and never from the request. Every method needs one,
except health checks, as soon as any kind of credential is configured.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from octavo.services.common.errors import Reason, ServingError
from octavo.services.common.files import WatchedFile
from octavo.services.gateway.security_config import AuthenticationConfig

PUBLIC_METHODS = ("/grpc.health.v1.Health/",)
"""Prefixes of the methods that need no credential."""

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}")
_KEY = re.compile(r"oct_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_MAX_CREDENTIAL = 16 * 1024
_JWT_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA")  # no shared secrets, never "none"
_JWT_LEEWAY_S = 60


@dataclass(frozen=True)
class Caller:
    """Whose call it is. An admin may call octavo.admin.v1 as well."""

    tenant: str = ""
    is_admin: bool = False


_NOBODY = Caller()
_caller: ContextVar[Caller] = ContextVar("caller", default=_NOBODY)


def caller() -> Caller:
    """Return who made the call that runs now; the nameless tenant if nobody has to say."""
    return _caller.get()


class Authenticator:
    """Checks credentials; files are followed while it runs."""

    def __init__(self, config: AuthenticationConfig) -> None:
        """Read the files. Raises ValueError."""
        self._keys = None if config.api_keys is None else WatchedFile(config.api_keys, parse_keys)
        self._tokens = None if config.jwks is None else _Tokens(config)
        self._certificates = config.certificates
        self.on_refused: Callable[[ServingError], None] = lambda _: None
        """Is told of each call that showed no valid credential."""

    @property
    def is_required(self) -> bool:
        """Calls need a credential."""
        return self._keys is not None or self._tokens is not None or self._certificates

    def identify(self, authorization: str, certificate_names: Iterable[str] = ()) -> Caller:
        """Return who calls. Raises UNAUTHENTICATED; the message does not say which part was wrong.

        authorization      the header's value
        certificate_names  the URI names of the verified client certificate
        """
        if not self.is_required:
            return Caller()
        scheme, _, credential = authorization.partition(" ")
        credential = credential.strip()
        if scheme.lower() == "bearer" and 0 < len(credential) <= _MAX_CREDENTIAL:
            found = None
            if self._keys is not None and credential.startswith("oct_"):
                found = find_key(self._keys.get(), credential)
            elif self._tokens is not None:
                found = self._tokens.verify(credential)
            if found is not None:
                return found
        elif self._certificates and not authorization:
            for name in certificate_names:
                if name.startswith("spiffe://") and _TENANT.fullmatch(name.removeprefix("spiffe://")):
                    return Caller(name.removeprefix("spiffe://"))
        refusal = ServingError(
            Reason.UNAUTHENTICATED,
            "this server needs a valid credential: send the header `authorization: Bearer KEY`"
            + (" or a client certificate" if self._certificates else ""),
        )
        self.on_refused(refusal)
        raise refusal

    def authorize(self, method: str, context: Any, *, admin: bool = False) -> str:
        """Check a gRPC call, remember who makes it, for `caller`, and return the tenant.

        Raises UNAUTHENTICATED, PERMISSION_DENIED.
        """
        if method.startswith(PUBLIC_METHODS):
            return ""
        headers = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        names = context.auth_context().get("peer_spiffe_id", ()) if self._certificates else ()
        who = self.identify(headers.get("authorization", ""), (name.decode(errors="replace") for name in names))
        if admin and self.is_required and not who.is_admin:
            raise ServingError(Reason.PERMISSION_DENIED, "this needs a key made with `octavo keys add --admin`")
        _caller.set(who)
        return who.tenant

    def enter(self, who: Caller) -> None:
        """Remember who makes the call that runs now, for `caller`."""
        _caller.set(who)


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
    if not _TENANT.fullmatch(tenant):
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


class _Tokens:
    """Verifies JSON Web Tokens (RFC 7519) against keys in a file: nothing is fetched."""

    def __init__(self, config: AuthenticationConfig) -> None:
        if not config.issuer or not config.audience:
            raise ValueError("--jwt-jwks needs --jwt-issuer and --jwt-audience")
        assert config.jwks is not None, "made for a file"
        self._config = config
        self._keys = WatchedFile(config.jwks, _parse_jwks)

    def verify(self, token: str) -> Caller | None:
        """Return whose token it is, or None."""
        import jwt

        with contextlib.suppress(jwt.PyJWTError, ValueError):
            header = jwt.get_unverified_header(token)
            algorithm = header.get("alg")
            for key in self._keys.get():
                if algorithm not in _JWT_ALGORITHMS or key.algorithm_name != algorithm:
                    continue
                if header.get("kid") not in (None, key.key_id):
                    continue
                with contextlib.suppress(jwt.PyJWTError):
                    return self._caller(token, key)
        return None

    def _caller(self, token: str, key: Any) -> Caller | None:
        import jwt

        claims = jwt.decode(
            token,
            key,
            algorithms=[key.algorithm_name],
            issuer=self._config.issuer,
            audience=self._config.audience,
            leeway=_JWT_LEEWAY_S,
            options={"require": ["exp", "iss", "aud"]},
        )
        tenant = claims.get(self._config.tenant_claim)
        return Caller(tenant) if isinstance(tenant, str) and _TENANT.fullmatch(tenant) else None


def _parse_jwks(data: bytes) -> list[Any]:
    import jwt

    try:
        return list(jwt.PyJWKSet.from_dict(json.loads(data)).keys)
    except (jwt.PyJWTError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"is no JSON Web Key Set: {error}") from None
