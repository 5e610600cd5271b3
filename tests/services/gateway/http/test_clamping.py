"""Output that does not fit the context beside its prompt, where it is cut to what does."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import httpx
import pytest

from octavo.services.gateway.config import GatewayConfig


@pytest.fixture
def config(config: GatewayConfig) -> GatewayConfig:
    return dataclasses.replace(config, clamp_max_tokens=True)


@pytest.mark.parametrize("limit", [10, 1000, None])
async def test_more_output_than_fits_is_cut_to_what_does(
    harness: Any, http: httpx.AsyncClient, limit: int | None
) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": limit}
    running = asyncio.ensure_future(http.post("/v1/chat/completions", json=body))
    submit = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(submit.handle, [0], finish=1)

    assert (await running).status_code == 200
    room = 64 - len(submit.prompt_token_ids)
    assert submit.stop.max_new_tokens == min(limit or room, room)


async def test_a_prompt_that_leaves_no_room_is_still_refused(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/completions", json={"model": "tiny", "prompt": "x" * 64, "max_tokens": 1000})

    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
