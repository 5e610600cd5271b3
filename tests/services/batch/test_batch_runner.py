"""Windows, order, retries and giving up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from octavo.services.batch.lines import Line
from octavo.services.batch.results import Answer, ResultFile
from octavo.services.batch.runner import BatchRun, GaveUpError, TryAgain
from octavo.services.offline.http_sender import HttpSender

Behave = Callable[[Line], Awaitable[Answer]]


def lines(count: int) -> list[Line]:
    return [Line(index, f"c{index}", "/v1/completions", {"prompt": str(index)}, index) for index in range(count)]


def good(line: Line) -> Answer:
    return Answer(200, "r", {"text": line.body["prompt"]})


async def run(path: Path, source: Any, send: Behave, **options: Any) -> list[int]:
    """Return the places of the results in the file."""
    with ResultFile(path) as results:
        await BatchRun(source, results, send, **{"window": 4, **options}).run()
    written = path.read_text().splitlines()  # noqa: ASYNC240 - nothing else runs
    return [int(json.loads(text)["id"].removeprefix("batch_req_")) for text in written]


async def test_the_window_is_used_and_kept(tmp_path: Path) -> None:
    running, most = 0, 0

    async def send(line: Line) -> Answer:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(line.index % 5):
            await asyncio.sleep(0)
        running -= 1
        return good(line)

    assert sorted(await run(tmp_path / "out", lines(50), send)) == list(range(50))
    assert most == 4


async def test_results_in_order_hold_the_window(tmp_path: Path) -> None:
    """While the first request is not answered, no more are read than the window has room for."""
    first = asyncio.Event()
    started: list[int] = []

    async def send(line: Line) -> Answer:
        started.append(line.index)
        if line.index == 0:
            await first.wait()
        if line.index == 3:
            first.set()
        return good(line)

    assert await run(tmp_path / "out", lines(20), send, ordered=True) == list(range(20))
    assert started[:4] == [0, 1, 2, 3]


async def test_what_is_done_is_not_sent_again(tmp_path: Path) -> None:
    sent: list[int] = []

    async def send(line: Line) -> Answer:
        sent.append(line.index)
        if len(sent) == 7:
            raise RuntimeError("killed")
        return good(line)

    with pytest.raises(RuntimeError):
        await run(tmp_path / "out", lines(20), send, window=1)
    done = await run(tmp_path / "out", lines(20), send, window=1)
    assert sorted(done) == list(range(20))
    assert len(sent) == 21  # the one that failed was sent twice


async def test_a_busy_server_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    real_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        if seconds not in (0, 5.0):
            waits.append(seconds)
        await real_sleep(0 if seconds < 5 else seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    refusals = {0: 5}

    async def send(line: Line) -> Answer:
        if refusals.get(line.index, 0):
            refusals[line.index] -= 1
            raise TryAgain(Answer(429, "r", {}), blameless=True, retry_after_s=2.0)
        return good(line)

    assert await run(tmp_path / "out", lines(1), send) == [0]
    assert len(waits) == 5
    assert min(waits) >= 2.0


async def test_a_request_that_breaks_the_server_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.services.batch.runner._PAUSE_S", (0.0, 0.0))
    attempts = 0

    async def send(line: Line) -> Answer:
        nonlocal attempts
        if line.index == 1:
            attempts += 1
            raise TryAgain(Answer(500, "r", {"error": {"message": "bug"}}), blameless=False)
        return good(line)

    assert sorted(await run(tmp_path / "out", lines(3), send)) == [0, 1, 2]
    assert attempts == 3
    with ResultFile(tmp_path / "out") as results:
        assert results.num_failed == 1


async def test_it_gives_up_when_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.services.batch.runner._PAUSE_S", (0.001, 0.001))

    async def send(line: Line) -> Answer:
        raise TryAgain(Answer(0, "r", {"message": "refused"}), blameless=True)

    with pytest.raises(GaveUpError, match="refused"):
        await run(tmp_path / "out", lines(3), send, give_up_s=0.01)
    assert (tmp_path / "out").read_bytes() == b""


async def test_a_server_that_is_busy_with_the_run_is_not_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has room for one request, whose answer takes longer than the run waits for a sign of life."""
    monkeypatch.setattr("octavo.services.batch.runner._PAUSE_S", (0.001, 0.001))
    refusals = 0
    room, often_refused = asyncio.Lock(), asyncio.Event()

    async def send(line: Line) -> Answer:
        nonlocal refusals
        if room.locked():
            refusals += 1
            if refusals == 30:  # at least 1 ms each
                often_refused.set()
            raise TryAgain(Answer(429, "r", {"message": "full"}), blameless=True)
        async with room:
            await often_refused.wait()
            return good(line)

    assert sorted(await run(tmp_path / "out", lines(3), send, give_up_s=0.005)) == [0, 1, 2]


async def test_a_request_that_an_idle_server_has_no_room_for_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks for more than its tenant may: the run ends all the same, with every result."""
    monkeypatch.setattr("octavo.services.batch.runner._PAUSE_S", (0.001, 0.001))
    refused = asyncio.Event()

    async def send(line: Line) -> Answer:
        if line.index == 1:
            refused.set()
            raise TryAgain(Answer(429, "r", {"error": {"message": "more than the quota"}}), blameless=True)
        await refused.wait()
        return good(line)

    assert sorted(await run(tmp_path / "out", lines(5), send, give_up_s=0.01)) == list(range(5))
    with ResultFile(tmp_path / "out") as results:
        assert results.num_failed == 1


async def test_a_server_that_takes_nothing_any_more_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not refused while others were answered does not fail for it."""
    monkeypatch.setattr("octavo.services.batch.runner._PAUSE_S", (0.001, 0.001))

    async def send(line: Line) -> Answer:
        if line.index < 5:
            return good(line)
        raise TryAgain(Answer(429, "r", {"message": "come back tomorrow"}), blameless=True)

    with pytest.raises(GaveUpError, match="tomorrow"):
        await run(tmp_path / "out", lines(9), send, window=1, give_up_s=0.01)
    with ResultFile(tmp_path / "out") as results:
        assert (results.num_done, results.num_failed) == (5, 0)


@pytest.mark.parametrize("body", [b"<p>caf\xe9</p>", b"[" * 100_000, b""])
async def test_an_answer_that_cannot_be_read_is_a_failure_of_one_request(body: bytes) -> None:
    async def page(_: web.Request) -> web.Response:
        return web.Response(status=502, body=body, content_type="text/html", charset="utf-8")

    application = web.Application()
    application.router.add_post("/v1/completions", page)
    async with TestServer(application) as server, HttpSender(str(server.make_url("/"))) as send:
        with pytest.raises(TryAgain) as failure:
            await send(lines(1)[0])
    assert failure.value.answer.status == 502
    assert failure.value.answer.body["error"]["code"] == "no_json"
