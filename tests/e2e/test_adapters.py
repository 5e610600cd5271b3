"""Adapters through all of a deployment: by name, by request, loaded on first use, and back after losses."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo.services.client import Client, OctavoError
from tests.peft_folders import module_shapes, random_tensors, write_adapter

from .stack import Answer, Stack, answer, references, until_idle, until_running

SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
    "num_hidden_layers": 30,
}  # fmt: skip
NUM_ADAPTERS = 12
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_end_of_sequence": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random adapters of several ranks, and broken ones."""
    folder = tmp_path_factory.mktemp("adapters")
    shapes = module_shapes(SMOLLM2)
    for seed in range(NUM_ADAPTERS):
        rank = 4 + seed % 3 * 7
        some = {name: shape for place, (name, shape) in enumerate(shapes.items()) if (place + seed) % 3}
        write_adapter(folder / f"random-{seed}", random_tensors(some, rank, seed, strength=0.3), rank)
    others = {"model.layers.0.self_attn.q_proj": (32, 32)}
    write_adapter(folder / "of-another-model", random_tensors(others, 4, 1), 4)
    return folder


@pytest.fixture(scope="module")
def stack(smollm2: Path, folder: Path) -> Iterator[Stack]:
    flags = ("--kv-cache-memory", "256MiB", "--adapter", f"first={folder}/random-0", "--adapter-dir", str(folder))
    stack = Stack(smollm2, "--device", "cpu", "--max-adapters", "8", *flags)
    yield stack
    assert stack.stop() == 0


def post(stack: Stack, path: str, **body: object) -> tuple[int, str]:
    request = urllib.request.Request(
        stack.http_url + path, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def listed(stack: Stack) -> dict[str, str]:
    """Return the parents of the models that are listed; the model itself has none."""
    with urllib.request.urlopen(stack.http_url + "/v1/models") as response:
        return {each["id"]: each.get("parent", "") for each in json.load(response)["data"]}


async def of_all(client: Client, names: list[str], **options: Any) -> list[Answer]:
    """Ask each adapter the same at once."""
    prompt = references()[1].prompt_ids
    wanted = {"max_new_tokens": 24, **GREEDY, **options}
    return await asyncio.gather(*[answer(client, token_ids=prompt, adapter=name, **wanted) for name in names])


def names() -> list[str]:
    return ["", *(f"random-{seed}" for seed in range(NUM_ADAPTERS))]


@pytest.mark.timeout(180)
async def test_each_adapter_answers_together_as_it_does_alone(stack: Stack) -> None:
    async with stack.client() as client:
        together = await of_all(client, names())  # more of them than are held at once
        alone = [(await of_all(client, [name], bypass_prefix_cache=True))[0] for name in names()]

        assert [each.ids for each in together] == [each.ids for each in alone]
        assert len({tuple(each.ids) for each in together}) > len(names()) - 3  # by chance two are alike
        (given,) = await of_all(client, ["first"])
        assert given.ids == together[1].ids
        await until_idle(client)


@pytest.mark.timeout(180)
async def test_sampling_log_probabilities_and_schemas_go_with_an_adapter(stack: Stack) -> None:
    options: dict[str, Any] = {"max_new_tokens": 24, "seed": 5, "temperature": 1.0, "logprobs": 2}
    prompt = references()[2].prompt_ids
    async with stack.client() as client:
        for more in ({}, {"choices": ["yes", "perhaps"]}, {"presence_penalty": 0.5}):
            first, again = [
                await answer(client, token_ids=prompt, adapter="random-3", **{**options, **more}) for _ in range(2)
            ]
            assert first.ids == again.ids
            if "choices" in more:
                assert first.text in ("yes", "perhaps")
        await until_idle(client)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("victims", [("worker",), ("scheduler",), ("worker", "scheduler")])
async def test_processes_that_are_killed_cost_no_token_of_any_adapter(stack: Stack, victims: tuple[str, ...]) -> None:
    async with stack.client() as client:
        undisturbed = await of_all(client, names(), max_new_tokens=96)
        disturbed = asyncio.create_task(of_all(client, names(), max_new_tokens=96))
        await until_running(client)
        for victim in victims:
            for pid in stack.children(victim):
                os.kill(pid, signal.SIGKILL)
        after = await disturbed

        assert [each.ids for each in after] == [each.ids for each in undisturbed]
        await until_idle(client)


@pytest.mark.timeout(120)
async def test_operators_load_and_unload_by_vllms_endpoints(stack: Stack, folder: Path) -> None:
    async with stack.client() as client:
        body = {"lora_name": "team/new", "lora_path": str(folder / "random-5")}
        assert post(stack, "/v1/load_lora_adapter", **body)[0] == 200
        assert listed(stack)["team/new"]
        assert not listed(stack)[listed(stack)["team/new"]]
        by_name, by_field = await of_all(client, ["team/new", "random-5"])
        assert by_name.ids == by_field.ids
        body["lora_path"] = str(folder / "random-6")  # the name means another one from now on
        assert post(stack, "/v1/load_lora_adapter", **body)[0] == 200
        (reloaded,) = await of_all(client, ["team/new"])
        assert reloaded.ids == (await of_all(client, ["random-6"]))[0].ids != by_name.ids
        assert reloaded.cached_tokens == 0

        assert post(stack, "/v1/unload_lora_adapter", lora_name="team/new")[0] == 200
        assert post(stack, "/v1/unload_lora_adapter", lora_name="team/new")[0] == 404
        with pytest.raises(OctavoError) as caught:
            await of_all(client, ["team/new"])
        assert caught.value.reason == "ADAPTER_NOT_FOUND"


@pytest.mark.timeout(120)
async def test_a_broken_adapter_is_refused_and_nobody_else_notices(stack: Stack, folder: Path) -> None:
    async with stack.client() as client:
        running = asyncio.create_task(of_all(client, ["random-1"], max_new_tokens=64))
        status, text = post(stack, "/v1/load_lora_adapter", lora_name="x", lora_path=str(folder / "of-another-model"))
        with pytest.raises(OctavoError) as caught:
            await of_all(client, ["of-another-model"])

        assert status == 400
        for message in (text, str(caught.value)):
            assert "the adapter is of another model" in message
        assert caught.value.reason == "ADAPTER_NOT_LOADED"
        outside = post(stack, "/v1/load_lora_adapter", lora_name="x", lora_path="/etc")
        assert outside[0] == 403
        assert len((await running)[0].ids) == 64
