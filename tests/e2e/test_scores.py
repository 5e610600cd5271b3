"""Scores and labels on real deployments: over gRPC, over HTTP in the shapes of vLLM and Cohere, and by the client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from octavo.services.client import OctavoError, SyncClient

from ..gpu_worker.tiny import make_checkpoint  # noqa: TID252 - tests are no package with a name
from .stack import Stack

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}do: {{ m.content }}|{% elif m.role == 'query' %}"
    "Q:{{ m.content }}|{% elif m.role == 'document' %}D:{{ m.content }}|{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>{% endif %}"
)
DOCUMENTS = ["a dog", "the kitten's mother", "x"]
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 130,
    "initializer_range": 0.3,
}


def save_tokenizer(folder: Path, *, is_pair: bool = False) -> Tokenizer:
    """Save a tokenizer of bytes; with is_pair it puts a token before a text and behind each of a pair."""
    names = ["<|end|>", "<|start|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.add_special_tokens(names[:2])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if is_pair:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|start|> $A <|end|>",
            pair="<|start|> $A <|end|> $B:1 <|end|>:1",
            special_tokens=[("<|end|>", 0), ("<|start|>", 1)],
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def post(stack: Stack, path: str, **body: Any) -> Any:
    response = httpx.post(f"{stack.http_url}{path}", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


class Reranker:
    """A causal decoder whose score is made of the logits of two words, served, and as transformers has it."""

    def __init__(self, folder: Path, device: str) -> None:
        self.model = make_checkpoint(folder, "qwen3", dtype="float32")
        self.tokenizer = save_tokenizer(folder)
        kinds = ("base.modules.transformer.Transformer", "cross_encoder.modules.logit_score.LogitScore")
        rows = [{"path": path, "type": kind} for path, kind in zip(("", "1_LogitScore"), kinds, strict=True)]
        (folder / "1_LogitScore").mkdir()
        files = {
            "modules.json": rows,
            "1_LogitScore/config.json": {"true_token_id": 41, "false_token_id": 9},
            "config_sentence_transformers.json": {"prompts": {"web": "find"}, "default_prompt_name": "web"},
            "tokenizer_config.json": {"chat_template": TEMPLATE},
        }
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
        self.stack = Stack(folder, "--device", device)

    def true_score(self, query: str, document: str) -> float:
        """Return sigmoid(logit of the one word - that of the other) behind the template."""
        text = f"do: find|Q:{query}|D:{document}|<|start|>"
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        with torch.no_grad():
            logits = self.model(torch.tensor([ids])).logits[0, -1]
        return float(torch.sigmoid(logits[41] - logits[9]))


@pytest.fixture(scope="module", params=["cpu", "reference"])
def reranker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reranker]:
    """In float32: whole on the cpu device, with a cache that has the query on the other one."""
    running = Reranker(tmp_path_factory.mktemp("reranker"), request.param)
    yield running
    assert running.stack.stop() == 0


def test_a_decoder_scores_pairs_in_its_template_by_the_logits_of_two_words(reranker: Reranker) -> None:
    name = post_name(reranker.stack)
    true = [reranker.true_score("a cat", document) for document in DOCUMENTS]

    answer = post(reranker.stack, "/score", model=name, text_1="a cat", text_2=DOCUMENTS)
    with SyncClient(reranker.stack.address) as client:
        scores = client.score("a cat", DOCUMENTS)
        each = client.score(DOCUMENTS, DOCUMENTS)

    assert (answer["object"], answer["model"]) == ("list", name)
    assert [(row["index"], row["object"]) for row in answer["data"]] == [(0, "score"), (1, "score"), (2, "score")]
    assert [row["score"] for row in answer["data"]] == pytest.approx(true, abs=1e-4)
    assert scores == pytest.approx(true, abs=1e-4)
    assert each == pytest.approx([reranker.true_score(text, text) for text in DOCUMENTS], abs=1e-4)


def test_pairs_that_begin_alike_have_their_own_scores(reranker: Reranker) -> None:
    """Also where the query comes from the cache, and once more when all of a pair is there."""
    query = "which of them is the one that follows the other to the house? " * 2
    documents = [*DOCUMENTS, DOCUMENTS[1] * 4]
    true = [reranker.true_score(query, document) for document in documents]

    with SyncClient(reranker.stack.address) as client:
        first, again = client.score(query, documents), client.score(query, documents)

    assert first == pytest.approx(true, abs=1e-4)
    assert again == first


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_a_ranking_has_the_order_of_the_scores(path: str, reranker: Reranker) -> None:
    true = [reranker.true_score("a cat", document) for document in DOCUMENTS]

    answer = post(reranker.stack, path, model=post_name(reranker.stack), query="a cat", documents=DOCUMENTS, top_n=2)

    best = sorted(range(3), key=lambda index: -true[index])[:2]
    assert [row["index"] for row in answer["results"]] == best
    assert [row["relevance_score"] for row in answer["results"]] == pytest.approx([true[i] for i in best], abs=1e-4)


def test_wrong_pairs_are_refused_with_what_to_change(reranker: Reranker) -> None:
    name = post_name(reranker.stack)
    for path, body, message in (
        ("/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "must be one, or as many as documents"),
        ("/score", {"text_1": "a", "queries": "a", "text_2": ["c"]}, "is another name of text_1"),
        ("/score", {"text_1": "a"}, "documents"),
        ("/score", {"text_1": 1, "text_2": "a"}, "must be a text or a list of texts"),
        ("/v1/embeddings", {"input": "a"}, "'embed' needs a model for embeddings"),
        ("/classify", {"input": ["a"], "text_pair": ["b", "c"]}, "must be as many texts as input, 1"),
        ("/classify", {"input": [[5]], "text_pair": ["b"]}, "give the first as text"),
    ):
        response = httpx.post(f"{reranker.stack.http_url}{path}", json={"model": name, **body}, timeout=60)
        assert response.status_code == 400, response.text
        assert message in response.text


def post_name(stack: Stack) -> str:
    """Return the served model's name."""
    return str(httpx.get(f"{stack.http_url}/v1/models", timeout=60).json()["data"][0]["id"])


def test_a_classifier_of_several_labels_gives_their_probabilities(tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = {0: "contradiction", 1: "entailment", 2: "neutral"}
    config = transformers.BertConfig(**SIZES, id2label=names)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = save_tokenizer(tmp_path, is_pair=True)
    pairs = [("a man eats", "a man sleeps"), ("it rains", "it is wet")]
    true = []
    for pair in pairs:
        encoding = tokenizer.encode(*pair)
        with torch.no_grad():
            given = {"token_type_ids": torch.tensor([encoding.type_ids])}
            true.append(torch.softmax(model(torch.tensor([encoding.ids]), **given).logits[0], -1).tolist())
    stack = Stack(tmp_path, "--device", "reference")

    try:
        name = post_name(stack)
        first, second = zip(*pairs, strict=True)
        answer = post(stack, "/classify", model=name, input=first, text_pair=second)
        alone = post(stack, "/v1/classify", model=name, input="it rains")
        with SyncClient(stack.address) as client:
            labels = client.classify(pairs)
            with pytest.raises(OctavoError, match="'score' needs a model for embeddings or that scores pairs"):
                client.score("a", ["b"])
    finally:
        assert stack.stop() == 0

    best = [names[max(range(3), key=row.__getitem__)] for row in true]
    assert [row["label"] for row in answer["data"]] == [each.label for each in labels] == best
    for row, each, probabilities in zip(answer["data"], labels, true, strict=True):
        assert row["num_classes"] == 3
        assert row["probs"] == pytest.approx(probabilities, abs=1e-5)
        assert list(each.probabilities) == list(names.values())
        assert list(each.probabilities.values()) == pytest.approx(probabilities, abs=1e-5)
    assert len(alone["data"]) == 1
    assert alone["usage"]["prompt_tokens"] == len(tokenizer.encode("it rains").ids)
