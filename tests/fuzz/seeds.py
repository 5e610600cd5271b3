"""Writes the inputs that fuzzing starts from: python -m tests.fuzz.seeds."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octavo.inference.v1 import generation_pb2
from octavo.worker.v1 import worker_pb2

CORPUS = Path(__file__).parent / "corpus"
CALLED = {"name": "f", "arguments": "{}"}
MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": CALLED}]},
    {"role": "tool", "tool_call_id": "a", "content": "1"},
]
FUNCTION: dict[str, Any] = {"name": "f", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}


def bodies(kind: str) -> Iterator[dict[str, Any]]:
    """Yield proper bodies of an endpoint."""
    sampling = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "max_tokens": 4, "stop": ["a", "b"], "n": 2}
    if kind == "completion_body":
        yield {"model": "m", "prompt": "hello"}
        yield {"model": "m", "prompt": [[1, 2], [3]], "echo": True, "logprobs": 2, **sampling}
        yield {"model": "m", "prompt": ["a", "b"], "stream": True, "stream_options": {"include_usage": True}}
    elif kind == "chat_body":
        yield {"model": "m", "messages": MESSAGES, "tools": [TOOL], "tool_choice": "auto", **sampling}
        yield {"model": "m", "messages": MESSAGES[:2], "response_format": SCHEMA, "logprobs": True, "top_logprobs": 3}
        yield {"model": "m", "messages": MESSAGES[:1], "logit_bias": {"5": -100}, "stream": True}
    else:
        yield {"model": "m", "input": "hello", "instructions": "be brief", "max_output_tokens": 5}
        tool = {"type": "function", **FUNCTION}
        yield {"model": "m", "input": [{"role": "user", "content": "hi"}], "tools": [tool]}


def generations() -> Iterator[generation_pb2.Generation]:
    """Yield proper requests."""
    yield generation_pb2.Generation(model="m", text="hello", stop={"max_new_tokens": 4}, candidate_count=2)  # type: ignore[arg-type] # fmt: skip
    chat = generation_pb2.Chat(messages=[{"role": "user", "parts": [{"text": "hi"}]}])  # type: ignore[list-item]
    yield generation_pb2.Generation(model="m", chat=chat, sampling={"temperature": 1.0, "seed": 5})  # type: ignore[arg-type] # fmt: skip
    last = generation_pb2.Generation(model="m", output={"token_ids": True, "logprobs": 3})  # type: ignore[arg-type]
    last.token_ids.ids.extend([5, 6, 7])
    last.continue_output.ids.extend([8, 9])
    last.scheduling.resume_window_ms = 500
    last.stop.stop_sequences.append("he")
    yield last


def frames() -> Iterator[worker_pb2.WorkerFrame]:
    """Yield what a worker may say that has joined."""
    for step_id in (1, 2, 3):
        tokens = array("I", [5, 6]).tobytes()
        yield worker_pb2.WorkerFrame(
            step_result={
                "step_id": step_id, "slot_indexes": array("I", [0, 1]).tobytes(), "token_ids": tokens,
                "logprobs": array("f", [-1.0, -2.0]).tobytes(), "ranks": tokens,
                "candidate_token_ids": array("I", [1, 2, 3]).tobytes(),
                "candidate_logprobs": array("f", [-1.0, -2.0, -3.0]).tobytes(),
            }
        )  # fmt: skip
    yield worker_pb2.WorkerFrame(heartbeat=worker_pb2.Heartbeat())
    yield worker_pb2.WorkerFrame(worker_fault={"reason": "DEVICE_FAULT", "message": "broken", "fatal": True})  # type: ignore[arg-type] # fmt: skip
    yield worker_pb2.WorkerFrame(worker_hello={"worker_id": "w", "world_size": 1, "device": "fuzz"})  # type: ignore[arg-type] # fmt: skip
    yield worker_pb2.WorkerFrame(worker_ready={"kv_blocks": 9, "max_model_len": 50})  # type: ignore[arg-type]


def seeds(target: str) -> Iterator[bytes]:
    """Yield the inputs that fuzzing a target starts from."""
    if target == "generate":
        for generation in generations():
            yield generation_pb2.GenerateStreamRequest(generation=generation).SerializeToString()
    elif target == "resume_token":
        yield b"AAAA"
        cursors = [{"candidate_index": 0, "next_token_offset": 5}]
        yield generation_pb2.ResumeStreamRequest(resume_token="AAAA", cursors=cursors).SerializeToString()  # type: ignore[arg-type] # fmt: skip
    elif target == "worker_frames":
        joined = b""
        for frame in frames():
            data = frame.SerializeToString()
            yield bytes([len(data), 3]) + data
            joined += bytes([len(data), 3]) + data
        yield joined
    else:
        for body in bodies(target):
            yield json.dumps(body).encode()


def main() -> None:
    """Write them."""
    from tests.fuzz.targets import TARGETS

    for target in TARGETS:
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for data in seeds(target):
            (folder / hashlib.sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)


if __name__ == "__main__":
    main()
