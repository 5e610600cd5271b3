"""Quotas, keys, certificates and versions change under 32 streams, on processes started as the chart renders them."""

from __future__ import annotations

import asyncio
import base64
import shutil
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import yaml
from cryptography import x509

from octavo.services.client import Client
from octavo.services.client.errors import OctavoError
from octavo.services.common.api_keys import make_key
from tests.certificates import Authority
from tests.helm.chart import Object

from .pods import why_not
from .stack import answer
from .test_chart import CASES, READY_S, Load, Release, installed, render, roll_gateways

NUM_LANES = 32
HOSTS = ["demo-gateway.llm.svc", "demo-engine.llm.svc"]
VALUES = ["transport.tls.enabled=true", "transport.tls.existingSecret=hop", "gateway.auth.apiKeysSecret=keys"]


def secret(name: str, files: dict[str, bytes]) -> Object:
    data = {key: base64.b64encode(value).decode() for key, value in files.items()}
    return {"kind": "Secret", "metadata": {"name": name}, "data": data}


def keys_file(*entries: dict[str, object]) -> bytes:
    return yaml.safe_dump(list(entries)).encode()


class Changes:
    """What an operator changes: each method returns once the change is in force."""

    def __init__(self, release: Release, authority: Authority, load: Load) -> None:
        self._release = release
        self._authority = authority
        self._load = load

    def write(self, part: str, volume: str, files: dict[str, bytes]) -> None:
        """Change a Secret or a ConfigMap, and do what a kubelet does then for the pods that there are."""
        names = {"tenants": "demo-tenants", "api-keys": "keys", "hop-tls": "hop"}
        (it,) = (each for each in self._release.objects if each["metadata"]["name"] == names[volume])
        for name, data in files.items():
            it["data"][name] = data.decode() if it["kind"] == "ConfigMap" else base64.b64encode(data).decode()
        for pod in self._release.pods(part):
            for name, data in files.items():
                new = pod.folder / f"{name}.new"
                new.write_bytes(data)
                new.replace(pod.volumes[volume] / name)

    async def quota(self) -> None:
        self.write("engine", "tenants", {"tenants.yaml": b"tenants: {other: {max_requests: 1}}"})
        for pod in self._release.pods("engine"):
            scheduler = pod.containers["scheduler"]
            await until(lambda: "tenants.yaml has changed and was read again" in scheduler.log)  # noqa: B023

    async def keys(self) -> None:
        old, (new, entry) = self._load.token, make_key("t")
        entries = yaml.safe_load((self._release.pods("gateway")[0].volumes["api-keys"] / "api-keys.yaml").read_text())
        self.write("gateway", "api-keys", {"api-keys.yaml": keys_file(*entries, entry)})
        await self._until_keys(new, True)
        self._load.token = new
        ended = self._load.num_streams
        await until(lambda: bool(self._load.wrong) or self._load.num_streams >= ended + 2 * NUM_LANES)
        self.write("gateway", "api-keys", {"api-keys.yaml": keys_file(entry)})
        await self._until_keys(old, False)

    async def _until_keys(self, key: str, accepted: bool) -> None:
        for pod in self._release.pods("gateway"):
            async with Client(f"{pod.address}:50051", token=key) as client:
                while await is_accepted(client) is not accepted:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)

    async def certificate(self) -> None:
        files = hop_files(self._authority)
        self.write("", "hop-tls", files)
        new = x509.load_pem_x509_certificate(files["tls.crt"]).serial_number
        for pod in self._release.pods("engine"):
            context = ssl.create_default_context(cafile=str(pod.volumes["hop-tls"] / "ca.crt"))
            context.load_cert_chain(pod.volumes["hop-tls"] / "tls.crt", pod.volumes["hop-tls"] / "tls.key")
            context.set_alpn_protocols(["h2"])
            while await serial_number(pod.address, context) != new:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        await roll_gateways(self._release)  # they connect with it

    async def version(self) -> None:
        """Roll the engines as a StatefulSet does: each new scheduler runs beside the old ones."""
        self._release.objects = [*render("engine.podAnnotations.version=new", *VALUES), *self._release.objects[-2:]]
        for old in sorted(self._release.pods("engine"), key=lambda pod: pod.name, reverse=True):
            assert await old.delete() == {"scheduler": 0, "worker-0": 0}
            shutil.rmtree(old.folder)
            await (await self._release.start(old.name)).until_ready(READY_S)


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():  # noqa: ASYNC110
        await asyncio.sleep(0.1)


async def is_accepted(client: Client) -> bool:
    try:
        await client.load()
    except OctavoError:
        return False
    return True


async def serial_number(host: str, context: ssl.SSLContext) -> int:
    _, writer = await asyncio.open_connection(host, 50052, ssl=context, server_hostname=HOSTS[1])
    shown = writer.get_extra_info("ssl_object").getpeercert(True)
    writer.close()
    return x509.load_der_x509_certificate(shown).serial_number


def hop_files(authority: Authority) -> dict[str, bytes]:
    certificate, key = authority.issue("hop", names=HOSTS)
    return {
        "tls.crt": certificate.read_bytes(),
        "tls.key": key.read_bytes(),
        "ca.crt": authority.ca.read_bytes(),
    }


@pytest.mark.timeout(1200)  # it waits for a dozen processes to start, on a machine that may be busy
async def test_no_stream_is_lost_while_quotas_keys_certificates_and_versions_change(
    smollm2: Path, tmp_path: Path
) -> None:
    if reason := why_not():
        pytest.skip(reason)
    authority = Authority(tmp_path)
    key, entry = make_key("t")
    secrets = [secret("hop", hop_files(authority)), secret("keys", {"api-keys.yaml": keys_file(entry)})]
    async with installed(smollm2, [*render(*VALUES), *secrets]) as release:
        async with Client(release.address, token=key) as client:
            release.expected = [(await answer(client, **case)).ids for case in CASES]
        load = Load(release.address, release.expected, NUM_LANES, key)
        changes = Changes(release, authority, load)
        operations: list[tuple[Callable[[], Awaitable[None]], bool]] = [
            (changes.quota, True), (changes.keys, True), (changes.certificate, False), (changes.version, False),
        ]  # fmt: skip
        async with load.running():
            for change, keeps_all in operations:
                before = [each.process for pod in release.pods("") for each in pod.containers.values()]
                start, streams = time.monotonic(), load.num_streams
                await change()
                seconds = time.monotonic() - start
                await until(lambda: bool(load.wrong) or load.num_streams >= streams + NUM_LANES)  # noqa: B023
                kept = sum(process is not None and process.returncode is None for process in before)
                print(
                    f"{change.__name__}: {seconds:.1f} s, {load.num_streams - streams} streams, {len(load.wrong)} lost,"
                    f" {load.num_resumed} resumed, {kept} of {len(before)} processes kept"
                )
                assert load.wrong == []
                assert kept == len(before) or not keeps_all
