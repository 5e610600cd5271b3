"""What both generate endpoints share: OpenAI's and vLLM's parameters, as fields of a Generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.common.sampling import SAMPLING_FIELDS
from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2
from octavo.services.common.errors import ServingError
from octavo.services.gateway.http.fields import STREAM_OPTIONS, STRUCTURED_OUTPUTS
from octavo.services.gateway.http.params import Params
from octavo.services.gateway.offload import long_json

GenerateRequest = generation_pb2.GenerateRequest

_TEXTS = [field.name for field in common_pb2.SamplingParams.DESCRIPTOR.fields if field.type == field.TYPE_STRING]
_FLOATS = [name for name, field in SAMPLING_FIELDS.items() if field.is_float]
_SESSION_HEADER = "x-session-id"
_CONSTRAINT_VALUES = ("json_schema", "regex", "choices.values", "grammar")


@dataclass(frozen=True, slots=True)
class ApiCall:
    """A translated request: one GenerateRequest for each prompt, equal but for the prompt."""

    requests: list[GenerateRequest]
    stream: bool
    include_usage: bool
    """A last chunk has the usage; only in streams."""
    logprobs: int | None
    """Alternatives for each token; None: no log probabilities at all."""
    token_ids: bool
    names: Mapping[str, str]
    """OpenAI's names of our fields, where this request chose among several."""
    continuous_usage: bool = False
    """Every chunk has the usage up to it."""
    include_reasoning: bool = True
    """The answer has the model's reasoning."""
    echoed_prompts: Sequence[str | list[int]] = ()
    """What outputs begin with: the prompt of each request; empty: with nothing."""
    omits_output: bool = False
    """There is nothing after the prompt; one token is made all the same."""

    @property
    def num_candidates(self) -> int:
        """Outputs of each prompt."""
        return self.requests[0].generation.candidate_count


def read_common(
    params: Params,
    generation: generation_pb2.Generation,
    headers: Mapping[str, str],
    response_format: Mapping[str, Any] | None,
    format_name: str,
) -> dict[str, str]:
    """Fill in what does not depend on the endpoint; return OpenAI's names as in ApiCall.names.

    format_name: what the endpoint calls `response_format`.
    """
    generation.model = params.text("model") or ""
    _read_sampling(params, generation.sampling)
    _read_stop(params, generation.stop)
    # vLLM serves small numbers first, this gateway large ones.
    generation.scheduling.priority = -_default(params.integer("priority"), 0)
    generation.scheduling.cache_salt = params.text("cache_salt") or ""
    generation.scheduling.session_id = params.text("prompt_cache_key") or headers.get(_SESSION_HEADER, "")
    generation.output.keep_special_tokens = params.boolean("skip_special_tokens") is False
    return _read_constraint(params, generation, response_format, format_name)


def read_outputs(params: Params, generation: generation_pb2.Generation) -> None:
    """Fill in how many outputs are wanted and what they have in them."""
    generation.candidate_count = _default(params.integer("n"), 1)
    generation.output.token_ids = bool(params.boolean("return_token_ids"))


def read_stream(params: Params) -> tuple[bool, bool, bool]:
    """Return whether to stream, whether with the usage at the end, and whether in every chunk."""
    stream = bool(params.boolean("stream"))
    given = params.object("stream_options")
    if given is None:
        return stream, False, False
    if not stream:
        raise params.wrong("stream_options", "is only allowed when stream is true")
    options = params.inner(given, "stream_options.", STREAM_OPTIONS)
    include_usage = bool(options.boolean("include_usage"))
    is_continuous = bool(options.boolean("continuous_usage_stats"))
    options.finish()
    return stream, include_usage, include_usage and is_continuous


def want_logprobs(output: generation_pb2.OutputOptions, logprobs: int | None) -> bool:
    """Ask for log probabilities as in ApiCall.logprobs; return whether the client wants token ids, too.

    Log probabilities are written with the tokens' texts, so they need the ids.
    """
    wants_token_ids = output.token_ids
    output.token_ids = wants_token_ids or logprobs is not None
    output.chosen_logprob = logprobs is not None
    output.logprobs = logprobs or 0
    return wants_token_ids


def copies(request: GenerateRequest, count: int) -> list[GenerateRequest]:
    """Return `count` requests that are equal to `request`, itself the first."""
    requests = [request]
    for _ in range(count - 1):
        copy = GenerateRequest()
        copy.CopyFrom(request)
        requests.append(copy)
    return requests


def _read_sampling(params: Params, sampling: common_pb2.SamplingParams) -> None:
    for name in _FLOATS:
        value = params.number(name)
        if value is not None:
            setattr(sampling, name, value)
    for name in _TEXTS:
        getattr(sampling, name).extend(params.texts(name) or ())
    top_k = params.integer("top_k")
    if top_k is not None:
        sampling.top_k = max(top_k, 0)  # vLLM says -1 for all
    seed = params.integer("seed")
    if seed is not None:
        sampling.seed = seed % 2**64
    allowed = params.token_ids("allowed_token_ids")
    if allowed is not None and not allowed:
        raise params.wrong(
            "allowed_token_ids", "must not be empty: nothing could be produced; leave it out to allow all"
        )
    sampling.allowed_token_ids.extend(allowed or ())
    bias = params.object("logit_bias") or {}
    params.check_size("logit_bias", bias)
    for key, value in bias.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) < 2**32):
            raise params.wrong("logit_bias", "must have token ids as keys")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e30:
            raise params.wrong(f"logit_bias[{key}]", "must be a number from -100 up to 100")
        sampling.logit_bias[int(key)] = value


def _read_stop(params: Params, stop: common_pb2.StopCriteria) -> None:
    given = params.take("stop")
    texts = given if isinstance(given, list) else () if given is None else (given,)
    params.check_size("stop", texts)
    for text in texts:
        if not isinstance(text, str):
            raise params.wrong("stop", "must be a string, or a list of them")
        stop.stop_sequences.append(text)
    stop.stop_token_ids.extend(params.token_ids("stop_token_ids") or ())
    min_tokens = params.integer("min_tokens")
    if min_tokens is not None:
        stop.min_new_tokens = min_tokens
    stop.ignore_end_of_sequence = bool(params.boolean("ignore_eos"))
    stop.include_stop_sequence = bool(params.boolean("include_stop_str_in_output"))


def _read_constraint(
    params: Params,
    generation: generation_pb2.Generation,
    response_format: Mapping[str, Any] | None,
    format_name: str,
) -> dict[str, str]:
    """Read what the output must look like, however it is said; return the name it was said by."""
    found: list[tuple[str, str, Any]] = []  # parameter, kind, value
    is_one_line: bool | None = None
    if response_format is not None:
        found += _response_format(params.inner(response_format, f"{format_name}."), format_name)
    for kind in ("json", "regex", "choice", "grammar"):
        value = params.take(f"guided_{kind}")
        if value is not None:
            found.append((f"guided_{kind}", kind, value))
    structured = params.object("structured_outputs")
    if structured is not None:
        options = params.inner(structured, "structured_outputs.", STRUCTURED_OUTPUTS)
        is_one_line = options.boolean("disable_any_whitespace")
        for kind in ("json", "regex", "choice", "grammar", "json_object"):
            value = options.take(kind)
            if value is not None and value is not False:
                found.append((f"structured_outputs.{kind}", kind, value))
        options.finish()
    if not found:
        return {}
    name, kind, value = found[0]
    if len(found) > 1:
        raise params.wrong(found[1][0], f"cannot be given together with {name}")
    if is_one_line is not None and kind in ("json", "json_object"):
        kind, value = "json", _with_whitespace({"type": "object"} if kind == "json_object" else value, not is_one_line)
    _set_constraint(generation.constraint, kind, value, lambda why: params.wrong(name, why))
    names = {"generation.constraint": name}
    if name != format_name:  # which has a json_schema in it, as ours has
        names |= {f"generation.constraint.{inner}": name for inner in _CONSTRAINT_VALUES}
    return names


def _with_whitespace(schema: Any, is_flexible: bool) -> Any:
    """Return a schema, as an object or its text, that says whether its texts may have line breaks and indentation."""
    if isinstance(schema, str):
        try:
            schema = long_json.loads(schema)
        except (ValueError, RecursionError):
            return schema  # it is refused later, with the place
    return {**schema, "x-guidance": {"whitespace_flexible": is_flexible}} if isinstance(schema, dict) else schema


def prefer_tool_call(generation: generation_pb2.Generation, names: Mapping[str, str], format_name: str) -> None:
    """Leave the format of texts out where a tool call is demanded: there will be no text."""
    is_demanded = generation.chat.tool_choice.mode == generation_pb2.ToolChoice.MODE_REQUIRED
    if is_demanded and names.get("generation.constraint") == format_name:
        generation.ClearField("constraint")


def _response_format(params: Params, name: str) -> list[tuple[str, str, Any]]:
    kind = params.text("type")
    if kind == "json_schema":
        schema = params.object("json_schema") or {}
        if not isinstance(schema.get("schema"), dict):
            raise params.wrong("json_schema", "must have a schema, which is an object")
        return [(name, "json", schema["schema"])]
    own = params.object("schema") if kind == "json_object" else None  # llama.cpp's way to give one
    params.finish()
    if kind == "json_object":
        return [(name, "json_object", True)] if own is None else [(name, "json", own)]
    if kind != "text":
        raise params.wrong("type", "must be text, json_object or json_schema")
    return []


def _set_constraint(
    constraint: common_pb2.OutputConstraint, kind: str, value: Any, wrong: Callable[[str], ServingError]
) -> None:
    if kind == "json":
        if not isinstance(value, (dict, str)):
            raise wrong("must be a JSON Schema, as an object or its text")
        constraint.json_schema = value if isinstance(value, str) else long_json.dumps(value, ensure_ascii=False)
    elif kind == "json_object":
        constraint.json_schema = '{"type": "object"}'  # OpenAI's JSON mode makes no other values
    elif kind == "choice":
        if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
            raise wrong("must be a list of strings")
        constraint.choices.values.extend(value)
    elif not isinstance(value, str):
        raise wrong("must be a string")
    else:
        setattr(constraint, kind, value)


def _default(value: int | None, default: int) -> int:
    return default if value is None else value


def read_max_tokens(params: Params) -> tuple[str, int | None]:
    """Return the most tokens to produce, None if not given, after the name that it was given by."""
    old, new = params.integer("max_tokens"), params.integer("max_completion_tokens")
    if old is not None and new is not None and old != new:
        raise params.wrong("max_tokens", "differs from max_completion_tokens; send one of them")
    return ("max_tokens", old) if new is None else ("max_completion_tokens", new)
