"""/v1/files and /v1/batches, with the openai package and a real deployment."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from .stack import Stack

ENDPOINT: Any = "/v1/completions"
ENDED = ("completed", "failed", "expired", "cancelled")


@pytest.fixture(scope="module")
def deployment(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OCTAVO_BATCH_DIR", str(tmp_path_factory.mktemp("batches")))
        running = Stack(smollm2, "--device", "cpu", "--kv-cache-memory", "256MiB")
    yield running
    assert running.stop() == 0


@pytest.fixture
def client(deployment: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{deployment.http_url}/v1", api_key="none") as client:
        yield client


def requests(count: int, **fields: Any) -> bytes:
    lines = [
        {
            "custom_id": f"n{number}",
            "method": "POST",
            "url": ENDPOINT,
            "body": {
                "model": "smollm2-135m-instruct",
                "prompt": f"Number {number} is",
                "max_tokens": 12,
                "seed": number,
                **fields,
            },
        }
        for number in range(count)
    ]
    return "\n".join(map(json.dumps, lines)).encode()


def begin(client: openai.OpenAI, data: bytes) -> str:
    file = client.files.create(file=("requests.jsonl", data), purpose="batch")
    assert (file.bytes, file.filename, file.purpose) == (len(data), "requests.jsonl", "batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h", metadata={"who": "me"}
    )
    return batch.id


def end_of(client: openai.OpenAI, batch_id: str) -> Any:
    deadline = time.monotonic() + 200
    while (batch := client.batches.retrieve(batch_id)).status not in ENDED:
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)
    return batch


def results(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    found = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    by_id = {result["custom_id"]: result for result in found}
    assert len(by_id) == len(found), "a request has two results"
    return by_id


def test_a_batch_is_answered(client: openai.OpenAI) -> None:
    bad = json.dumps({"custom_id": "bad", "url": ENDPOINT, "body": {"prompt": "x", "model": "no-such-model"}})
    batch = end_of(client, begin(client, requests(20) + b"\n" + bad.encode()))
    assert batch.status == "completed"
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (21, 20, 1)
    assert batch.metadata == {"who": "me"}
    answers, errors = results(client, batch.output_file_id), results(client, batch.error_file_id)
    assert set(answers) == {f"n{number}" for number in range(20)}
    assert set(errors) == {"bad"}
    assert errors["bad"]["response"]["status_code"] == 404
    body = answers["n3"]["response"]["body"]
    single = client.completions.create(model="smollm2-135m-instruct", prompt="Number 3 is", max_tokens=12, seed=3)
    assert body["choices"][0]["text"] == single.choices[0].text
    listed = client.batches.list(limit=1)
    assert [each.id for each in listed.data] == [batch.id]


def test_a_batch_outlives_its_gateway(deployment: Stack, client: openai.OpenAI) -> None:
    batch_id = begin(client, requests(60))
    while client.batches.retrieve(batch_id).request_counts.completed < 8:
        time.sleep(0.05)
    (pid,) = deployment.children("gateway")
    os.kill(pid, signal.SIGKILL)
    deployment.wait_for_restart("gateway", pid)
    batch = end_of(client, batch_id)
    assert (batch.status, batch.request_counts.completed) == ("completed", 60)
    assert set(results(client, batch.output_file_id)) == {f"n{number}" for number in range(60)}


def test_a_batch_is_cancelled(client: openai.OpenAI) -> None:
    batch_id = begin(client, requests(300, max_tokens=200, ignore_eos=True))
    assert client.batches.cancel(batch_id).status == "cancelling"
    batch = end_of(client, batch_id)
    assert batch.status == "cancelled"
    assert batch.request_counts.completed < 300


def test_a_file_that_is_no_batch_fails_it(client: openai.OpenAI) -> None:
    batch = end_of(client, begin(client, requests(2) + b"\nnonsense\n"))
    assert batch.status == "failed"
    assert [(error.line, error.code) for error in batch.errors.data] == [(3, "invalid_line")]
    assert batch.output_file_id is None


def test_files(client: openai.OpenAI) -> None:
    file = client.files.create(file=("a.jsonl", b"{}\n" * 200_000), purpose="batch")
    assert client.files.retrieve(file.id).bytes == 600_000
    assert client.files.content(file.id).content == b"{}\n" * 200_000
    assert file.id in [each.id for each in client.files.list()]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


@pytest.mark.parametrize("name", ["file_0", "..%2F..%2Fetc%2Fpasswd", "batch_" + "0" * 32, "file_" + "0" * 32])
def test_unknown_files(deployment: Stack, name: str) -> None:
    for path in (f"/v1/files/{name}", f"/v1/files/{name}/content"):
        assert httpx.get(deployment.http_url + path).status_code == 404
    assert httpx.delete(f"{deployment.http_url}/v1/files/{name}").status_code == 404


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"data": {"purpose": "batch"}, "files": {"other": b"x"}}, "file"),
        ({"data": {"purpose": "fine-tune"}, "files": {"file": b"x"}}, "purpose"),
        ({"content": b"x", "headers": {"content-type": "application/json"}}, "multipart/form-data"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, "form"),
        ({"content": b"--a\r\nnonsense", "headers": {"content-type": "multipart/form-data; boundary=a"}}, ""),
        ({"files": [("file", b"x"), ("file", b"y")], "data": {"purpose": "batch"}}, "form"),
    ],
)
def test_bad_uploads(deployment: Stack, form: Any, message: str) -> None:
    answer = httpx.post(f"{deployment.http_url}/v1/files", **form)
    assert answer.status_code in (400, 415)
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"endpoint": "/v1/completions"},
        {"input_file_id": "file_" + "0" * 32, "endpoint": "/v1/completions"},
        {"input_file_id": "x", "endpoint": "/v1/files"},
        {"input_file_id": "x", "endpoint": "/v1/completions", "completion_window": "soon"},
        {"input_file_id": "x", "endpoint": "/v1/completions", "metadata": {"a": 1}},
        {"input_file_id": "x", "endpoint": "/v1/completions", "input_file": 1},
    ],
)
def test_bad_batches(deployment: Stack, body: Any) -> None:
    answer = httpx.post(f"{deployment.http_url}/v1/batches", json=body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["message"]
