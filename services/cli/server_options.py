"""Settings of every command that talks to a server: where it is, the API key, TLS; and what to say if that fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from octavo.services.cli import terminal
from octavo.services.cli.errors import CommandError
from octavo.services.common import config as config_loader

if TYPE_CHECKING:
    import ssl

    import grpc

    from octavo.services.client import Client, GenerationOptions

C = TypeVar("C", bound="AccessConfig")

_SERVER = "server"
DEFAULT_ADDRESS = "127.0.0.1:50051"
_SCHEMES = ("dns:", "unix:", "unix-abstract:", "ipv4:", "ipv6:", "vsock:")


@dataclass(frozen=True, kw_only=True)
class AccessConfig:
    """Who calls, and whom it believes. Without TLS options connections are plain."""

    api_key: str = field(
        default="",
        metadata={
            "group": _SERVER,
            "help": "a key or token of a server that needs one; better in the environment, OCTAVO_API_KEY",
            "metavar": "KEY",
        },
    )
    token_file: Path | None = field(
        default=None,
        metadata={
            "group": _SERVER, "help": "a file with the key or token", "also": ("--api-key-file",), "metavar": "FILE",
        },
    )  # fmt: skip
    tls_ca: Path | None = field(
        default=None,
        metadata={"group": _SERVER, "help": "PEM authorities of the server: switches TLS on", "metavar": "FILE"},
    )
    tls_certificate: Path | None = field(
        default=None,
        metadata={
            "group": _SERVER, "help": "PEM chain to show a server that asks for a certificate", "metavar": "FILE",
        },
    )  # fmt: skip
    tls_key: Path | None = field(default=None, metadata={"group": _SERVER, "help": "its key", "metavar": "FILE"})

    def __post_init__(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None) or (self.tls_key and self.tls_ca is None):
            raise ValueError(
                "--tls-certificate and --tls-key go together, and need --tls-ca (if you did not give them, they come "
                "from OCTAVO_TLS_CERTIFICATE and OCTAVO_TLS_KEY)"
            )

    def check_files(self) -> None:
        """Raise ValueError if a file that an option names is not there or is something else."""
        _read("--tls-ca", self.tls_ca, "-----BEGIN CERTIFICATE-----")
        _read("--tls-certificate", self.tls_certificate, "-----BEGIN CERTIFICATE-----")
        _read("--tls-key", self.tls_key, "PRIVATE KEY-----")
        if self.token_file is not None and not self.token():
            raise ValueError(f"--token-file: {self.token_file} is empty")

    def token(self) -> str:
        """Return the key or token; empty if there is none. Raises ValueError."""
        if self.token_file is None:
            return self.api_key
        return (_read("--token-file", self.token_file) or b"").decode(errors="replace").strip()

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """Return what a gRPC channel needs for TLS; None for a plain one."""
        # gRPC's own lines about handshakes tell a person nothing; it reads this when it is first used.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        import grpc

        if self.tls_ca is None:
            return None
        key, certificate = _read("--tls-key", self.tls_key), _read("--tls-certificate", self.tls_certificate)
        return grpc.ssl_channel_credentials(_read("--tls-ca", self.tls_ca), key, certificate)

    def ssl_context(self) -> ssl.SSLContext | None:
        """Return what an HTTP client needs for https; None for the system's authorities. Raises CommandError."""
        if self.tls_ca is None:
            return None
        import ssl

        try:
            context = ssl.create_default_context(cafile=self.tls_ca)
            if self.tls_certificate is not None:
                context.load_cert_chain(self.tls_certificate, self.tls_key)
        except ssl.SSLError as error:
            raise CommandError(f"the files of --tls-ca, --tls-certificate and --tls-key do not fit: {error}") from None
        return context

    def check_url(self, url: str) -> str:
        """Return the URL as it goes before a path that begins with /v1. Raises ValueError."""
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--url must begin with http:// or https://, not {url!r}")
        if self.tls_ca is not None and not url.startswith("https://"):
            raise ValueError(f"--tls-ca is for a --url that begins with https://, not {url}")
        return url.rstrip("/").removesuffix("/v1").rstrip("/")

    def explain_http(self, error: Exception, url: str) -> str:
        """Return why a server cannot be used over HTTP, in one line that says what to change."""
        text = terminal.one_line(error) or type(error).__name__
        if getattr(error, "status", 0) in (401, 403):
            return self._about_key()
        if "CERTIFICATE_VERIFY_FAILED" in text:
            return _about_certificate(url, self.tls_ca, wrong_name="match" in text)
        if "WRONG_VERSION_NUMBER" in text or "record layer failure" in text:
            return f"{url} speaks no TLS: write http://"
        if "CERTIFICATE_REQUIRED" in text or "certificate required" in text:
            return f"{url} wants a certificate: --tls-certificate and --tls-key"
        if url.startswith("http://") and ("disconnected" in text or "reset by peer" in text):
            return f"{url} closed the connection: if it speaks TLS, write https:// and give --tls-ca"
        return f"{url} does not answer: {text}"

    def _about_key(self) -> str:
        if self.token():
            return "the server does not accept this API key: look for a typing error, or ask for another one"
        return "the server needs an API key: put it into the environment as OCTAVO_API_KEY, or give --token-file"


@dataclass(frozen=True, kw_only=True)
class ServerConfig(AccessConfig):
    """A server's gRPC API."""

    how_to_reach: ClassVar[str] = "start one with `octavo serve`, or name it with --address"
    address: str = field(
        default=DEFAULT_ADDRESS, metadata={"group": _SERVER, "help": "the server: host:port or unix:PATH"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if "://" in self.address and not self.address.startswith(_SCHEMES):
            raise ValueError(f"--address is HOST:PORT of the gRPC API, such as {DEFAULT_ADDRESS}, not {self.address}")
        if self.address and ":" not in self.address:
            raise ValueError(f"--address needs a port: {self.address}:50051")

    @property
    def target(self) -> str:
        """The address for gRPC; without a host it is this machine."""
        return f"127.0.0.1{self.address}" if self.address.startswith(":") else self.address

    def client(self, **options: Any) -> Client:
        """Return a client of the server; `options` are those of Client."""
        credentials = self.channel_credentials()
        from octavo.services.client import Client

        return Client(self.target, credentials=credentials, token=self.token(), **options)

    def explain(self, error: Exception) -> str:
        """Return what went wrong, in one line that says what to change where that is known."""
        text = terminal.one_line(error)
        code = getattr(getattr(error, "code", None), "name", "")
        if code == "UNAUTHENTICATED":
            return self._about_key()
        if code == "UNIMPLEMENTED" and "Method not found" in text:
            return f"what listens at {self.address} serves something else: {self.how_to_reach}"
        if code != "UNAVAILABLE" or getattr(error, "reason", ""):
            return text
        if "WRONG_VERSION_NUMBER" in text:
            return f"{self.address} speaks no TLS: leave --tls-ca out"
        if "CERTIFICATE_VERIFY_FAILED" in text or "Hostname Verification" in text:
            return _about_certificate(self.address, self.tls_ca, wrong_name="Hostname Verification" in text)
        if ("refused" not in text and "closed" in text) or "reset by peer" in text:
            if self.tls_ca is None:
                return f"{self.address} closed the connection: if it speaks TLS, give --tls-ca"
            if self.tls_certificate is None:
                return f"{self.address} closed the connection: it may want --tls-certificate and --tls-key"
        if "connect" in text.lower() or "resolving" in text:
            return f"no server at {self.address}: {self.how_to_reach}"
        return text


def load(cls: type[C], argv: Sequence[str], *, prog: str, description: str) -> C:
    """Return the settings of a command that talks to a server; a wrong one ends it, as config.load does."""
    config = config_loader.load(cls, argv, prog=prog, description=description)
    try:
        config.check_files()
    except ValueError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return config


def _about_certificate(where: str, ca: Path | None, *, wrong_name: bool) -> str:
    if wrong_name:
        return f"the certificate of {where} is made out to another name: call the server what its certificate does"
    if ca is None:
        return f"the certificate of {where} is of an authority that this system does not know: give --tls-ca"
    return f"the certificate of {where} is not of an authority in {ca} (--tls-ca)"


def _read(option: str, path: Path | None, marker: str = "") -> bytes | None:
    """Return what is in a file, None without one. Raises ValueError, also if `marker` is not in it."""
    if path is None:
        return None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{option}: cannot read {path}: {error.strerror}") from None
    if marker.encode() not in data:
        raise ValueError(f"{option}: {path} is no PEM file with {marker.strip('-')}")
    return data


_SAMPLING = "sampling"
# By the field of the request: what a person typed.
_FLAGS = {
    "generation.stop.max_new_tokens": "--max-tokens",
    "generation.stop.stop_sequences": "--stop",
    "generation.sampling.temperature": "--temperature",
    "generation.sampling.top_p": "--top-p",
    "generation.sampling.top_k": "--top-k",
    "generation.sampling.seed": "--seed",
}


@dataclass(frozen=True, kw_only=True)
class ClientConfig(ServerConfig):
    """Which server, which model, and how it chooses tokens. None means the model's own default."""

    model: str = field(
        default="", metadata={"help": "which model; not needed if the server has one", "metavar": "NAME"}
    )
    system: str = field(
        default="", metadata={"help": "what the model is told before the conversation", "metavar": "TEXT"}
    )
    max_tokens: int | None = field(default=None, metadata={"group": _SAMPLING, "help": "most tokens of an answer"})
    temperature: float | None = field(
        default=None,
        metadata={"group": _SAMPLING, "help": "how freely tokens are chosen; 0 takes the most likely ones"},
    )
    top_p: float | None = field(
        default=None, metadata={"group": _SAMPLING, "help": "choose among the likeliest tokens with this probability"}
    )
    top_k: int | None = field(
        default=None, metadata={"group": _SAMPLING, "help": "choose among so many of the likeliest tokens; 0: all"}
    )
    seed: int | None = field(default=None, metadata={"group": _SAMPLING, "help": "the same seed, the same answer"})
    stop: tuple[str, ...] = field(
        default=(),
        metadata={
            "group": _SAMPLING,
            "help": "a text that ends an answer; can be repeated",
            "metavar": "TEXT",
            "verbatim": True,
        },
    )

    def explain(self, error: Exception) -> str:
        """See ServerConfig; options are called as on the command line."""
        text = super().explain(error)
        for name, flag in _FLAGS.items():
            text = text.replace(name, flag)
        return text

    def options(self) -> GenerationOptions:
        """Return the options that are set, for the client."""
        options: GenerationOptions = {}
        if self.max_tokens is not None:
            options["max_new_tokens"] = self.max_tokens
        if self.temperature is not None:
            options["temperature"] = self.temperature
        if self.top_p is not None:
            options["top_p"] = self.top_p
        if self.top_k is not None:
            options["top_k"] = self.top_k
        if self.seed is not None:
            options["seed"] = self.seed
        if self.stop:
            options["stop"] = self.stop
        return options
