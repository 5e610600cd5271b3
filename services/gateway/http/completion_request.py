"""The body of POST /v1/completions as our requests, one for each prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.services.gateway.http.fields import COMPLETION
from octavo.services.gateway.http.params import Ignored, Params, are_token_ids
from octavo.services.gateway.http.requests import (
    ApiCall,
    GenerateRequest,
    copies,
    read_common,
    read_max_tokens,
    read_outputs,
    read_stream,
    want_logprobs,
)

_MAX_PROMPTS = 256
_DEFAULT_MAX_TOKENS = 16  # OpenAI's, which clients of this old endpoint rely on


def read_completion_call(
    body: Mapping[str, Any], headers: Mapping[str, str], ignored: Ignored | None = None
) -> ApiCall:
    """Return what a body asks for. Raises ServingError that names OpenAI's parameters."""
    params = Params(body, fields=COMPLETION, ignored=ignored)
    request = GenerateRequest()
    generation = request.generation
    names = read_common(params, generation, headers, params.object("response_format"), "response_format")
    read_outputs(params, generation)
    stream, include_usage, continuous_usage = read_stream(params)
    limit_name, limit = read_max_tokens(params)
    echo = bool(params.boolean("echo"))
    omits_output = echo and limit == 0
    generation.stop.max_new_tokens = _DEFAULT_MAX_TOKENS if limit is None else max(limit, int(omits_output))
    logprobs = params.integer("logprobs")
    if echo and logprobs is not None:
        generation.output.prompt_logprobs = max(logprobs, 1)  # 0 would be none at all
    token_ids = want_logprobs(generation.output, logprobs)
    params.only("best_of", (generation.candidate_count,), COMPLETION["best_of"].description)
    prompts = _read_prompts(params)
    params.finish()
    requests = copies(request, len(prompts))
    for each, prompt in zip(requests, prompts, strict=True):
        if isinstance(prompt, str):
            each.generation.text = prompt
        else:
            each.generation.token_ids.ids.extend(prompt)
            each.generation.token_ids.SetInParent()  # an empty list is still a list
    return ApiCall(
        requests=requests,
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        logprobs=logprobs,
        token_ids=token_ids,
        echoed_prompts=prompts if echo else (),
        omits_output=omits_output,
        names={
            **names,
            "generation.stop.max_new_tokens": limit_name,
            "max_new_tokens": limit_name,
            "generation.output.logprobs": "logprobs",
            "generation.output.prompt_logprobs": "logprobs",
        },
    )


def _read_prompts(params: Params) -> list[str | list[int]]:
    """Return all prompts: a prompt is a string or a list of token ids, and a list holds several."""
    given, token_ids = params.take("prompt"), params.token_ids("prompt_token_ids")
    if given is not None and token_ids is not None:
        raise params.wrong("prompt_token_ids", "cannot be given together with prompt")
    if token_ids is not None:
        return [token_ids]
    if given is None:
        raise params.wrong("prompt", "must be set")
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if are_token_ids(given):
            return [given]
        if len(given) > _MAX_PROMPTS:
            raise params.wrong("prompt", f"has {len(given)} prompts; send at most {_MAX_PROMPTS} at a time")
        if all(isinstance(prompt, str) for prompt in given):
            return given
        if all(isinstance(prompt, list) and are_token_ids(prompt) for prompt in given):
            return given
    raise params.wrong("prompt", "must be a string, a list of strings, a list of token ids, or a list of such lists")
