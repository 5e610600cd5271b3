"""What a folder in the layout of sentence-transformers says is done before a scheduler sees anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grpc import aio

from octavo.inference.v1 import embedding_pb2, embedding_pb2_grpc

SETTINGS = {"prompts": {"query": "ask: ", "passage": "tell: "}, "default_prompt_name": "query"}


@pytest.fixture
def model_path(tmp_path: Path, tools: Any) -> Path:
    """A model that was trained for vectors of 2 and 4 dimensions, and reads 12 tokens in lower case."""
    folder: Path = tools.write_model(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["BertModel"], "matryoshka_dimensions": [2, 4]}
    files = {
        "config.json": config,
        "modules.json": [],
        "config_sentence_transformers.json": SETTINGS,
        "sentence_bert_config.json": {"max_seq_length": 12, "do_lower_case": True},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def texts_of(harness: Any, submit: Any) -> list[str]:
    """Return what a scheduler was asked for, as text."""
    ids, texts = list(submit.prompt_token_ids), []
    for length in submit.pooling.input_lengths:
        texts.append(harness.tokenizer.decode(ids[:length]))
        ids = ids[length:]
    return texts


def answer(harness: Any, handle: int, vectors: list[list[float]]) -> None:
    """Send a vector for each input."""
    values = np.array(vectors, "<f4")
    harness.scheduler.send(
        step_outputs={
            "vector_handles": [handle] * len(vectors),
            "vector_candidate_indexes": range(len(vectors)),
            "vector_sizes": [values.shape[1]] * len(vectors),
            "vectors": values.tobytes(),
        }
    )


def embed(harness: Any, *texts: str, **fields: Any) -> Any:
    inputs = [embedding_pb2.EmbedInput(text=text) for text in texts]
    stub = harness.service(embedding_pb2_grpc.EmbeddingServiceStub)
    return stub.Embed(embedding_pb2.EmbedRequest(model="tiny", inputs=inputs, **fields))


@pytest.mark.parametrize(("fields", "prompt"), [({}, "ask: "), ({"prompt_name": "passage"}, "tell: ")])
async def test_a_prompt_goes_before_each_text_in_lower_case(harness: Any, fields: dict[str, Any], prompt: str) -> None:
    call = embed(harness, "He", "b", dimensions=2, normalize=False, **fields)
    submit = await harness.scheduler.next_admitted()

    answer(harness, submit.handle, [[1, 2], [3, 4]])

    assert texts_of(harness, submit) == [f"{prompt}he", f"{prompt}b"]
    assert (submit.pooling.dimensions, submit.pooling.normalize) == (2, False)
    assert [list(np.frombuffer(each.values, "<f4")) for each in (await call).embeddings] == [[1, 2], [3, 4]]


async def test_a_long_text_is_cut_where_the_folder_says(harness: Any) -> None:
    call = embed(harness, "abcdefghijklmnop", "b")
    submit = await harness.scheduler.next_admitted()

    answer(harness, submit.handle, [[1], [2]])

    assert list(submit.pooling.input_lengths) == [12, 6]
    assert not submit.pooling.HasField("normalize")  # as the folder's modules say
    assert [(each.input_tokens, each.truncated) for each in (await call).embeddings] == [(12, True), (6, False)]


async def test_the_query_and_the_documents_of_a_ranking_have_their_prompts(harness: Any) -> None:
    stub = harness.service(embedding_pb2_grpc.EmbeddingServiceStub)
    call = stub.Rerank(embedding_pb2.RerankRequest(model="tiny", query="q", documents=["one", "two"]))
    submit = await harness.scheduler.next_admitted()

    answer(harness, submit.handle, [[1, 0], [0, 1], [1, 0]])

    assert texts_of(harness, submit) == ["ask: q", "tell: one", "tell: two"]
    assert submit.pooling.normalize
    assert [(each.index, each.relevance_score) for each in (await call).results] == [(1, 1.0), (0, 0.0)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dimensions": 3}, "dimensions: must be one of those that the model was trained for: 2, 4"),
        ({"prompt_name": "other"}, "prompt_name: is no prompt of the model; it has: passage, query"),
        ({"truncate": False}, "longer than the 12 tokens"),
    ],
)
async def test_what_the_folder_does_not_allow_is_refused(harness: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(aio.AioRpcError, match=message):
        await embed(harness, "abcdefghijklmnop", **fields)
