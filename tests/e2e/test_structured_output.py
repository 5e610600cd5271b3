"""Outputs keep to schemas, regular expressions, grammars and choices; and stay the same whatever dies."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from octavo.services.client import Client

from .stack import Answer, Stack, answer, until_idle

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["tall", "kind", "old"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ASK = "Describe a person as JSON with a name, an age and tags."
SEEDED: dict[str, Any] = {"temperature": 1.2, "repetition_penalty": 1.05, "max_new_tokens": 200}


async def people(client: Client, count: int) -> list[Answer]:
    return await asyncio.gather(
        *(answer(client, ASK, json_schema=PERSON, seed=seed, **SEEDED) for seed in range(count))
    )


async def until_running(client: Client, count: int) -> None:
    while True:
        (load,) = await client.load()
        if load.running >= count:
            return


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"regex": r"[A-Z][a-z]{1,9} is [0-9]{1,3} years old\."}, r"[A-Z][a-z]{1,9} is [0-9]{1,3} years old\."),
        ({"choices": ["blue", "green", "très rouge"]}, "blue|green|très rouge"),
        ({"grammar": 'root ::= "a" ("b" | "c")* "d"'}, "a[bc]*d"),
        ({"grammar": 'start: /[0-9]+/ ("," /[0-9]+/)*'}, "[0-9]+(,[0-9]+)*"),
    ],
)
async def test_an_output_matches_what_was_asked_for(stack: Stack, constraint: dict[str, Any], pattern: str) -> None:
    async with stack.client() as client:
        made = await answer(client, "The sky is", temperature=1, seed=3, max_new_tokens=60, **constraint)

    text = made.text if made.stream.finished[0].finish_reason == 1 else None
    assert text is None or re.fullmatch(pattern, text)
    # What was cut at its greatest length is at least the beginning of a match.
    assert text is not None or len(made.ids) == 60


async def test_each_of_several_candidates_validates(stack: Stack) -> None:
    async with stack.client() as client:
        reply = await client.generate(ASK, json_schema=PERSON, seed=5, candidate_count=3, logprobs=2, **SEEDED)

    texts = [candidate.text for candidate in reply.response.candidates]
    assert len(set(texts)) == 3
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)


async def test_seeded_outputs_are_the_same_alone_together_and_after_the_worker_was_killed(stack: Stack) -> None:
    async with stack.client() as client:
        alone = [await answer(client, ASK, json_schema=PERSON, seed=seed, **SEEDED) for seed in range(2)]
        together = await people(client, 10)
        assert [each.ids for each in together[:2]] == [each.ids for each in alone]
        for each in together:
            jsonschema.validate(json.loads(each.text), PERSON)
        for name in ("worker", "scheduler"):
            running = asyncio.create_task(people(client, 10))
            await until_running(client, 10)
            (pid,) = stack.children(name)
            os.kill(pid, signal.SIGKILL)
            assert [each.ids for each in await running] == [each.ids for each in together]
        await until_idle(client)


async def test_what_a_schema_forces_is_guessed_and_stays_the_same_when_the_worker_dies(
    stack: Stack, smollm2: Path
) -> None:
    settings = {**SEEDED, "json_schema": PERSON, "logprobs": 1}
    async with stack.client() as client:
        guessed = [await answer(client, ASK, seed=seed, **settings) for seed in range(4)]
        running = asyncio.create_task(answer(client, ASK, seed=0, **settings))
        await until_running(client, 1)
        (pid,) = stack.children("worker")
        os.kill(pid, signal.SIGKILL)
        assert (await running).ids == guessed[0].ids
        await until_idle(client)
    plain = Stack(smollm2, "--device=cpu", "--kv-cache-memory=512MiB", "--speculative-tokens=0")
    try:
        async with plain.client() as client:
            expected = [await answer(client, ASK, seed=seed, **settings) for seed in range(4)]
    finally:
        plain.stop()

    assert [each.ids for each in guessed] == [each.ids for each in expected]
    accepted = [
        sum(each.stream.completed.usage.speculative_accepted_tokens for each in answers if each.stream.completed)
        for answers in (guessed, expected)
    ]
    assert accepted[0] > len(guessed), accepted
    assert accepted[1] == 0


async def test_a_minimum_length_does_not_break_a_schema(stack: Stack) -> None:
    async with stack.client() as client:
        made = await answer(client, ASK, regex="[0-9]{3}", min_new_tokens=12, max_new_tokens=30, temperature=0)

    assert re.fullmatch("[0-9]{3}", made.text)
    assert len(made.ids) == 13  # the last one ends it


@pytest.mark.parametrize("endpoint", ["chat/completions", "completions"])
@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "p", "strict": True, "schema": PERSON},
                }
            },
            "",
        ),
        ({"guided_json": PERSON}, ""),
        ({"structured_outputs": {"json": PERSON}}, ""),
        ({"guided_regex": "[a-c]{4}"}, "[a-c]{4}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"structured_outputs": {"grammar": 'root ::= "so" | "so so"'}}, "so|so so"),
    ],
)
async def test_the_openai_api_takes_all_names_for_it(
    stack: Stack, endpoint: str, fields: dict[str, Any], pattern: str
) -> None:
    prompt = {"prompt": ASK} if endpoint == "completions" else {"messages": [{"role": "user", "content": ASK}]}
    body = {"model": "m", "max_tokens": 200, "temperature": 0, **prompt, **fields}
    async with httpx.AsyncClient(base_url=f"{stack.http_url}/v1", timeout=60) as http:
        body["model"] = (await http.get("/models")).json()["data"][0]["id"]
        choice = (await http.post(f"/{endpoint}", json=body)).raise_for_status().json()["choices"][0]

    text = choice["text"] if endpoint == "completions" else choice["message"]["content"]
    assert choice["finish_reason"] == "stop"
    if pattern:
        assert re.fullmatch(pattern, text)
    else:
        jsonschema.validate(json.loads(text), PERSON)


async def test_json_mode_gives_an_object_and_a_wrong_schema_names_its_place(stack: Stack) -> None:
    async with httpx.AsyncClient(base_url=f"{stack.http_url}/v1", timeout=60) as http:
        model = (await http.get("/models")).json()["data"][0]["id"]
        body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": ASK}], "max_tokens": 20}
        ok = await http.post("/chat/completions", json={**body, "response_format": {"type": "json_object"}})
        wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"items": {"uniqueItems": True}}}}
        refused = await http.post("/chat/completions", json={**body, "response_format": wrong})

    assert ok.json()["choices"][0]["message"]["content"].startswith("{")
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "response_format.json_schema"
    assert "#/items" in refused.json()["error"]["message"]
