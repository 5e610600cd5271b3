"""The answers of /v1/messages: a message of blocks, or the events that tell how it comes about."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2
from octavo.services.common.errors import ServingError
from octavo.services.gateway.http.errors import error_body, messages_error
from octavo.services.gateway.http.logprobs import TokenTexts
from octavo.services.gateway.http.requests import ApiCall
from octavo.services.gateway.offload.long_json import to_json

_STOP_REASONS: Mapping[int, str] = {
    common_pb2.FINISH_REASON_STOP_SEQUENCE: "stop_sequence",
    common_pb2.FINISH_REASON_MAX_TOKENS: "max_tokens",
    common_pb2.FINISH_REASON_CONTEXT_LIMIT: "max_tokens",
    common_pb2.FINISH_REASON_TIME_LIMIT: "max_tokens",
    common_pb2.FINISH_REASON_TOOL_CALL: "tool_use",
}
"""Anthropic's name of each reason; `end_turn` for all others."""
_EMPTY: Mapping[str, Mapping[str, Any]] = {
    "text": {"type": "text", "text": ""},
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
}
"""How a block begins."""


class MessagesFormat:
    """One answer, of one candidate."""

    def __init__(self, call: ApiCall, request_id: str, texts: TokenTexts) -> None:
        del call, texts
        self._id = f"msg_{request_id}"
        self._model = ""
        self._num_blocks = 0
        self._open = ""  # the type of the last block; empty: it has ended
        self._ending: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}

    def start(self, started: generation_pb2.Started) -> None:
        """Learn the model's name, before anything else."""
        self._model = started.model

    def prompt_chunks(self, first_index: int, started: generation_pb2.Started, prompt_token_ids: Sequence[int]) -> str:
        """No prompt is repeated."""
        del first_index, started, prompt_token_ids
        return ""

    def first_chunks(self, first_index: int, prompt_token_ids: Sequence[int]) -> str:
        """Return the event before any output."""
        del first_index
        usage = common_pb2.Usage(prompt_tokens=len(prompt_token_ids))
        return _event("message_start", message=self._message([], usage))

    def delta(self, index: int, delta: generation_pb2.Delta) -> str:
        """Return the events of new output."""
        del index
        events = ""
        if delta.reasoning_text:
            events += self._go_on("thinking") + self._grow("thinking_delta", thinking=delta.reasoning_text)
        if delta.text:
            events += self._go_on("text") + self._grow("text_delta", text=delta.text)
        for call in delta.tool_calls:
            if call.id:
                events += self._begin({"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
            if call.arguments_json:
                events += self._grow("input_json_delta", partial_json=call.arguments_json)
        return events

    def finish(self, index: int, finished: generation_pb2.CandidateFinished) -> str:
        """Return the events that end the output."""
        del index
        self._end_with(finished)
        return ("" if self._num_blocks else self._go_on("text")) + self._close()

    def end(self, usages: Sequence[common_pb2.Usage]) -> str:
        """Return the last events."""
        (usage,) = usages
        return _event("message_delta", delta=self._ending, usage=_usage_object(usage)) + _event("message_stop")

    def failure(self, error: ServingError) -> str:
        """Return the last event of a stream that failed."""
        return f"event: error\ndata: {to_json(error_body(error, messages_error))}\n\n"

    def whole(
        self, answers: Sequence[generation_pb2.GenerateResponse], prompts: Sequence[Sequence[int]]
    ) -> dict[str, Any]:
        """Return the whole answer."""
        del prompts
        (answer,) = answers
        (candidate,) = answer.candidates
        self.start(answer.started)
        self._end_with(candidate.finished)
        content: list[Mapping[str, Any]] = []
        if candidate.reasoning_text:
            content.append({**_EMPTY["thinking"], "thinking": candidate.reasoning_text})
        if candidate.text or not (content or candidate.tool_calls):
            content.append({**_EMPTY["text"], "text": candidate.text})
        for call in candidate.tool_calls:
            arguments = json.loads(call.arguments_json or "{}")
            content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": arguments})
        return self._message(content, answer.completed.usage)

    def _end_with(self, finished: generation_pb2.CandidateFinished) -> None:
        reason = _STOP_REASONS.get(finished.finish_reason, "end_turn")
        self._ending = {"stop_reason": reason, "stop_sequence": finished.stop_sequence or None}

    def _message(self, content: Sequence[Mapping[str, Any]], usage: common_pb2.Usage) -> dict[str, Any]:
        about = {"id": self._id, "type": "message", "role": "assistant", "model": self._model}
        return {**about, "content": content, **self._ending, "usage": _usage_object(usage)}

    def _go_on(self, kind: str) -> str:
        """Make sure that the last block is of this kind and open."""
        return "" if self._open == kind else self._begin(_EMPTY[kind])

    def _begin(self, block: Mapping[str, Any]) -> str:
        events = self._close()
        self._open = block["type"]
        self._num_blocks += 1
        return events + _event("content_block_start", index=self._num_blocks - 1, content_block=block)

    def _grow(self, kind: str, **piece: str) -> str:
        return _event("content_block_delta", index=self._num_blocks - 1, delta={"type": kind, **piece})

    def _close(self) -> str:
        """End the last block, if it is open."""
        if not self._open:
            return ""
        self._open = ""
        return _event("content_block_stop", index=self._num_blocks - 1)


def _event(kind: str, **fields: Any) -> str:
    return f"event: {kind}\ndata: {to_json({'type': kind, **fields})}\n\n"


def _usage_object(usage: common_pb2.Usage) -> dict[str, int]:
    """Return Anthropic's usage object, whose input is what was not found in the prefix cache."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_prompt_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_prompt_tokens,
        "output_tokens": usage.output_tokens,
    }
