"""/v1/files and the lists of /v1/batches at a real listener: what is refused, and before what."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from octavo.services.gateway.config import GatewayConfig

HEAD = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\n'
HEAD += b'Content-Disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n'
TAIL = b"\r\n--x--\r\n"
FORM = {"content-type": "multipart/form-data; boundary=x"}
MIB = 1 << 20


@pytest.fixture
def config(config: GatewayConfig, tmp_path: Path) -> GatewayConfig:
    limits: dict[str, Any] = {"batch_max_file_bytes": 4 * MIB, "batch_max_tenant_bytes": 6 * MIB}
    return dataclasses.replace(config, batch_dir=tmp_path / "batches", **limits)


def data_files(config: GatewayConfig) -> list[Path]:
    assert config.batch_dir is not None
    return sorted(config.batch_dir.glob("files/*.data"))


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not is_so():  # noqa: ASYNC110 - it is on the disk
            await asyncio.sleep(0)


async def test_a_file_is_written_to_its_place_only(
    config: GatewayConfig, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    wrote = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield HEAD + b"x" * 2 * MIB
        await wrote.wait()
        yield TAIL

    sending = asyncio.create_task(http.post("/v1/files", content=body(), headers=FORM))
    await until(lambda: any(file.stat().st_size >= MIB for file in data_files(config)))
    assert (await http.get("/v1/files")).json()["data"] == []
    wrote.set()
    kept = (await sending).json()
    assert kept["bytes"] == 2 * MIB
    assert (await http.get(f"/v1/files/{kept['id']}/content")).content == b"x" * 2 * MIB


async def test_a_client_that_hangs_up_leaves_nothing(config: GatewayConfig, http: httpx.AsyncClient) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield HEAD + b"x" * 2 * MIB
        await until(lambda: bool(data_files(config)))
        raise ConnectionError

    with contextlib.suppress(ConnectionError):
        await http.post("/v1/files", content=body(), headers=FORM)
    await until(lambda: not data_files(config))
    assert (await http.post("/v1/files", content=HEAD + b"x" * 4 * MIB + TAIL, headers=FORM)).status_code == 200


async def test_a_quota_is_looked_at_before_the_bytes_come(config: GatewayConfig, url: str) -> None:
    async with httpx.AsyncClient(base_url=url) as http:
        assert (await http.post("/v1/files", content=HEAD + b"x" * 4 * MIB + TAIL, headers=FORM)).status_code == 200
    reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
    head = f"POST /v1/files HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: {4 * MIB}\r\n"
    writer.write((head + f"content-type: {FORM['content-type']}\r\n\r\n").encode())
    assert (await reader.readline()).split()[1] == b"429"
    assert len(data_files(config)) == 1
    writer.close()


async def test_a_tenant_has_some_uploads_at_once(config: GatewayConfig, http: httpx.AsyncClient) -> None:
    go_on = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield HEAD
        await go_on.wait()
        yield b"x" + TAIL

    sending = [asyncio.create_task(http.post("/v1/files", content=body(), headers=FORM)) for _ in range(8)]
    await until(lambda: len(data_files(config)) == 8)
    refused = await http.post("/v1/files", content=HEAD + b"x" + TAIL, headers=FORM)
    assert refused.status_code == 429
    assert "8 files are being uploaded" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) > 0
    go_on.set()
    assert [answer.status_code for answer in await asyncio.gather(*sending)] == [200] * 8
    assert (await http.post("/v1/files", content=HEAD + b"x" + TAIL, headers=FORM)).status_code == 200


async def test_files_and_results_say_when_they_expire(sdk: openai.AsyncOpenAI) -> None:
    plain = await sdk.files.create(file=("a.jsonl", b"{}"), purpose="batch")
    early = await sdk.files.create(
        file=("b.jsonl", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 7200}
    )
    assert plain.expires_at == plain.created_at + 30 * 24 * 3600
    assert early.expires_at == early.created_at + 7200
    batch = await sdk.batches.create(
        input_file_id=plain.id,
        endpoint="/v1/completions",
        completion_window="24h",
        output_expires_after={"anchor": "created_at", "seconds": 3600},
    )
    while batch.status != "failed":
        batch = await sdk.batches.retrieve(batch.id)


@pytest.mark.parametrize(
    "fields",
    [
        {"expires_after[seconds]": "7200"},
        {"expires_after[anchor]": "now", "expires_after[seconds]": "7200"},
        {"expires_after[anchor]": "created_at", "expires_after[seconds]": "1"},
        {"expires_after[anchor]": "created_at", "expires_after[seconds]": "x"},
        {"expires_after[anchor]": "created_at"},
    ],
)
async def test_an_expiry_that_is_none_is_refused(http: httpx.AsyncClient, fields: dict[str, str]) -> None:
    files = {"file": ("a.jsonl", b"{}")}
    answer = await http.post("/v1/files", data={"purpose": "batch", **fields}, files=files)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("expires_after.")


async def test_lists_go_on_behind_the_last(sdk: openai.AsyncOpenAI) -> None:
    made = [(await sdk.files.create(file=("a.jsonl", b"{}"), purpose="batch")).id for _ in range(5)]
    page = await sdk.files.list(limit=2)
    assert [file.id for file in page.data] == [made[4], made[3]]
    assert page.has_more
    assert [file.id async for file in sdk.files.list(limit=2)] == made[::-1]
    assert (await sdk.files.list(after="file_of_nobody")).data == []
