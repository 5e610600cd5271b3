"""What breaks the limits of lists is refused before it becomes objects."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2, tokenizer_pb2
from octavo.services.common import wire_scan
from octavo.services.common.errors import Reason, ServingError
from octavo.services.common.wire_scan import MAX_FIELDS, Scan, WireScanner

REQUEST = WireScanner(generation_pb2.GenerateRequest.DESCRIPTOR)


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def chat(messages: bytes) -> bytes:
    return field(1, field(5, messages))


def refusal(data: bytes, scanner: WireScanner = REQUEST) -> ServingError:
    with pytest.raises(ServingError) as caught:
        scanner.scan(data)
    return caught.value


def test_a_list_that_is_too_long_is_refused_by_name() -> None:
    error = refusal(chat(field(1, b"") * 4097))

    assert error.reason == Reason.INVALID_FIELD
    assert error.violations[0].field == "generation.chat.messages"
    assert "at most 4096" in error.violations[0].description
    assert REQUEST.scan(chat(field(1, b"") * 4096)).num_fields == 4096 + 2


def test_messages_in_messages_count_together() -> None:
    message = field(1, field(2, b"") * 256)  # each within its limit

    error = refusal(chat(message * 4096))

    assert error.reason == Reason.INVALID_FIELD
    assert str(MAX_FIELDS) in error.message


def test_a_message_that_comes_in_pieces_counts_as_one_would() -> None:
    pieces = (field(1, b"") * 1000 for _ in range(100))  # the same chat again and again: a parser merges them

    assert refusal(field(1, b"".join(field(5, piece) for piece in pieces))).reason == Reason.INVALID_FIELD


@pytest.mark.parametrize("packed", [True, False])
def test_numbers_count_in_both_forms(packed: bool) -> None:
    def stop_ids(count: int) -> bytes:
        ids = [varint(70_000)] * count
        return field(4, b"".join(ids)) if packed else b"".join(varint(4 << 3) + each for each in ids)

    scanner = WireScanner(common_pb2.StopCriteria.DESCRIPTOR)
    assert common_pb2.StopCriteria.FromString(stop_ids(128)).stop_token_ids == [70_000] * 128

    scanner.scan(stop_ids(128))
    assert refusal(stop_ids(129), scanner).violations[0].field == "stop_token_ids"


def test_a_map_is_a_list_of_entries() -> None:
    scanner = WireScanner(common_pb2.SamplingParams.DESCRIPTOR)
    params = common_pb2.SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0))

    assert refusal(params.SerializeToString(), scanner).violations[0].field == "logit_bias"


def test_a_long_prompt_is_what_it_was() -> None:
    ids = generation_pb2.GenerateRequest(generation={"token_ids": {"ids": range(131_072)}}).SerializeToString()
    text = generation_pb2.GenerateRequest(generation={"text": "x" * (1 << 20)}).SerializeToString()

    assert REQUEST.scan(ids).num_items == 131_072
    assert REQUEST.scan(text).num_fields == 2


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a",  # no length
        b"\x0a\xff\xff\xff\xff\x7f" + bytes(300),  # longer than there is
        b"\x0b" + bytes(300),  # a group
        b"\xff" * 300,  # a tag without an end
        field(1, b"\x2a\x05" + b"\x0a") + bytes(300),  # an inner message that goes beyond its outer one
    ],
)
def test_what_is_no_message_is_malformed(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_scan, "SMALL_BYTES", 0)

    assert refusal(data).reason == Reason.MALFORMED_REQUEST


def test_depth_has_a_limit() -> None:
    request = b""
    for _ in range(200):
        request = field(1, request)
    table: dict[int, Any] = {}
    table[1 << 3 | 2] = wire_scan._Field("again", table, None, -1)

    with pytest.raises(wire_scan._MalformedError):
        wire_scan._scan(Scan(0), request, 0, len(request), table, 0)


PIECES = st.sampled_from(
    [
        field(3, b"x"),
        field(3, b""),
        field(4, varint(300) * 40),
        varint(4 << 3) + varint(300),
        field(4, b"\x01" * 20),
        varint(1 << 3) + b"\x05",
        varint(99 << 3 | 2) + b"\x02ab",
        b"\x9a\x80\x00\x01x",  # a longer form of a tag
    ]
)


@given(st.lists(PIECES, max_size=40).map(b"".join), st.binary(max_size=4), st.integers(0, 400))
def test_whatever_passes_keeps_the_limits_when_it_is_parsed(data: bytes, noise: bytes, where: int) -> None:
    data = data[:where] + noise + data[where:]
    found = Scan(len(data))
    try:
        wire_scan._scan(found, data, 0, len(data), WireScanner(common_pb2.StopCriteria.DESCRIPTOR)._table, 0)
    except (ServingError, IndexError, wire_scan._MalformedError, wire_scan._TooManyItemsError):
        return
    try:
        parsed = common_pb2.StopCriteria.FromString(data)
    except (DecodeError, ValueError):
        return
    assert len(parsed.stop_sequences) <= 16
    assert len(parsed.stop_token_ids) <= 128
    assert len(parsed.stop_sequences) + len(parsed.stop_token_ids) <= found.num_fields + found.num_items


def test_every_valid_request_passes() -> None:
    tokenize = tokenizer_pb2.TokenizeRequest(model="m", texts=["word"] * 1024)

    WireScanner(tokenizer_pb2.TokenizeRequest.DESCRIPTOR).scan(tokenize.SerializeToString())
