"""Reads a file of requests: OpenAI's batch format, or plain prompts, one JSON value a line."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

MAX_LINE_BYTES = 16 << 20
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")

# What a line without a `url` asks for, by the field that it has.
_ENDPOINT_BY_FIELD = {"messages": "/v1/chat/completions", "prompt": "/v1/completions", "input": "/v1/embeddings"}


@dataclass(frozen=True)
class Line:
    """One request. A line that cannot be read has a `fault`, for people, and no body.

    index       counts the file's lines from 0; empty lines count, and are no requests
    custom_id   the client's name for the request; `line-N`, N from 1, if it has none
    end_offset  where the next line begins in the file, in bytes
    checksum    of what is asked for: the line's bytes, and the defaults; 0 if nobody made one
    """

    index: int
    custom_id: str
    url: str
    body: dict[str, Any]
    end_offset: int
    fault: str = ""
    checksum: int = 0


def read_lines(path: Path, defaults: Mapping[str, Any], only_endpoint: str = "") -> Iterator[Line]:
    """Yield the requests of a file. Raises OSError.

    defaults       fields for bodies that do not have them
    only_endpoint  the url that every line must have; any if empty
    """
    seed = zlib.crc32(json.dumps(dict(defaults), sort_keys=True).encode())
    with path.open("rb", buffering=1 << 20) as file:
        offset = 0
        index = 0
        while data := file.readline(MAX_LINE_BYTES + 1):
            offset += len(data)
            too_long = len(data) > MAX_LINE_BYTES
            if too_long and not data.endswith(b"\n"):
                offset += _skip_rest(file)
            if data.strip():
                line = _parse(index, data, too_long, offset, defaults, only_endpoint)
                yield replace(line, checksum=zlib.crc32(data.strip(), seed))
            index += 1


def _skip_rest(file: BinaryIO) -> int:
    skipped = 0
    while data := file.readline(MAX_LINE_BYTES):
        skipped += len(data)
        if data.endswith(b"\n"):
            break
    return skipped


def _parse(
    index: int, data: bytes, too_long: bool, offset: int, defaults: Mapping[str, Any], only_endpoint: str
) -> Line:
    custom_id = f"line-{index + 1}"
    try:
        if too_long:
            raise ValueError(f"is longer than {MAX_LINE_BYTES} bytes")
        value = json.loads(data)
        if isinstance(value, dict) and isinstance(value.get("custom_id"), str):
            custom_id = value["custom_id"]
        url, body = _request(value)
        if url not in ENDPOINTS or only_endpoint not in ("", url):
            raise ValueError(f"has the url {url!r}, not {only_endpoint or ' or '.join(ENDPOINTS)}")
        if body.get("stream"):
            raise ValueError("asks for a stream: leave `stream` out, a result is one line")
    except (ValueError, RecursionError) as error:
        fault = f"is no JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)
        return Line(index, custom_id, "", {}, offset, f"line {index + 1} {fault}")
    return Line(index, custom_id, url, {**defaults, **body}, offset)


def _request(value: Any) -> tuple[str, dict[str, Any]]:
    """Return url and body of a line's value. Raises ValueError."""
    if isinstance(value, str):
        return "/v1/completions", {"prompt": value}
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object or a string")
    if "body" in value:
        body = value["body"]
        if not isinstance(body, dict):
            raise ValueError("has a body that is no JSON object")
        if value.get("method", "POST") != "POST":
            raise ValueError(f"has the method {value['method']!r}, not POST")
        url = value.get("url")
        return (url if isinstance(url, str) else _endpoint_of(body)), body
    body = {name: field for name, field in value.items() if name != "custom_id"}
    return _endpoint_of(body), body


def _endpoint_of(body: Mapping[str, Any]) -> str:
    for field, endpoint in _ENDPOINT_BY_FIELD.items():
        if field in body:
            return endpoint
    raise ValueError("has none of the fields body, messages, prompt and input")
