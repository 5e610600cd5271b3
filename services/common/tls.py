"""TLS of gRPC servers and channels, from PEM files that may be replaced while we run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from grpc import aio

from octavo.services.common.files import WatchedFile
from octavo.services.common.grpc_options import Options, hop_channel_options
from octavo.services.common.tls_files import TlsFiles


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Return credentials that follow the files: new connections get new certificates, old ones go on.

    Raises ValueError if a file cannot be read or is no PEM.
    """
    read = _pem_reader(files)
    last = read()

    def configuration(pem: tuple[bytes, bytes, bytes | None]) -> Any:
        key, certificate, ca = pem
        return grpc.ssl_server_certificate_configuration([(key, certificate)], ca)

    def fetch() -> Any:
        nonlocal last
        now = read()
        if now == last:
            return None  # gRPC keeps what it has
        last = now
        return configuration(now)

    return grpc.dynamic_ssl_server_credentials(configuration(last), fetch, files.ca is not None)


def listen(server: aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    """Bind a server's address; return the port (1 for a unix socket), 0 if that cannot be. Raises RuntimeError too."""
    if credentials is None or address.startswith("unix:"):  # a unix socket has the file system's permissions
        return server.add_insecure_port(address)
    return server.add_secure_port(address, credentials)


def hop_channel(address: str, files: TlsFiles | None, server_name: str = "") -> aio.Channel:
    """Return a new channel to another of our processes, with TLS if there are files.

    The files are read now: a channel made later has later certificates. Raises ValueError.

    server_name  what the other side's certificate must be made out to; empty: the host in `address`. It matters where
                 a name was looked up to get `address`: certificates have names, and what DNS says proves nothing.
    """
    options: Options = hop_channel_options()
    if files is None or address.startswith("unix:"):
        return aio.insecure_channel(address, options=options)
    key, certificate, ca = _pem_reader(files)()
    if server_name:
        options.append(("grpc.ssl_target_name_override", server_name))
    return aio.secure_channel(address, grpc.ssl_channel_credentials(ca, key, certificate), options=options)


def _pem_reader(files: TlsFiles) -> Callable[[], tuple[bytes, bytes, bytes | None]]:
    """Return what gives (key, certificate, authorities) as they are on disk."""
    key = WatchedFile(files.key, _pem("PRIVATE KEY-----"))
    certificate = WatchedFile(files.certificate, _pem("-----BEGIN CERTIFICATE-----"))
    ca = None if files.ca is None else WatchedFile(files.ca, _pem("-----BEGIN CERTIFICATE-----"))
    return lambda: (key.get(), certificate.get(), None if ca is None else ca.get())


def _pem(marker: str) -> Callable[[bytes], bytes]:
    def parse(data: bytes) -> bytes:
        if marker.encode() not in data:
            raise ValueError(f"no PEM: {marker.strip('-')} is not in it")
        return data

    return parse
