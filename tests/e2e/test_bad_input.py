"""Wrong requests get the documented code with details, and the next request works."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2
from octavo.services.client import Client

from .stack import Stack, answer

METHOD = "/octavo.inference.v1.GenerationService/Generate"
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[Client]:
    async with stack.client() as client:
        yield client


async def call(stack: Stack, body: bytes) -> tuple[grpc.StatusCode, str, list[str]]:
    """Send raw bytes to Generate; return code, reason and the fields that were found wrong."""
    async with grpc.aio.insecure_channel(stack.address) as channel:
        method = channel.unary_unary(METHOD)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(body)
    trailers = dict(caught.value.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])  # type: ignore[arg-type]
    assert len(status.SerializeToString()) < 4096
    reason, fields = "", []
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo.FromString(detail.value)
            assert info.domain == "octavo"
            reason = info.reason
        if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            violations = error_details_pb2.BadRequest.FromString(detail.value).field_violations
            fields += [violation.field for violation in violations]
            assert all(violation.description for violation in violations)
    return caught.value.code(), reason, fields


def request(**fields: Any) -> bytes:
    generation = generation_pb2.Generation(**{"model": "smollm2-135m-instruct", "text": "Hello", **fields})
    return generation_pb2.GenerateRequest(generation=generation).SerializeToString()


def sampling(**fields: Any) -> bytes:
    return request(sampling=common_pb2.SamplingParams(**fields))


def chat(role: str) -> bytes:
    message = generation_pb2.Message(role=role, parts=[generation_pb2.Part(text="hi")])
    return request(text=None, chat=generation_pb2.Chat(messages=[message]))


def ids(*values: int) -> bytes:
    return request(text=None, token_ids=common_pb2.TokenIds(ids=values))


CASES = {
    "wrong model": (request(model="gpt-99"), grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", ""),
    "no model": (request(model=""), INVALID, "INVALID_FIELD", "generation.model"),
    "no generation": (b"", INVALID, "INVALID_FIELD", "generation"),
    "no prompt": (request(text=None), INVALID, "INVALID_FIELD", "generation.prompt"),
    "empty prompt": (ids(), INVALID, "INVALID_FIELD", "generation"),
    "too long": (ids(*[5] * 9000), INVALID, "CONTEXT_LENGTH_EXCEEDED", ""),
    "unknown token ids": (ids(1, 2, 49152), INVALID, "INVALID_FIELD", "generation.token_ids"),
    "negative temperature": (sampling(temperature=-0.5), INVALID, "INVALID_FIELD", "generation.sampling.temperature"),
    "NaN temperature": (sampling(temperature=math.nan), INVALID, "INVALID_FIELD", "generation.sampling.temperature"),
    "infinite top_p": (sampling(top_p=math.inf), INVALID, "INVALID_FIELD", "generation.sampling.top_p"),
    "zero top_p": (sampling(top_p=0.0), INVALID, "INVALID_FIELD", "generation.sampling.top_p"),
    "NaN bias": (sampling(logit_bias={3: math.nan}), INVALID, "INVALID_FIELD", "generation.sampling.logit_bias"),
    "bias of an unknown token": (sampling(logit_bias={1 << 30: 1.0}), INVALID, "INVALID_FIELD", "generation.sampling"),
    "2^31 tokens": (
        request(stop=common_pb2.StopCriteria(max_new_tokens=1 << 31)),
        INVALID,
        "INVALID_FIELD",
        "generation.stop.max_new_tokens",
    ),
    "no tokens": (
        request(stop=common_pb2.StopCriteria(max_new_tokens=0)),
        INVALID,
        "INVALID_FIELD",
        "generation.stop.max_new_tokens",
    ),
    "too many stop strings": (
        request(stop=common_pb2.StopCriteria(stop_sequences=["x"] * 17)),
        INVALID,
        "INVALID_FIELD",
        "generation.stop.stop_sequences",
    ),
    "too many candidates": (request(candidate_count=1000), INVALID, "INVALID_FIELD", "generation.candidate_count"),
    "malformed bytes": (b"\xff\xff\xff\xff\xff", INVALID, "MALFORMED_REQUEST", ""),
    "truncated bytes": (request()[:-3], INVALID, "MALFORMED_REQUEST", ""),
    "broken UTF-8": (request().replace(b"Hello", b"\xc3\x28\xa0\xa1\xff"), INVALID, "MALFORMED_REQUEST", ""),
    "unknown chat role": (chat("wizard"), INVALID, "INVALID_FIELD", "generation.chat.messages"),
    "unknown adapter": (request(adapter="lora"), grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND", ""),
    "a schema that is no schema": (
        request(constraint=common_pb2.OutputConstraint(json_schema='{"type": "strin"}')),
        INVALID,
        "INVALID_CONSTRAINT",
        "generation.constraint.json_schema",
    ),
    "a regular expression that explodes": (
        request(constraint=common_pb2.OutputConstraint(regex="(((a{1,100}){1,100}){1,100}){1,100}")),
        INVALID,
        "INVALID_CONSTRAINT",
        "generation.constraint.regex",
    ),
}


@pytest.mark.parametrize("name", CASES)
async def test_a_wrong_request_gets_its_code_and_the_next_one_works(stack: Stack, client: Client, name: str) -> None:
    body, code, reason, field = CASES[name]
    assert (await call(stack, body))[:2] == (code, reason)
    fields = (await call(stack, body))[2]
    assert not field or any(found.startswith(field) for found in fields), fields
    good = await answer(client, "One, two, three,", max_new_tokens=4, temperature=0)
    assert len(good.ids) == 4


async def test_all_wrong_fields_are_reported_at_once(stack: Stack) -> None:
    body = sampling(temperature=-1.0, top_p=2.0, min_p=3.0, presence_penalty=9.0)
    _, _, fields = await call(stack, body)
    assert {field.rsplit(".", 1)[1] for field in fields} == {"temperature", "top_p", "min_p", "presence_penalty"}
