"""Names of LoRA adapters: who may change them, and what an odd name, path, file or folder does to others."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from octavo.common.adapter_files import read_files, sha256_of
from octavo.services.gateway.app import Gateway
from octavo.services.gateway.config import GatewayConfig
from octavo.services.gateway.requests import adapters as module
from octavo.services.gateway.requests.adapters import Adapters
from octavo.services.gateway.tokenization.model_files import ModelError
from tests.peft_folders import random_tensors, write_adapter


def write(folder: Path, seed: int = 0) -> Path:
    return write_adapter(folder, random_tensors({"model.layers.0.self_attn.q_proj": (8, 8)}, 2, seed), 2)


@pytest.fixture
def config(config: GatewayConfig, tmp_path: Path) -> GatewayConfig:
    write(tmp_path / "adapters" / "mine")
    theirs = write(tmp_path / "theirs", seed=1)
    return dataclasses.replace(config, adapter_dir=tmp_path / "adapters", adapter=(f"given={theirs}",))


async def post(http: httpx.AsyncClient, what: str, name: str, path: object = "") -> httpx.Response:
    body = {"lora_name": name, **({"lora_path": str(path)} if path else {})}
    return await http.post(f"/v1/{what}_lora_adapter", json=body)


async def test_without_keys_a_name_that_an_operator_gave_cannot_be_changed(
    http: httpx.AsyncClient, tmp_path: Path
) -> None:
    replaced = await post(http, "load", "given", tmp_path / "adapters" / "mine")
    removed = await post(http, "unload", "given")
    assert (replaced.status_code, removed.status_code) == (403, 403)
    assert "given" in [model["id"] for model in (await http.get("/v1/models")).json()["data"]]


@pytest.mark.parametrize("path", ["/tmp/\0x", "a" * 5000])
async def test_what_is_no_path_is_the_caller_s_mistake(http: httpx.AsyncClient, path: str) -> None:
    assert (await post(http, "load", "new", path)).status_code in (400, 403)


async def test_a_loop_of_links_is_the_caller_s_mistake(http: httpx.AsyncClient, tmp_path: Path) -> None:
    (tmp_path / "adapters" / "loop").symlink_to(tmp_path / "adapters" / "loop")
    assert (await post(http, "load", "new", tmp_path / "adapters" / "loop")).status_code in (400, 403)


async def test_a_name_that_no_file_can_have_is_a_model_that_is_not_there(http: httpx.AsyncClient) -> None:
    name = "aa" + "é" * 127
    asked = await http.post("/v1/completions", json={"model": name, "prompt": "x"})
    looked_up = await http.get(f"/v1/models/{name}")
    assert (asked.status_code, looked_up.status_code) == (404, 404)


async def test_the_models_are_listed_without_the_folder_of_adapters(http: httpx.AsyncClient, tmp_path: Path) -> None:
    (tmp_path / "adapters").rename(tmp_path / "gone")
    names = [model["id"] for model in (await http.get("/v1/models")).json()["data"]]
    assert "given" in names
    assert "mine" not in names


async def test_a_name_that_requests_cannot_give_is_refused(http: httpx.AsyncClient, tmp_path: Path) -> None:
    response = await post(http, "load", "a" + "é" * 199, tmp_path / "adapters" / "mine")
    assert response.status_code == 400
    assert "at most 200 bytes" in response.text


async def test_no_adapter_is_called_as_the_model_is(config: GatewayConfig, tmp_path: Path) -> None:
    gateway = Gateway(dataclasses.replace(config, adapter=(f"little={tmp_path / 'theirs'}",)))
    with pytest.raises(ModelError, match="'little' is what the model is called"):
        await gateway.start()
    await gateway.stop(0)


async def test_a_pickle_in_the_folder_is_named_as_one(http: httpx.AsyncClient, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapters" / "pickled")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    response = await http.post("/v1/completions", json={"model": "pickled", "prompt": "x"})
    assert "the adapter 'pickled' cannot be loaded: adapter_model.bin: is a pickle file" in response.text


@pytest.mark.parametrize("mistake", ["removed", "closed", "pipe"])
async def test_errors_say_nothing_of_where_the_operator_keeps_adapters(
    http: httpx.AsyncClient, tmp_path: Path, mistake: str
) -> None:
    weights = write(tmp_path / "adapters" / "bad") / "adapter_model.safetensors"
    weights.unlink()
    if mistake == "closed":
        weights.symlink_to(weights)  # a loop, which root cannot read, either
    elif mistake == "pipe":
        os.mkfifo(weights)
    asked = await http.post("/v1/completions", json={"model": "bad", "prompt": "x"})
    loaded = await post(http, "load", "new", tmp_path / "adapters" / "bad")
    for response in (asked, loaded):
        assert response.status_code == 400
        assert "adapter_model.safetensors: " in response.text
        assert str(tmp_path) not in response.text


async def test_files_are_read_once_for_all_who_wait_and_others_are_not_behind_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "large"), write(tmp_path / "small", seed=1)
    reads, may_end = list[str](), threading.Event()

    def slow(folder: Path) -> str:
        reads.append(folder.name)
        if folder.name == "large":
            assert may_end.wait(30)
        return sha256_of(folder)

    monkeypatch.setattr(module, "sha256_of", slow)
    adapters = Adapters(("model",), tmp_path, _NoNames())  # type: ignore[arg-type]
    waiting = [asyncio.ensure_future(adapters.find("large")) for _ in range(8)]
    await adapters.find("small")
    waiting.pop().cancel()  # costs the others nothing
    may_end.set()
    assert len({found.key for found in await asyncio.gather(*waiting)}) == 1
    assert sorted(reads) == ["large", "small"]


async def test_files_that_changed_while_they_were_read_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "one")

    def changed(folder: Path) -> str:
        sha256 = sha256_of(folder)
        write(folder, seed=2)
        monkeypatch.setattr(module, "sha256_of", sha256_of)
        return sha256

    monkeypatch.setattr(module, "sha256_of", changed)
    monkeypatch.setattr(module, "_LOOK_AGAIN_S", 0.0)
    adapters = Adapters(("model",), tmp_path, _NoNames())  # type: ignore[arg-type]
    before, after = await adapters.find("one"), await adapters.find("one")
    assert before.key != after.key
    assert after.key.endswith(sha256_of(tmp_path / "one"))


def test_the_hash_of_a_file_is_that_of_its_bytes_at_once_or_in_pieces(tmp_path: Path) -> None:
    large = {"model.layers.0.self_attn.q_proj": (700, 700)}  # several pieces
    folder = write_adapter(tmp_path, random_tensors(large, 256, 0), 256, note=list(map(int, np.arange(9))))
    config = (folder / "adapter_config.json").read_bytes()
    weights = (folder / "adapter_model.safetensors").read_bytes()
    expected = hashlib.sha256(len(config).to_bytes(8, "little") + config + weights).hexdigest()
    assert sha256_of(folder) == read_files(folder).sha256 == expected
    assert read_files(folder).weights == weights


class _NoNames:
    """Schedulers that know no names."""

    adapter_names: Any = {}  # noqa: RUF012
