"""HTTP over TLS: whose certificate it is, and authorities that are replaced."""

from __future__ import annotations

import dataclasses
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from octavo.services.gateway.app import Gateway
from octavo.services.gateway.config import GatewayConfig
from octavo.services.gateway.http import listener
from tests.certificates import Authority


class Site:
    """A gateway, its authority and that of its clients."""

    def __init__(self, gateway: Gateway, servers: Authority, clients: Authority) -> None:
        self.servers = servers
        self.clients = clients
        self.url = f"https://localhost:{gateway.http_port}"

    async def get(self, path: str, files: tuple[Path, Path]) -> int:
        """The status of a request on a new connection, with the certificate in these files."""
        context = ssl.create_default_context(cafile=str(self.servers.ca))
        context.load_cert_chain(*files)
        async with httpx.AsyncClient(verify=context) as http:
            return (await http.get(self.url + path)).status_code


@pytest.fixture
async def site(config: GatewayConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    monkeypatch.setattr(listener, "_LOOK_S", 0.02)
    servers, clients = Authority(tmp_path, "servers"), Authority(tmp_path, "clients")
    certificate, key = servers.issue("gateway")
    gateway = Gateway(
        dataclasses.replace(
            config,
            admin_address="",
            http_address="127.0.0.1:0",
            tls_certificate=certificate,
            tls_key=key,
            tls_client_ca=clients.ca,
            certificate_tenants=True,
        )
    )
    await gateway.start()
    yield Site(gateway, servers, clients)
    await gateway.stop(0)


async def test_a_client_certificate_names_the_tenant_over_http_too(site: Site) -> None:
    assert await site.get("/v1/models", site.clients.issue("app", uri="spiffe://acme.test/app")) == 200
    assert await site.get("/v1/models", site.clients.issue("nameless")) == 401
    assert await site.get("/v1/models", site.clients.issue("other", uri="https://acme.test/app")) == 401


async def test_new_connections_are_checked_against_authorities_that_were_replaced(site: Site, tmp_path: Path) -> None:
    old = site.clients.issue("old", uri="spiffe://acme.test/old")
    assert await site.get("/v1/models", old) == 200
    (tmp_path / "new").mkdir()
    authority = Authority(tmp_path / "new", "new-clients")
    new = authority.issue("new", uri="spiffe://acme.test/new")

    site.clients.ca.write_bytes(authority.ca.read_bytes())

    statuses = []
    while statuses[-1:] != [200]:  # until the file was looked at; the test's time limit ends it
        try:
            statuses.append(await site.get("/v1/models", new))
        except httpx.TransportError:
            statuses.append(0)
    with pytest.raises(httpx.TransportError):
        await site.get("/v1/models", old)
