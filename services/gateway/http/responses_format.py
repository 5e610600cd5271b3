"""The answers of /v1/responses: an object with items, or the events that tell how it comes about."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2
from octavo.services.common.errors import ServingError
from octavo.services.gateway.http.errors import error_body
from octavo.services.gateway.http.logprobs import TokenTexts, chat_logprobs
from octavo.services.gateway.http.responses_request import ResponsesCall
from octavo.services.gateway.offload.long_json import to_json

_Item = dict[str, Any]
_INCOMPLETE = (
    common_pb2.FINISH_REASON_MAX_TOKENS,
    common_pb2.FINISH_REASON_CONTEXT_LIMIT,
    common_pb2.FINISH_REASON_TIME_LIMIT,
)


class ResponsesFormat:
    """One answer, of one candidate. Whole answers are made by the same steps as streams."""

    def __init__(self, call: ResponsesCall, request_id: str, texts: TokenTexts) -> None:
        self._call = call
        self._texts = texts
        self._request_id = request_id
        self._created = time.time()
        self._about: dict[str, Any] = {}
        self._items: list[_Item] = []  # the last one may still be growing
        self._pieces: list[str] = []  # of the last one's text or arguments
        self._logprobs: list[Any] = []  # of the last item
        self._new_logprobs: list[Any] = []  # not yet in any event
        self._is_open = False
        self._finish_reason = common_pb2.FINISH_REASON_UNSPECIFIED
        self._sequence_number = 0

    def start(self, started: generation_pb2.Started) -> None:
        """Learn the model's name and the settings in force, before anything else."""
        sampling = started.effective_sampling
        self._about = {
            "id": f"resp_{self._request_id}",
            "object": "response",
            "created_at": int(self._created),
            "background": False,
            "model": started.model,
            "previous_response_id": None,
            "service_tier": "default",
            "store": False,
            "temperature": round(sampling.temperature, 6),
            "top_p": round(sampling.top_p, 6),
            "truncation": "disabled",
            **self._call.echoed,
        }

    def prompt_chunks(self, first_index: int, started: generation_pb2.Started, prompt_token_ids: Sequence[int]) -> str:
        """No prompt is repeated."""
        del first_index, started, prompt_token_ids
        return ""

    def first_chunks(self, first_index: int, prompt_token_ids: Sequence[int]) -> str:
        """Return the events before any output."""
        del first_index, prompt_token_ids
        return "".join(
            self._event(f"response.{kind}", response=self._response("in_progress", None))
            for kind in ("created", "in_progress")
        )

    def delta(self, index: int, delta: generation_pb2.Delta) -> str:
        """Return the events of new output."""
        del index
        events = ""
        if delta.reasoning_text:
            events += self._go_on("reasoning") + self._grow("response.reasoning_text.delta", delta.reasoning_text)
        if delta.text:
            events += self._go_on("message")  # first: what is known so far belongs to the item before
        if self._call.logprobs is not None and delta.token_count:
            self._new_logprobs += chat_logprobs(self._texts, delta.token_ids, delta.logprobs)["content"]
        if delta.text:
            events += self._grow("response.output_text.delta", delta.text, logprobs=self._new_logprobs)
            self._logprobs += self._new_logprobs
            self._new_logprobs = []
        for call in delta.tool_calls:
            if call.id:
                events += self._close() + self._open("function_call", name=call.name, call_id=call.id)
            if call.arguments_json:
                events += self._grow("response.function_call_arguments.delta", call.arguments_json)
        return events

    def finish(self, index: int, finished: generation_pb2.CandidateFinished) -> str:
        """Return the events that end the output."""
        del index
        self._finish_reason = finished.finish_reason
        if not self._items:
            return self._open("message") + self._close()
        return self._close()

    def end(self, usages: Sequence[common_pb2.Usage]) -> str:
        """Return the last event."""
        (usage,) = usages
        response = self._complete(usage)
        return self._event(f"response.{response['status']}", response=response)

    def failure(self, error: ServingError) -> str:
        """Return the last event of a stream that failed."""
        body = error_body(error)["error"]
        code = "rate_limit_exceeded" if body["type"] == "rate_limit_error" else "server_error"
        failed = self._response("failed", None) | {"error": {"code": code, "message": body["message"]}}
        return self._event("response.failed", response=failed)

    def whole(
        self, answers: Sequence[generation_pb2.GenerateResponse], prompts: Sequence[Sequence[int]]
    ) -> dict[str, Any]:
        """Return the whole answer."""
        del prompts
        (answer,) = answers
        (candidate,) = answer.candidates
        self.start(answer.started)
        delta = generation_pb2.Delta(
            text=candidate.text,
            reasoning_text=candidate.reasoning_text,
            tool_calls=candidate.tool_calls,
            token_ids=candidate.token_ids,
            token_count=candidate.finished.output_tokens,
            logprobs=candidate.logprobs,
        )
        self.delta(0, delta)
        self.finish(0, candidate.finished)
        return self._complete(answer.completed.usage)

    def _complete(self, usage: common_pb2.Usage) -> dict[str, Any]:
        is_incomplete = self._finish_reason in _INCOMPLETE
        response = self._response("incomplete" if is_incomplete else "completed", usage)
        if is_incomplete:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        return response

    def _response(self, status: str, usage: common_pb2.Usage | None) -> dict[str, Any]:
        return {
            **self._about,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "output": list(self._items),
            "usage": None if usage is None else _usage_object(usage),
        }

    def _go_on(self, kind: str) -> str:
        """Make sure that the last item is of this kind and open."""
        if self._is_open and self._items[-1]["type"] == kind:
            return ""
        return self._close() + self._open(kind)

    def _open(self, kind: str, **fields: Any) -> str:
        self._logprobs = []
        item = self._item(kind, fields, "in_progress")
        self._items.append(item)
        self._is_open = True
        events = self._event("response.output_item.added", **self._place(), item=item)
        if kind != "function_call":
            events += self._event("response.content_part.added", **self._part(), part=self._content(kind, ""))
        return events

    def _grow(self, event: str, text: str, **fields: Any) -> str:
        self._pieces.append(text)
        return self._event(event, **self._part(), delta=text, **fields)

    def _close(self) -> str:
        """End the last item, if it is open."""
        if not self._is_open:
            return ""
        self._is_open = False
        self._logprobs += self._new_logprobs  # of tokens without text, such as the last one
        self._new_logprobs = []
        old = self._items[-1]
        kind, text = old["type"], "".join(self._pieces)
        self._pieces.clear()
        if kind == "function_call":
            item = {**old, "arguments": text, "status": "completed"}
            events = self._event(
                "response.function_call_arguments.done", **self._part(), name=item["name"], arguments=text
            )
        else:
            content = self._content(kind, text)
            item = {**old, "content": [content], "status": "completed"}
            done = "response.reasoning_text.done" if kind == "reasoning" else "response.output_text.done"
            more = {} if kind == "reasoning" else {"logprobs": content["logprobs"]}
            events = self._event(done, **self._part(), text=text, **more)
            events += self._event("response.content_part.done", **self._part(), part=content)
        if self._finish_reason in _INCOMPLETE:
            item["status"] = "incomplete"
        self._items[-1] = item
        return events + self._event("response.output_item.done", **self._place(), item=item)

    def _item(self, kind: str, fields: dict[str, Any], status: str) -> _Item:
        number = len(self._items)
        if kind == "function_call":
            return {"id": f"fc_{self._request_id}_{number}", "type": kind, "status": status, "arguments": "", **fields}
        if kind == "reasoning":
            return {
                "id": f"rs_{self._request_id}_{number}",
                "type": kind,
                "status": status,
                "summary": [],
                "content": [],
            }
        message = {"id": f"msg_{self._request_id}_{number}", "type": kind, "status": status}
        return {**message, "role": "assistant", "content": []}

    def _content(self, kind: str, text: str) -> dict[str, Any]:
        if kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs}

    def _place(self) -> dict[str, Any]:
        return {"output_index": len(self._items) - 1}

    def _part(self) -> dict[str, Any]:
        item = self._items[-1]
        content = {} if item["type"] == "function_call" else {"content_index": 0}
        return {"item_id": item["id"], **self._place(), **content}

    def _event(self, event_type: str, **fields: Any) -> str:
        event = {"type": event_type, "sequence_number": self._sequence_number, **fields}
        self._sequence_number += 1
        return f"event: {event_type}\ndata: {to_json(event)}\n\n"


def _usage_object(usage: common_pb2.Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_prompt_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
    }
