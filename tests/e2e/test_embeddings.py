"""Embeddings of the real MiniLM on a real deployment: over gRPC, over HTTP with OpenAI's client, and in trouble."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import numpy.typing as npt
import openai
import psutil
import pytest
import torch
from grpc import aio
from tokenizers import Tokenizer, models, pre_tokenizers

from octavo.inference.v1 import embedding_pb2, embedding_pb2_grpc, model_pb2, model_pb2_grpc
from octavo.services.client import OctavoError, SyncClient

from ..gpu_worker.tiny import make_checkpoint  # noqa: TID252 - tests are no package with a name
from .stack import Stack

MODEL = "all-minilm-l6-v2"
ROWS = [
    json.loads(line)
    for line in (Path(__file__).resolve().parent.parent / "data" / "reference_minilm.jsonl").read_text().splitlines()
]
TEXTS = [row["text"] for row in ROWS]
TRUE = np.array([row["embedding"] for row in ROWS], np.float32)
Vectors = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def embedder(minilm: Path) -> Iterator[Stack]:
    running = Stack(minilm, "--device", "cpu")
    yield running
    assert running.stop() == 0


@pytest.fixture
def sdk(embedder: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{embedder.http_url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def embed_request(texts: list[str], **fields: Any) -> embedding_pb2.EmbedRequest:
    inputs = [embedding_pb2.EmbedInput(text=text) for text in texts]
    return embedding_pb2.EmbedRequest(model=MODEL, inputs=inputs, **fields)


def vectors_of(response: embedding_pb2.EmbedResponse) -> Vectors:
    return np.stack([np.frombuffer(each.values, "<f4") for each in response.embeddings])


def stub(channel: aio.Channel) -> Any:
    return embedding_pb2_grpc.EmbeddingServiceStub(channel)  # type: ignore[no-untyped-call]


def worst_cosine(vectors: Vectors) -> float:
    products = (vectors.astype(np.float64) * TRUE).sum(1)
    return float((products / np.linalg.norm(vectors.astype(np.float64), axis=1) / np.linalg.norm(TRUE, axis=1)).min())


async def test_vectors_are_those_of_sentence_transformers(embedder: Stack) -> None:
    async with aio.insecure_channel(embedder.address) as channel:
        response = await stub(channel).Embed(embed_request(TEXTS))
        catalogue = model_pb2_grpc.ModelServiceStub(channel)  # type: ignore[no-untyped-call]
        (model,) = (await catalogue.ListModels(model_pb2.ListModelsRequest())).models

    assert worst_cosine(vectors_of(response)) >= 0.99999
    assert [each.input_tokens for each in response.embeddings] == [len(row["input_ids"]) for row in ROWS]
    assert response.usage.prompt_tokens == sum(len(row["input_ids"]) for row in ROWS)
    assert response.model_version == model.version
    assert list(model.features) == ["embed", "rerank", "score"]


async def test_a_text_has_the_same_bits_alone_as_tokens_and_among_many(embedder: Stack) -> None:
    async with aio.insecure_channel(embedder.address) as channel:
        alone = await stub(channel).Embed(embed_request(TEXTS[:1]))
        given = embedding_pb2.EmbedRequest(model=MODEL)
        given.inputs.add().token_ids.ids.extend(ROWS[0]["input_ids"])
        as_tokens = await stub(channel).Embed(given)
        many = await stub(channel).Embed(embed_request(TEXTS * 10))

    assert alone.embeddings[0].values == as_tokens.embeddings[0].values
    assert {each.values for each in many.embeddings[:: len(TEXTS)]} == {alone.embeddings[0].values}


def test_openai_clients_get_floats_base64_and_fewer_dimensions(sdk: openai.OpenAI) -> None:
    floats = sdk.embeddings.create(model=MODEL, input=TEXTS, encoding_format="float")
    by_default = sdk.embeddings.create(model=MODEL, input=TEXTS)  # the client asks for base64 then
    tokens = sdk.embeddings.create(model=MODEL, input=[row["input_ids"] for row in ROWS], dimensions=64)

    whole = np.array([each.embedding for each in floats.data], np.float32)
    assert worst_cosine(whole) >= 0.99999
    assert [each.index for each in floats.data] == list(range(len(TEXTS)))
    assert np.array([each.embedding for each in by_default.data], np.float32).tobytes() == whole.tobytes()
    assert floats.usage.prompt_tokens == floats.usage.total_tokens == sum(len(row["input_ids"]) for row in ROWS)
    cut = whole[:, :64] / np.linalg.norm(whole[:, :64], axis=1, keepdims=True)
    np.testing.assert_allclose([each.embedding for each in tokens.data], cut, atol=1e-6)


async def test_long_inputs_are_cut_where_the_model_was_trained_to_or_refused(embedder: Stack) -> None:
    long = "word " * 400
    async with aio.insecure_channel(embedder.address) as channel:
        cut = await stub(channel).Embed(embed_request([long, "short"]))
        with pytest.raises(aio.AioRpcError) as refused:
            await stub(channel).Embed(embed_request(["short", long], truncate=False))

    assert [(each.input_tokens, each.truncated) for each in cut.embeddings] == [(256, True), (3, False)]
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "inputs[1] is longer than the 256 tokens" in (refused.value.details() or "")


def test_rerank_orders_documents_by_the_cosine(embedder: Stack) -> None:
    order = np.argsort(-(TRUE[1:] @ TRUE[0]), kind="stable")
    body = {"model": MODEL, "query": TEXTS[0], "documents": TEXTS[1:], "top_n": 3, "return_documents": True}

    answer = httpx.post(f"{embedder.http_url}/v1/rerank", json=body, timeout=60).json()

    assert [each["index"] for each in answer["results"]] == order[:3].tolist()
    assert [each["document"]["text"] for each in answer["results"]] == [TEXTS[1 + index] for index in order[:3]]
    assert abs(answer["results"][0]["relevance_score"] - TRUE[1 + order[0]] @ TRUE[0]) < 1e-5


def test_what_an_embedding_model_cannot_do_is_said(embedder: Stack, sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="generates no text") as generating:
        sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hello"}])
    with pytest.raises(openai.BadRequestError, match="at most 384"):
        sdk.embeddings.create(model=MODEL, input="x", dimensions=385)
    with pytest.raises(openai.BadRequestError, match="input"):
        sdk.embeddings.create(model=MODEL, input=[])
    wrong: Any = ["a", 1]
    with pytest.raises(openai.BadRequestError, match="a text, a list of texts"):
        sdk.embeddings.create(model=MODEL, input=wrong)
    with pytest.raises(openai.NotFoundError):
        sdk.embeddings.create(model="other", input="x")

    assert generating.value.code == "feature_disabled"
    assert worst_cosine(np.array([each.embedding for each in sdk.embeddings.create(model=MODEL, input=TEXTS).data])) > 0


async def test_a_killed_worker_costs_no_vector_and_a_deadline_is_kept(embedder: Stack) -> None:
    (worker,) = embedder.children("worker")
    async with aio.insecure_channel(embedder.address) as channel:
        psutil.Process(worker).send_signal(signal.SIGSTOP)
        running = asyncio.ensure_future(stub(channel).Embed(embed_request(TEXTS * 8)))
        with pytest.raises(aio.AioRpcError) as late:
            await stub(channel).Embed(embed_request(TEXTS[:1]), timeout=0.3)
        psutil.Process(worker).kill()
        response = await running

    # Late, or refused at once where steps have been so slow that it could only be late.
    assert late.value.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert worst_cosine(vectors_of(response)[:16]) >= 0.99999
    assert len(response.embeddings) == 8 * 16


def test_octavo_s_client_embeds_and_ranks(embedder: Stack) -> None:
    """More texts than go into one call come back in order."""
    texts = TEXTS * 20
    with SyncClient(embedder.address) as client:
        found = client.embed(texts)
        assert len(found.vectors) == len(texts) > 256
        cosines = np.sum(np.stack([np.asarray(vector) for vector in found.vectors]) * np.tile(TRUE, (20, 1)), axis=1)
        assert cosines.min() >= 0.99999
        assert found.usage.prompt_tokens == 20 * client.embed(TEXTS).usage.prompt_tokens
        (short,) = client.embed(TEXTS[0], dimensions=8).vectors
        assert len(short) == 8
        ranked = client.rerank(TEXTS[3], TEXTS, top_n=2)
        assert ranked[0].index == 3
        assert len(ranked) == 2
        with pytest.raises(OctavoError) as failure:
            client.embed("x", dimensions=0)
        assert failure.value.code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
async def test_a_decoder_in_a_folder_of_sentence_transformers_makes_vectors(dtype: str, tmp_path: Path) -> None:
    """Whole and in float32, or in bfloat16 like any prompt: then an input is longer than a step."""
    model = make_checkpoint(tmp_path, "qwen3", dtype="bfloat16").float()
    names = ["<|end|>", "<|start|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    modules = [{"type": "Transformer", "path": ""}, {"type": "Pooling", "path": "1_Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    rows = [np.random.default_rng(length).integers(0, 258, length).tolist() for length in (1, 90, 250)]
    stack = Stack(tmp_path, "--device", "cpu", "--dtype", dtype, "--max-num-batched-tokens", "256")
    request = embedding_pb2.EmbedRequest(normalize=True)
    for row in [*rows, rows[0] * 300] if dtype == "bfloat16" else rows:
        request.inputs.add().token_ids.ids.extend(row)

    try:
        async with aio.insecure_channel(stack.address) as channel:
            catalogue = model_pb2_grpc.ModelServiceStub(channel)  # type: ignore[no-untyped-call]
            (served,) = (await catalogue.ListModels(model_pb2.ListModelsRequest())).models
            request.model = served.name
            vectors = vectors_of(await stub(channel).Embed(request))
    finally:
        assert stack.stop() == 0

    for row, vector in zip(request.inputs, vectors, strict=True):
        with torch.no_grad():
            state = model.model(torch.tensor([row.token_ids.ids])).last_hidden_state[0, -1]
        true = torch.nn.functional.normalize(state, dim=0).numpy()
        assert vector @ true > (0.99999 if dtype == "auto" else 0.999)
