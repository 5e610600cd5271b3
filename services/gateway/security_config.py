"""What a gateway can be told about who may call it, and about encryption."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from octavo.services.common.api_keys import TENANT
from octavo.services.common.tls_files import TlsFiles, check_tls_options

_CALLERS = "callers"
_ENCRYPTION = "encryption"


@dataclass(frozen=True)
class AuthenticationConfig:
    """Which credentials count. All None: everybody may call, as the nameless tenant.

    api_keys      a file made by `octavo keys`
    jwks          a file of public keys (RFC 7517) for tokens of `issuer` for `audience`
    tenant_claim  the token's claim that names the tenant
    certificates  a client certificate's URI name (SPIFFE) names the tenant

    The prefixes stand before the tenants of tokens and of certificates.
    """

    api_keys: Path | None = None
    jwks: Path | None = None
    issuer: str = ""
    audience: str = ""
    tenant_claim: str = "sub"
    certificates: bool = False
    token_prefix: str = ""
    certificate_prefix: str = ""

    @property
    def is_required(self) -> bool:
        """Calls need a credential."""
        return self.api_keys is not None or self.jwks is not None or self.certificates


@dataclass(frozen=True, kw_only=True)
class SecurityConfig:
    """The part of a gateway's settings that is about security. Files are followed: replace them to change them."""

    api_keys: Path | None = field(
        default=None,
        metadata={
            "group": _CALLERS,
            "help": "file of API keys, made by `octavo keys add`: every call needs one",
        },
    )
    jwt_jwks: Path | None = field(
        default=None,
        metadata={"group": _CALLERS, "help": "file of public keys (a JSON Web Key Set): their tokens count as well"},
    )
    jwt_issuer: str = field(default="", metadata={"group": _CALLERS, "help": "issuer that tokens must name"})
    jwt_audience: str = field(default="", metadata={"group": _CALLERS, "help": "audience that tokens must name"})
    jwt_tenant_claim: str = field(
        default="sub", metadata={"group": _CALLERS, "help": "claim of a token that names the tenant"}
    )
    jwt_tenant_prefix: str = field(
        default="",
        metadata={
            "group": _CALLERS,
            "help": "what stands before the tenants of tokens; needed beside other credentials",
        },
    )
    certificate_tenant_prefix: str = field(
        default="",
        metadata={
            "group": _CALLERS,
            "help": "what stands before the tenants of certificates; needed beside other credentials",
        },
    )
    certificate_tenants: bool = field(
        default=False,
        metadata={"group": _CALLERS, "help": "a client certificate's SPIFFE name is its tenant; needs --tls-client-ca"},
    )
    tls_certificate: Path | None = field(
        default=None, metadata={"group": _ENCRYPTION, "help": "PEM chain for gRPC and HTTP; without it they are plain"}
    )
    tls_key: Path | None = field(default=None, metadata={"group": _ENCRYPTION, "help": "its key"})
    tls_client_ca: Path | None = field(
        default=None,
        metadata={"group": _ENCRYPTION, "help": "PEM authorities: clients need a certificate of theirs"},
    )
    hop_certificate: Path | None = field(
        default=None, metadata={"group": _ENCRYPTION, "help": "PEM chain that schedulers are shown"}
    )
    hop_key: Path | None = field(default=None, metadata={"group": _ENCRYPTION, "help": "its key"})
    hop_ca: Path | None = field(
        default=None, metadata={"group": _ENCRYPTION, "help": "PEM authorities of the schedulers' certificates"}
    )

    @property
    def authentication(self) -> AuthenticationConfig:
        """Which credentials count."""
        return AuthenticationConfig(
            api_keys=self.api_keys,
            jwks=self.jwt_jwks,
            issuer=self.jwt_issuer,
            audience=self.jwt_audience,
            tenant_claim=self.jwt_tenant_claim,
            certificates=self.certificate_tenants,
            token_prefix=self.jwt_tenant_prefix,
            certificate_prefix=self.certificate_tenant_prefix,
        )

    @property
    def tls(self) -> TlsFiles | None:
        """Files of the listeners for clients."""
        return check_tls_options("tls", self.tls_certificate, self.tls_key, self.tls_client_ca)

    @property
    def hop_tls(self) -> TlsFiles | None:
        """Files of the connections to schedulers."""
        return check_tls_options("hop", self.hop_certificate, self.hop_key, self.hop_ca)

    def check_security(self) -> None:
        """Raise ValueError if the settings contradict each other or a file is missing."""
        tls = self.tls  # in any case: it checks the files
        if self.certificate_tenants and (tls is None or tls.ca is None):
            raise ValueError("--certificate-tenants needs --tls-certificate, --tls-key and --tls-client-ca")
        if self.hop_tls is not None and self.hop_tls.ca is None:
            raise ValueError("--hop-certificate needs --hop-ca: schedulers are known by their certificate")
        if (self.jwt_jwks is not None) != bool(self.jwt_issuer and self.jwt_audience):
            raise ValueError("--jwt-jwks, --jwt-issuer and --jwt-audience go together")
        self._check_tenants()

    def _check_tenants(self) -> None:
        """Raise ValueError if one kind of credential could name a tenant of another kind."""
        prefixes = {
            flag: prefix
            for flag, prefix, is_on in (
                ("--jwt-tenant-prefix", self.jwt_tenant_prefix, self.jwt_jwks is not None),
                ("--certificate-tenant-prefix", self.certificate_tenant_prefix, self.certificate_tenants),
            )
            if is_on
        }
        for flag, prefix in prefixes.items():
            if prefix and not TENANT.fullmatch(prefix):
                raise ValueError(f"{flag} must be made of letters, digits and . _ : / @ -, not {prefix!r}")
            if not prefix and len(prefixes) + (self.api_keys is not None) > 1:
                raise ValueError(
                    f"with several kinds of credentials {flag} must be set, for example to jwt: or spiffe:, or whoever "
                    "issues one kind could name a tenant of another"
                )
        first, second = (*prefixes.values(), "", "")[:2]
        if len(prefixes) > 1 and (first.startswith(second) or second.startswith(first)):
            raise ValueError("--jwt-tenant-prefix and --certificate-tenant-prefix must not begin with each other")
