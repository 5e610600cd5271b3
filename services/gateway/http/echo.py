"""Prompts that go before the outputs of /v1/completions, and their log probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from octavo.inference.v1 import generation_pb2
from octavo.services.gateway.http.logprobs import TokenTexts, completion_logprobs


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
