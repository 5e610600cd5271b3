"""A server that is started to be measured."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from octavo.services.bench.server import Server, ServerError


@pytest.fixture
async def other_server() -> AsyncIterator[str]:
    """The URL of a server that runs already."""
    runner = web.AppRunner(web.Application())
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_what_runs_already_is_not_measured_for_what_was_to_be_started(other_server: str, tmp_path: Path) -> None:
    started = tmp_path / "started"
    command = [sys.executable, "-c", f"open({str(started)!r}, 'w')"]
    with pytest.raises(ServerError, match=r"answers at .* already"):
        async with Server(command, f"{other_server}/health", tmp_path / "log"):
            pass
    assert not started.exists()


async def test_one_that_ends_before_it_is_ready_is_told_with_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with pytest.raises(ServerError, match=r"ended with 1; see .*log"):
        async with Server(command, "http://127.0.0.1:9/health", tmp_path / "log"):
            pass
    assert "no such model" in (tmp_path / "log").read_text()
