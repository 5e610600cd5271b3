"""The answers of chat and text completions: whole, and as chunks of a stream.

A chunk is made for each token, so everything that is the same in all chunks of a stream is made once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2
from octavo.services.common.errors import ServingError
from octavo.services.gateway.http.errors import error_body
from octavo.services.gateway.http.logprobs import TokenTexts, chat_logprobs, completion_logprobs
from octavo.services.gateway.http.requests import ApiCall
from octavo.services.gateway.offload.long_json import to_json, to_json_in_pieces


@dataclass(frozen=True, slots=True)
class Echo:
    """One prompt.

    logprobs  its logprobs object; None if none are wanted
    length    characters of its tokens, from which on the offsets of the output's count
    """

    text: str
    logprobs: dict[str, Any] | None
    length: int


def echo_of(
    prompt: str | list[int],
    token_ids: Sequence[int],
    started: generation_pb2.Started,
    logprobs: int | None,
    texts: TokenTexts,
) -> Echo:
    """Return a prompt as its outputs begin with it.

    prompt     what the client sent
    token_ids  of the prompt
    logprobs   as in ApiCall
    """
    names = [texts.get(token_id)[0] for token_id in token_ids]
    text = prompt if isinstance(prompt, str) else texts.join(token_ids)
    length = sum(map(len, names))
    if logprobs is None:
        return Echo(text, None, length)
    columns = started.prompt_logprobs
    # Of the first token nothing is known. Whether there are alternatives is told by the width, which was at least 1.
    after, _ = completion_logprobs(texts, token_ids[1:], columns, len(names[0]))
    return Echo(
        text,
        {
            "tokens": names,
            "token_logprobs": [None, *after["token_logprobs"]],
            "top_logprobs": [None, *after["top_logprobs"]] if logprobs else None,
            "text_offset": [0, *after["text_offset"]],
        },
        length,
    )


def after_echo(echo: Echo, choice: dict[str, Any], *, omits_output: bool) -> dict[str, Any]:
    """Return a choice of a whole answer with the prompt before its output, or instead of it."""
    output, logprobs = choice["text"], choice["logprobs"]
    if omits_output:
        return {**choice, "text": echo.text, "logprobs": echo.logprobs, "finish_reason": "length"}
    if echo.logprobs is not None:
        logprobs = {name: column and column + logprobs[name] for name, column in echo.logprobs.items()}
    return {**choice, "text": echo.text + output, "logprobs": logprobs}


_FINISH_REASONS: Mapping[int, str] = {
    common_pb2.FINISH_REASON_END_OF_SEQUENCE: "stop",
    common_pb2.FINISH_REASON_STOP_SEQUENCE: "stop",
    common_pb2.FINISH_REASON_STOP_TOKEN: "stop",
    common_pb2.FINISH_REASON_MAX_TOKENS: "length",
    common_pb2.FINISH_REASON_CONTEXT_LIMIT: "length",
    common_pb2.FINISH_REASON_TIME_LIMIT: "length",
    common_pb2.FINISH_REASON_CANCELLED: "abort",
    common_pb2.FINISH_REASON_TOOL_CALL: "tool_calls",
}


class ChunkFormat:
    """An answer of choices. Candidates are numbered through all prompts: `index` below."""

    _ID_PREFIX: str
    _KIND: str
    _CHUNK_KIND: str
    _NO_OUTPUT: str
    """The output in the chunk that ends a candidate."""

    def __init__(self, call: ApiCall, request_id: str, texts: TokenTexts) -> None:
        self._call = call
        self._texts = texts
        self._id = self._ID_PREFIX + request_id
        self._created = int(time.time())
        self._head = ""  # of every chunk, up to the index of its choice
        self._tail = "}]" + (',"usage":null' if call.include_usage else "") + "}\n\n"
        self._usages: list[common_pb2.Usage] = []  # so far, by candidate; only if every chunk has its own

    def start(self, started: generation_pb2.Started) -> None:
        """Learn the model's name and version, before any chunk is made."""
        about = to_json(self._about(self._CHUNK_KIND, started))
        self._head = f'data: {about[:-1]},"choices":['

    def first_chunks(self, first_index: int, prompt_token_ids: Sequence[int]) -> str:
        """Return the chunks of a prompt's candidates before any output."""
        indexes = range(first_index, first_index + self._call.num_candidates)
        if self._call.continuous_usage:
            while len(self._usages) < indexes.stop:
                self._usages.append(common_pb2.Usage())
            for index in indexes:
                self._usages[index].prompt_tokens = len(prompt_token_ids)
        return "".join(self._first_chunk(index, prompt_token_ids) for index in indexes)

    def prompt_chunks(self, first_index: int, started: generation_pb2.Started, prompt_token_ids: Sequence[int]) -> str:
        """Return the chunks that repeat the prompt in each of its candidates, from this index on; "" if none do."""
        del first_index, started, prompt_token_ids
        return ""

    def delta(self, index: int, delta: generation_pb2.Delta) -> str:
        """Return the chunk for new output; nothing if there is nothing to show yet."""
        call = self._call
        if call.continuous_usage:
            self._usages[index].output_tokens += delta.token_count
        logprobs, rest, output = "null", "", self._output(delta)
        if call.logprobs is not None and delta.token_count:
            logprobs = to_json(self._logprobs(index, delta.token_ids, delta.logprobs))
        elif not output and not call.token_ids:
            return ""
        if call.token_ids:
            rest = f',"token_ids":{to_json(list(delta.token_ids))}'
        return (
            f'{self._head}{{"index":{index},{output or self._NO_OUTPUT},'
            f'"logprobs":{logprobs},"finish_reason":null{rest}{self._end_of_chunk(index)}'
        )

    def finish(self, index: int, finished: generation_pb2.CandidateFinished) -> str:
        """Return the chunk that ends a candidate."""
        reason = _FINISH_REASONS[finished.finish_reason]
        tail = self._end_of_chunk(index)
        return f'{self._head}{{"index":{index},{self._NO_OUTPUT},"logprobs":null,"finish_reason":"{reason}"{tail}'

    def end(self, usages: Sequence[common_pb2.Usage]) -> str:
        """Return what ends a stream: the usage, if it was asked for, and the mark of the end."""
        last = ""
        if self._call.include_usage:
            last = f'{self._head}],"usage":{to_json(usage_object(add_usages(usages)))}}}\n\n'
        return last + "data: [DONE]\n\n"

    def failure(self, error: ServingError) -> str:
        """Return the last event of a stream that failed."""
        return f"data: {to_json(error_body(error))}\n\n"

    def whole(
        self, answers: Sequence[generation_pb2.GenerateResponse], prompts: Sequence[Sequence[int]]
    ) -> dict[str, Any]:
        """Return the whole answer; `prompts` are the token ids of each."""
        for number, (answer, prompt) in enumerate(zip(answers, prompts, strict=True)):
            self._learn_prompt(number, answer.started, prompt)
        choices = [
            self._choice(number * self._call.num_candidates + candidate.index, candidate)
            for number, answer in enumerate(answers)
            for candidate in answer.candidates
        ]
        usage = usage_object(add_usages([answer.completed.usage for answer in answers]))
        body = {**self._about(self._KIND, answers[0].started), "choices": choices, "usage": usage}
        if self._call.token_ids:
            self._add_prompts(body, prompts)
        return body

    def _end_of_chunk(self, index: int) -> str:
        """Return what ends a chunk after its only choice."""
        if not self._call.continuous_usage:
            return self._tail
        return f'}}],"usage":{to_json(usage_object(self._usages[index]))}}}\n\n'

    def _learn_prompt(self, number: int, started: generation_pb2.Started, token_ids: Sequence[int]) -> None:
        """Learn about a prompt, before the choices of a whole answer are made."""

    def _about(self, kind: str, started: generation_pb2.Started) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": started.model,
            "system_fingerprint": started.model_version,
        }

    def _choice(self, index: int, candidate: generation_pb2.Candidate) -> dict[str, Any]:
        call = self._call
        wants_logprobs = call.logprobs is not None
        return {
            "index": index,
            **self._whole_output(candidate),
            "logprobs": self._logprobs(index, candidate.token_ids, candidate.logprobs) if wants_logprobs else None,
            "finish_reason": _FINISH_REASONS[candidate.finished.finish_reason],
            **({"token_ids": list(candidate.token_ids)} if call.token_ids else {}),
        }

    def _first_chunk(self, index: int, prompt_token_ids: Sequence[int]) -> str:
        raise NotImplementedError

    def _output(self, delta: generation_pb2.Delta) -> str:
        """Return the output in a chunk; nothing if there is none to show."""
        raise NotImplementedError

    def _whole_output(self, candidate: generation_pb2.Candidate) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, index: int, token_ids: Sequence[int], columns: common_pb2.LogprobColumns) -> dict[str, Any]:
        raise NotImplementedError

    def _add_prompts(self, body: dict[str, Any], prompts: Sequence[Sequence[int]]) -> None:
        """Put the prompts' token ids where vLLM has them."""
        raise NotImplementedError


class ChatFormat(ChunkFormat):
    """Answers of /v1/chat/completions."""

    _ID_PREFIX = "chatcmpl-"
    _KIND = "chat.completion"
    _CHUNK_KIND = "chat.completion.chunk"
    _NO_OUTPUT = '"delta":{}'

    def _first_chunk(self, index: int, prompt_token_ids: Sequence[int]) -> str:
        tail = self._end_of_chunk(index)
        if self._call.token_ids:
            tail = f'}}],"prompt_token_ids":{to_json(list(prompt_token_ids))}{tail[2:]}'
        delta = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        return f'{self._head}{{"index":{index},{delta}{tail}'

    def _output(self, delta: generation_pb2.Delta) -> str:
        text, reasoning, calls = delta.text, delta.reasoning_text, delta.tool_calls
        if not calls and not reasoning:
            return f'"delta":{{"content":{to_json(text)}}}' if text else ""
        shown: dict[str, Any] = {"content": text} if text else {}
        if reasoning and self._call.include_reasoning:
            shown["reasoning_content"] = reasoning
        if calls:
            shown["tool_calls"] = [_tool_call_fragment(call) for call in calls]
        return f'"delta":{to_json(shown)}' if shown else ""

    def _whole_output(self, candidate: generation_pb2.Candidate) -> dict[str, Any]:
        calls = candidate.tool_calls
        content = None if calls and not candidate.text else candidate.text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if candidate.reasoning_text and self._call.include_reasoning:
            message["reasoning_content"] = candidate.reasoning_text
        if calls:
            message["tool_calls"] = [{"id": call.id, "type": "function", "function": _function(call)} for call in calls]
        return {"message": message}

    def _logprobs(self, index: int, token_ids: Sequence[int], columns: common_pb2.LogprobColumns) -> dict[str, Any]:
        del index
        return chat_logprobs(self._texts, token_ids, columns)

    def _add_prompts(self, body: dict[str, Any], prompts: Sequence[Sequence[int]]) -> None:
        body["prompt_token_ids"] = list(prompts[0])


class CompletionFormat(ChunkFormat):
    """Answers of /v1/completions."""

    _ID_PREFIX = "cmpl-"
    _KIND = "text_completion"
    _CHUNK_KIND = "text_completion"
    _NO_OUTPUT = '"text":""'

    def __init__(self, call: ApiCall, request_id: str, texts: TokenTexts) -> None:
        super().__init__(call, request_id, texts)
        self._offsets = [0] * (len(call.requests) * call.num_candidates)  # in characters, by candidate
        self._echoes: dict[int, Echo] = {}  # by number of the prompt

    def prompt_chunks(self, first_index: int, started: generation_pb2.Started, prompt_token_ids: Sequence[int]) -> str:
        """See ChunkFormat."""
        number = first_index // self._call.num_candidates
        self._learn_prompt(number, started, prompt_token_ids)
        echo = self._echoes.get(number)
        if echo is None:
            return ""
        logprobs = to_json_in_pieces(echo.logprobs)
        shown = f'"text":{to_json(echo.text)},"logprobs":{logprobs},"finish_reason":null'
        indexes = range(first_index, first_index + self._call.num_candidates)
        return "".join(f'{self._head}{{"index":{index},{shown}{self._end_of_chunk(index)}' for index in indexes)

    def delta(self, index: int, delta: generation_pb2.Delta) -> str:
        """See ChunkFormat."""
        return "" if self._call.omits_output else super().delta(index, delta)

    def _learn_prompt(self, number: int, started: generation_pb2.Started, token_ids: Sequence[int]) -> None:
        call = self._call
        if call.echoed_prompts:
            echo = echo_of(call.echoed_prompts[number], token_ids, started, call.logprobs, self._texts)
            self._echoes[number] = echo
            for index in range(number * call.num_candidates, (number + 1) * call.num_candidates):
                self._offsets[index] = echo.length

    def _choice(self, index: int, candidate: generation_pb2.Candidate) -> dict[str, Any]:
        choice = super()._choice(index, candidate)
        echo = self._echoes.get(index // self._call.num_candidates)
        return choice if echo is None else after_echo(echo, choice, omits_output=self._call.omits_output)

    def _first_chunk(self, index: int, prompt_token_ids: Sequence[int]) -> str:
        if not self._call.token_ids:
            return ""
        prompt = f'"prompt_token_ids":{to_json(list(prompt_token_ids))}'
        shown = f'"text":"","logprobs":null,"finish_reason":null,{prompt}'
        return f'{self._head}{{"index":{index},{shown}{self._end_of_chunk(index)}'

    def _output(self, delta: generation_pb2.Delta) -> str:
        return f'"text":{to_json(delta.text)}' if delta.text else ""

    def _whole_output(self, candidate: generation_pb2.Candidate) -> dict[str, Any]:
        return {"text": candidate.text}

    def _logprobs(self, index: int, token_ids: Sequence[int], columns: common_pb2.LogprobColumns) -> dict[str, Any]:
        offset = self._offsets[index]
        logprobs, self._offsets[index] = completion_logprobs(self._texts, token_ids, columns, offset)
        return logprobs

    def _add_prompts(self, body: dict[str, Any], prompts: Sequence[Sequence[int]]) -> None:
        for choice in body["choices"]:
            choice["prompt_token_ids"] = list(prompts[choice["index"] // self._call.num_candidates])


def _tool_call_fragment(call: generation_pb2.ToolCall) -> dict[str, Any]:
    """Return a fragment of a call for a chunk; only the first one has more than arguments."""
    if not call.id:
        return {"index": call.index, "function": {"arguments": call.arguments_json}}
    return {"index": call.index, "id": call.id, "type": "function", "function": _function(call)}


def _function(call: generation_pb2.ToolCall) -> dict[str, str]:
    return {"name": call.name, "arguments": call.arguments_json}


def add_usages(usages: Sequence[common_pb2.Usage]) -> common_pb2.Usage:
    """Return what several prompts used together."""
    return common_pb2.Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        cached_prompt_tokens=sum(usage.cached_prompt_tokens for usage in usages),
        output_tokens=sum(usage.output_tokens for usage in usages),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
    )


def usage_object(usage: common_pb2.Usage) -> dict[str, Any]:
    """Return OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_prompt_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
