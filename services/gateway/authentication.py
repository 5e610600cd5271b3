"""Who calls: API keys, JSON Web Tokens and client certificates, and the tenant that each stands for.

The tenant always comes from the credential and never from the request. Every method needs one,
except health checks, as soon as any kind of credential is configured.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

from octavo.services.common.api_keys import TENANT, Caller, find_key, parse_keys
from octavo.services.common.errors import Reason, ServingError
from octavo.services.common.files import WatchedFile
from octavo.services.gateway.security_config import AuthenticationConfig

PUBLIC_METHODS = ("/grpc.health.v1.Health/",)
"""Prefixes of the methods that need no credential."""

_MAX_CREDENTIAL = 16 * 1024
_JWT_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA")  # no shared secrets, never "none"
_JWT_LEEWAY_S = 60


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
        self._certificate_prefix = config.certificate_prefix
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
                path = name.removeprefix("spiffe://")
                tenant = self._certificate_prefix + path
                if path and path != name and TENANT.fullmatch(tenant):
                    return Caller(tenant)
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
        name = claims.get(self._config.tenant_claim)
        tenant = f"{self._config.token_prefix}{name}"
        return Caller(tenant) if isinstance(name, str) and name and TENANT.fullmatch(tenant) else None


def _parse_jwks(data: bytes) -> list[Any]:
    import jwt

    try:
        return list(jwt.PyJWKSet.from_dict(json.loads(data)).keys)
    except (jwt.PyJWTError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"is no JSON Web Key Set: {error}") from None
