"""Every hop encrypted and every caller known: real processes, real keys, and what strangers get."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
import zmq

from octavo.services.client import Client, OctavoError
from tests.certificates import Authority
from tests.ports import free_port

OCTAVO = [sys.executable, "-m", "octavo.services.cli"]
START_S = 60


def octavo(*arguments: str) -> str:
    return subprocess.run([*OCTAVO, *arguments], capture_output=True, text=True, check=True, timeout=60).stdout.strip()


class Process:
    """One process of a deployment, and what it printed."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self._log = log
        with log.open("wb") as out:
            self._process = subprocess.Popen([*OCTAVO, *arguments], stdout=out, stderr=out)

    @property
    def printed(self) -> str:
        return self._log.read_text()

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + START_S
        while text not in self.printed:
            assert time.monotonic() < deadline, f"{text!r} was not printed:\n{self.printed}"
            assert self._process.poll() is None, self.printed
            time.sleep(0.02)

    def wait(self) -> int:
        return self._process.wait(START_S)

    def stop(self) -> None:
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self._process.kill()
        self._process.wait()


@dataclass
class Deployment:
    """One scheduler, worker and gateway on TCP, with all of their keys in `folder`."""

    folder: Path
    clients: Authority
    servers: Authority
    worker_endpoint: str
    scheduler_address: str
    address: str
    url: str
    key: str

    def credentials(self, uri: str = "") -> grpc.ChannelCredentials:
        certificate, key = self.clients.issue("client", uri=uri)
        return grpc.ssl_channel_credentials(self.servers.ca.read_bytes(), key.read_bytes(), certificate.read_bytes())

    def hop(self, certificate: Path, key: Path) -> list[str]:
        return [f"--hop-certificate={certificate}", f"--hop-key={key}", f"--hop-ca={self.servers.ca}"]


@pytest.fixture(scope="module")
def deployment(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("security")
    ports = [free_port() for _ in range(4)]
    keys = folder / "api-keys.yaml"
    key = octavo("keys", "add", f"--file={keys}", "--tenant=acme")
    curve = folder / "curve"
    curve.mkdir()
    for name in ("scheduler", "worker", "stranger"):
        octavo("keys", "curve", f"--directory={curve}", f"--name={name}")
    (curve / "allowed").write_bytes((curve / "worker.pub").read_bytes())
    it = Deployment(
        folder, Authority(folder, "clients"), Authority(folder, "servers"), f"tcp://127.0.0.1:{ports[0]}",
        f"127.0.0.1:{ports[1]}", f"localhost:{ports[2]}", f"https://localhost:{ports[3]}", key,
    )  # fmt: skip
    certificate, private = it.servers.issue("gateway")
    processes = [
        Process(
            folder / "scheduler.log", "scheduler", f"--worker-endpoint={it.worker_endpoint}",
            f"--scheduler-address={it.scheduler_address}", f"--worker-curve-key={curve}/scheduler.key",
            f"--worker-curve-allowed={curve}/allowed", *it.hop(*it.servers.issue("scheduler")),
        ),
        Process(
            folder / "worker.log", "worker", f"--model={smollm2}", "--device=cpu", "--kv-cache-memory=64MiB",
            f"--worker-endpoint={it.worker_endpoint}", f"--curve-key={curve}/worker.key",
            f"--curve-server-key={curve}/scheduler.pub",
        ),
        Process(
            folder / "gateway.log", "gateway", str(smollm2), f"--grpc-address=127.0.0.1:{ports[2]}",
            f"--http-address=127.0.0.1:{ports[3]}", f"--scheduler-addresses={it.scheduler_address}",
            f"--api-keys={keys}", "--certificate-tenants", "--certificate-tenant-prefix=spiffe:",
            f"--tls-certificate={certificate}", f"--tls-key={private}",
            f"--tls-client-ca={it.clients.ca}", *it.hop(*it.servers.issue("hop")),
        ),
    ]  # fmt: skip
    try:
        processes[1].wait_for("joined with epoch")
        processes[2].wait_for("connected to scheduler")
        yield it
    finally:
        for process in reversed(processes):
            process.stop()


async def answer(client: Client) -> str:
    return (await client.generate("The capital of France is", max_new_tokens=4, temperature=0)).text


async def test_a_caller_with_a_key_is_answered_over_encrypted_hops(deployment: Deployment) -> None:
    async with Client(deployment.address, credentials=deployment.credentials(), token=deployment.key) as client:
        assert await answer(client)


async def test_a_certificate_is_enough_if_it_names_a_tenant(deployment: Deployment) -> None:
    async with Client(deployment.address, credentials=deployment.credentials("spiffe://acme.test/app")) as client:
        assert await answer(client)


async def test_a_caller_without_a_credential_is_refused(deployment: Deployment) -> None:
    for token in ("", "oct_000000000000_" + 43 * "x"):
        async with Client(deployment.address, credentials=deployment.credentials(), token=token) as client:
            with pytest.raises(OctavoError) as caught:
                await client.generate("x", model="smollm2-135m-instruct", max_new_tokens=1)
        assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED


async def test_a_plain_client_and_one_without_a_certificate_do_not_get_through(deployment: Deployment) -> None:
    only_server = grpc.ssl_channel_credentials(deployment.servers.ca.read_bytes())
    for credentials in (None, only_server):
        async with Client(deployment.address, credentials=credentials, token=deployment.key, timeout_s=5) as client:
            with pytest.raises(OctavoError):
                await answer(client)


def test_http_is_encrypted_and_needs_a_key_too(deployment: Deployment) -> None:
    certificate, key = deployment.clients.issue("http-client")
    context = httpx.create_ssl_context(verify=str(deployment.servers.ca))
    context.load_cert_chain(certificate, key)
    with httpx.Client(verify=context, base_url=deployment.url) as http:
        assert http.get("/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer x"}):
            refused = http.get("/v1/models", headers=headers)
            assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
        assert http.get("/v1/models", headers={"authorization": f"Bearer {deployment.key}"}).status_code == 200
    with pytest.raises(httpx.TransportError):
        httpx.get(deployment.url.replace("https", "http") + "/health")


async def test_a_key_that_is_taken_away_stops_working_while_the_server_runs(deployment: Deployment) -> None:
    keys = deployment.folder / "api-keys.yaml"
    key = octavo("keys", "add", f"--file={keys}", "--tenant=short")
    async with Client(deployment.address, credentials=deployment.credentials(), token=key) as client:
        await until_answered(client)
        octavo("keys", "remove", f"--file={keys}", f"--id={key.split('_')[1]}")
        await until_refused(client)


async def until_answered(client: Client) -> None:
    """The file is looked at once a second."""
    deadline = time.monotonic() + 10
    while True:
        try:
            await client.models()
            return
        except OctavoError:
            assert time.monotonic() < deadline


async def until_refused(client: Client) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            await client.models()
        except OctavoError:
            return
        assert time.monotonic() < deadline


async def test_new_connections_get_a_certificate_that_was_replaced(deployment: Deployment) -> None:
    def shown() -> str:
        certificate, key = deployment.clients.issue("prober")
        context = ssl.create_default_context(cafile=str(deployment.servers.ca))
        context.load_cert_chain(certificate, key)
        context.set_alpn_protocols(["h2"])
        host, port = deployment.address.split(":")
        with (
            socket.create_connection((host, int(port)), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            return str(secure.getpeercert()["serialNumber"])  # type: ignore[index]

    before = shown()
    async with Client(deployment.address, credentials=deployment.credentials(), token=deployment.key) as client:
        await client.models()
        deployment.servers.issue("renewed", file="gateway")
        deadline = time.monotonic() + 20
        while shown() == before:
            assert time.monotonic() < deadline
        await client.models()  # an old connection goes on


def test_a_worker_that_is_not_on_the_list_cannot_join_and_a_plain_one_gets_nothing(deployment: Deployment) -> None:
    """The monitor of a real socket says how the handshake ended."""
    for name in ("stranger", ""):
        context = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.linger = 0
        if name:
            dealer.curve_secretkey = (deployment.folder / "curve" / f"{name}.key").read_bytes().strip()
            dealer.curve_publickey = (deployment.folder / "curve" / f"{name}.pub").read_bytes().strip()
            dealer.curve_serverkey = (deployment.folder / "curve" / "scheduler.pub").read_bytes().strip()
        monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | HANDSHAKE_FAILURES)
        dealer.connect(deployment.worker_endpoint)
        assert monitor.poll(10_000), "the handshake neither failed nor succeeded"
        event = int.from_bytes(monitor.recv_multipart()[0][:2], "little")
        assert event & HANDSHAKE_FAILURES
        dealer.disable_monitor()
        dealer.close()
        monitor.close()
        context.term()


HANDSHAKE_FAILURES = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_DISCONNECTED
)


def test_an_endpoint_that_others_can_reach_is_refused_without_keys(tmp_path: Path) -> None:
    process = Process(tmp_path / "log", "scheduler", f"--worker-endpoint=tcp://0.0.0.0:{free_port()}")
    try:
        assert process.wait() == 2
        assert "worker_curve_key" in process.printed
    finally:
        process.stop()
