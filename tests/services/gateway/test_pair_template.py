"""Pairs of texts in a model's chat template, as rerankers that are causal decoders read them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from octavo.common.v1 import common_pb2
from octavo.services.gateway.tokenization.model_files import ModelError
from octavo.services.gateway.tokenization.tokenizer import ModelTokenizer

LIMIT = 24
QUERY_FIRST = "{% for m in messages %}{{ {'query': 'q', 'document': 'd'}[m.role] }}:{{ m.content }}|{% endfor %}<|end|>"
DOCUMENT_FIRST = (
    "{{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}/"
    "{{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}"
)


def write_reranker(tools: Any, folder: Path, template: str | None) -> Path:
    path: Path = tools.write_model(folder, template=template)
    modules = [{"type": "sentence_transformers.base.Transformer"}, {"type": "a.b.LogitScore", "path": "1_LogitScore"}]
    (path / "modules.json").write_text(json.dumps(modules))
    return path


@pytest.fixture
async def started() -> AsyncIterator[Any]:
    """A function that reads a folder and starts its tokenizer, which is stopped at the end."""
    running: list[ModelTokenizer] = []

    async def start(path: Path) -> ModelTokenizer:
        running.append(ModelTokenizer.load(path))
        await running[-1].start()
        return running[-1]

    yield start
    for tokenizer in running:
        await tokenizer.stop()


async def test_a_pair_is_written_as_the_template_has_it_and_nothing_is_added(
    tools: Any, tmp_path: Path, started: Any
) -> None:
    tokenizer = await started(write_reranker(tools, tmp_path, QUERY_FIRST))

    (pair, other) = tokenizer.encode_inputs([("he", "w w"), ("", "x")], LIMIT)

    assert tokenizer.decode(pair.token_ids, skip_special_tokens=False) == "q:he|d:w w|<|end|>"
    assert list(pair.token_ids) == tokenizer.encode_anew("q:he|d:w w|<|end|>", False)
    assert tokenizer.decode(other.token_ids, skip_special_tokens=False) == "q:|d:x|<|end|>"
    assert tokenizer.vector_files.task == common_pb2.MODEL_TASK_SCORE
    assert not pair.is_truncated


@pytest.mark.parametrize(("query", "document"), [("he", "x" * 100), ("x" * 100, "he"), ("x" * 3000, "y" * 3000)])
async def test_what_is_cut_is_never_the_end_of_the_template(
    query: str, document: str, tools: Any, tmp_path: Path, started: Any
) -> None:
    tokenizer = await started(write_reranker(tools, tmp_path, QUERY_FIRST))

    (short, pair) = tokenizer.encode_inputs([("a", "b"), (query, document)], LIMIT)

    whole = tokenizer.encode_anew(f"q:{query}|d:{document}|<|end|>", False)
    end = tokenizer.encode_anew("|<|end|>", False)
    assert list(pair.token_ids) == whole[: LIMIT - len(end)] + end
    assert (short.is_truncated, pair.is_truncated) == (False, True)


async def test_the_document_may_come_first_and_texts_may_stand_beside_pairs(
    tools: Any, tmp_path: Path, started: Any
) -> None:
    tokenizer = await started(write_reranker(tools, tmp_path, DOCUMENT_FIRST))

    inputs = tokenizer.encode_inputs(["one", ("query", "text"), "two", ("q", "d")], LIMIT)

    assert [tokenizer.decode(each.token_ids, False) for each in inputs] == ["one", "text/query", "two", "d/q"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "needs a chat template"),
        ("{{ messages[0].content }}", 'no roles "query" and "document"'),
        ("{{ messages[0].content }}{# #}{{ 'query' }}{{ 'document' }}", "does not write the query and the document"),
        (QUERY_FIRST + QUERY_FIRST, "does not write the query and the document once each"),
        ("{{ 'query' ~ 'document' }}{{ raise_exception('no') }}", "chat template"),
        ("{{ 'query' ~ 'document' }}{% for i in range(10 ** 12) %}{% endfor %}", "chat template"),
    ],
)
async def test_a_template_that_cannot_write_pairs_is_refused_at_the_start(
    template: str | None, message: str, tools: Any, tmp_path: Path, started: Any
) -> None:
    path = write_reranker(tools, tmp_path, template)

    with pytest.raises(ModelError, match=message):
        await started(path)


@pytest.mark.parametrize(
    ("config", "task", "labels"),
    [
        ({"id2label": {"0": "no", "1": "yes"}}, common_pb2.MODEL_TASK_CLASSIFY, ("no", "yes")),
        ({"id2label": {"0": "score"}}, common_pb2.MODEL_TASK_SCORE, ("score",)),
        ({"num_labels": 3, "id2label": {"1": "yes"}}, common_pb2.MODEL_TASK_CLASSIFY, ("LABEL_0", "yes", "LABEL_2")),
        ({}, common_pb2.MODEL_TASK_CLASSIFY, ("LABEL_0", "LABEL_1")),
        ({"num_labels": 1 << 40}, common_pb2.MODEL_TASK_CLASSIFY, ()),
    ],
)
def test_a_classifier_s_labels_have_the_names_of_its_config(
    config: dict[str, Any], task: int, labels: tuple[str, ...], tools: Any, tmp_path: Path
) -> None:
    path = tools.write_model(tmp_path)
    settings = json.loads((path / "config.json").read_text())
    settings |= {"architectures": ["BertForSequenceClassification"], **config}
    (path / "config.json").write_text(json.dumps(settings))

    files = ModelTokenizer.load(path).vector_files

    assert files is not None
    assert (files.task, files.labels) == (task, labels)
