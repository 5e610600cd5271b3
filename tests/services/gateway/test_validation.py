"""The rules beside the fields."""

from __future__ import annotations

import math
from typing import Any

import pytest

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import embedding_pb2, generation_pb2, load_pb2, tokenizer_pb2
from octavo.services.gateway.validation import RequestValidator

VALIDATOR = RequestValidator()


def fields_of(message: Any) -> list[str]:
    return [violation.field for violation in VALIDATOR.violations(message)]


def generation(**fields: Any) -> generation_pb2.GenerateRequest:
    fields = {"model": "m", "text": "x", **fields}
    return generation_pb2.GenerateRequest(generation=generation_pb2.Generation(**fields))


def test_a_plain_request_is_valid() -> None:
    assert fields_of(generation(sampling={"temperature": 0, "top_p": 1, "seed": 2**64 - 1})) == []


def test_a_missing_message_string_and_one_of_are_named() -> None:
    assert fields_of(generation_pb2.GenerateRequest()) == ["generation"]
    assert fields_of(generation_pb2.GenerateRequest(generation={})) == ["generation.model", "generation.prompt"]
    assert fields_of(generation(text=None, chat={})) == ["generation.chat.messages"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 101),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0),
        ("top_p", 1.5),
        ("min_p", -1),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -math.inf),
        ("repetition_penalty", 0),
        ("top_k", 1048577),
    ],
)
def test_a_number_out_of_range_or_not_finite_is_named_with_its_path(field: str, value: float) -> None:
    (violation,) = VALIDATOR.violations(generation(sampling={field: value}))

    assert violation.field == f"generation.sampling.{field}"
    assert "must be a" in violation.description


def test_a_number_just_beyond_a_limit_is_not_shown_as_the_limit() -> None:
    (near,) = VALIDATOR.violations(generation(sampling={"typical_p": 1.0000001}))
    (far,) = VALIDATOR.violations(generation(sampling={"typical_p": 1.1}))

    assert near.description.endswith("it is 1.00000012")
    assert far.description.endswith("it is 1.1")


@pytest.mark.parametrize("priority", [-101, -100, 100, 101])
def test_a_priority_has_the_same_limits_in_every_service(priority: int) -> None:
    requests: list[Any] = [
        generation(scheduling={"priority": priority}),
        embedding_pb2.EmbedRequest(model="m", inputs=[{"text": "x"}], priority=priority),
        embedding_pb2.RerankRequest(model="m", query="q", documents=["x"], priority=priority),
    ]
    refused = [[field.endswith("priority") for field in fields_of(request)] for request in requests]
    assert refused == [[True] if abs(priority) > 100 else []] * 3


def test_zero_is_checked_where_it_was_set_and_is_no_value_where_presence_is_unknown() -> None:
    assert fields_of(generation(stop={"max_new_tokens": 0})) == ["generation.stop.max_new_tokens"]
    assert fields_of(generation(candidate_count=0)) == []
    assert fields_of(generation(candidate_count=17)) == ["generation.candidate_count"]
    assert fields_of(generation(output={"progress_interval_ms": 0})) == []
    assert fields_of(generation(output={"progress_interval_ms": 49})) == ["generation.output.progress_interval_ms"]


def test_lengths_count_bytes_and_items_are_named_by_index() -> None:
    assert fields_of(generation(model="ü" * 129)) == ["generation.model"]
    assert fields_of(generation(model="ü" * 128)) == []
    assert fields_of(generation(stop={"stop_sequences": ["ok", "", "x" * 257]})) == [
        "generation.stop.stop_sequences[1]",
        "generation.stop.stop_sequences[2]",
    ]
    assert fields_of(generation(stop={"stop_sequences": ["x"] * 17})) == ["generation.stop.stop_sequences"]


def test_map_values_are_checked_and_named_by_key() -> None:
    bias = {5: 1.0, 7: -101.0, 9: math.nan}
    assert sorted(fields_of(generation(sampling={"logit_bias": bias}))) == [
        "generation.sampling.logit_bias[7]",
        "generation.sampling.logit_bias[9]",
    ]
    too_many = dict.fromkeys(range(1025), 1.0)
    assert fields_of(generation(sampling={"logit_bias": too_many})) == ["generation.sampling.logit_bias"]


def test_nested_messages_are_checked_in_place() -> None:
    chat = {"messages": [{"role": "user", "parts": [{"text": "x"}, {}]}, {"role": "", "parts": []}]}

    assert fields_of(generation(text=None, chat=chat)) == [
        "generation.chat.messages[0].parts[1].content",
        "generation.chat.messages[1].role",
    ]


def test_a_long_list_is_refused_as_a_whole() -> None:
    ids = common_pb2.TokenIds(ids=[1] * 1048577)

    assert fields_of(generation(text=None, token_ids=ids)) == ["generation.token_ids.ids"]


def test_all_violations_are_reported_up_to_sixteen() -> None:
    sampling = {"temperature": -1, "top_p": 2, "min_p": 2}
    assert len(fields_of(generation(sampling=sampling, candidate_count=99))) == 4
    assert len(fields_of(generation(stop={"stop_sequences": [""] * 16, "max_new_tokens": 0}))) == 16


def test_every_request_type_can_be_validated() -> None:
    assert fields_of(tokenizer_pb2.TokenizeRequest()) == ["model"]
    assert fields_of(load_pb2.WatchLoadRequest(interval_ms=3600001)) == ["interval_ms"]
    assert fields_of(load_pb2.GetLoadRequest()) == []
