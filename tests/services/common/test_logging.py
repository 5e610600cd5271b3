"""Lines that a process writes."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from octavo.services.common import logging as logs
from octavo.services.common.logging import ACCESS, RepeatFilter, current_request_id


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_that_is_written_within_a_call_has_its_request_id(stream: io.StringIO) -> None:
    logs.setup("info", "gateway", fmt="json", stream=stream)
    log = logging.getLogger("octavo.test")
    log.info("before %d", 1)
    token = current_request_id.set("req-1")
    log.warning("within")
    current_request_id.reset(token)

    first, second = lines(stream)
    assert (first["message"], first["level"], first["process"]) == ("before 1", "info", "gateway")
    assert "request_id" not in first
    assert second["request_id"] == "req-1"


def test_fields_are_members_of_a_json_line_and_words_of_a_text_line(stream: io.StringIO) -> None:
    for fmt in ("json", "text"):
        logs.setup("info", "gateway", fmt=fmt, stream=stream)  # type: ignore[arg-type]
        logging.getLogger(ACCESS).info("call ended", extra={"fields": {"code": "OK", "output_tokens": 3}})

    as_json, as_text = stream.getvalue().splitlines()
    assert json.loads(as_json)["output_tokens"] == 3
    assert as_text.endswith("call ended code=OK output_tokens=3")


def test_a_flood_of_one_message_is_cut_and_counted_and_accounts_never_are(stream: io.StringIO) -> None:
    logs.setup("info", "gateway", fmt="json", stream=stream)
    now = [0.0]
    (handler,) = logging.getLogger().handlers
    handler.filters[:] = [RepeatFilter(lambda: now[0])]
    log, access = logging.getLogger("octavo.test"), logging.getLogger(ACCESS)
    for number in range(200):
        log.warning("wrong call %d", number)
        access.info("call ended")
    log.warning("another message")
    now[0] = 11.0
    log.warning("wrong call %d", 200)

    said = [line["message"] for line in lines(stream)]
    wrong = [message for message in said if message.startswith("wrong call")]
    assert wrong[:-1] == [f"wrong call {number}" for number in range(50)]
    assert wrong[-1] == "wrong call 200 (and 150 more like this)"
    assert said.count("call ended") == 200
    assert "another message" in said


def test_a_clients_words_cannot_write_a_line_or_move_a_terminals_cursor(stream: io.StringIO) -> None:
    logs.setup("info", "gateway", fmt="text", stream=stream)
    forged = "x\n12:00:00.000 error: forged \x1b]0;owned\x07\x1b[2J\r\x9b\u2028\u202e é"

    logging.getLogger(ACCESS).info("call ended", extra={"fields": {"model": forged}})
    try:
        raise ValueError(forged)
    except ValueError:
        logging.getLogger("octavo.test").exception("no model %s", forged)

    written = stream.getvalue()
    assert not set(written) & set("\x1b\x07\r\x9b\u2028\u202e")
    first, second = written.splitlines()[:2]
    assert first.endswith(r"model=x\x0a12:00:00.000 error: forged \x1b]0;owned\x07\x1b[2J\x0d\x9b\u2028\u202e é")
    assert second.startswith(written[:6])
    assert "error: no model x" in second
