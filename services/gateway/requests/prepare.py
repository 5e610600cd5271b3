"""Turns a validated Generation into what the scheduler gets: tokens, and every setting in force."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.errors import (
    MAX_VIOLATIONS,
    FieldViolation,
    Reason,
    ServingError,
    feature_disabled,
    invalid_field,
    invalid_fields,
)
from octavo.services.gateway.output.candidate_output import CandidateOutput, OutputSettings
from octavo.services.gateway.output.stop_matcher import StopStrings
from octavo.services.gateway.requests.adapters import Adapter
from octavo.services.gateway.requests.chat import read_chat
from octavo.services.gateway.requests.generation import Prepared
from octavo.services.gateway.requests.model import Models, ServedModel
from octavo.services.gateway.requests.parsing import (
    answer_begin,
    call_id,
    force_tool_call,
    marks,
    parser_settings,
    resolve_parsing,
)
from octavo.services.gateway.tokenization.chunk_encoder import TooManyTokensError
from octavo.services.gateway.tokenization.tokenizer import INLINE_CHARS, INLINE_TOKENS

MAX_STATE_BYTES = 60_000
"""Longest state that a scheduler keeps for a request, with room for its own limit of 65,536."""
MAX_BAD_WORDS_TOKENS = 8192
KEPT_PROMPT_TOKENS = 16
_INLINE_MESSAGES = 64


async def prepare(
    generation: generation_pb2.Generation,
    models: Models,
    workers_limit: int,
    request_id: str,
    tenant: str,
) -> Prepared:
    """Resolve a request that obeys the rules of its fields. Raises ServingError.

    workers_limit: longest context the workers can hold, 0 if not known.
    """
    model = models.of(generation.model)
    if model.tokenizer.vector_files is not None:
        raise feature_disabled("generate", f"the model {model.name!r} makes vectors and generates no text")
    _check_features(generation, model)
    adapter = await models.adapter_of(generation.model, generation.adapter)
    work = model.tokenizer.long_work
    cache_salt = cache_salt_of(tenant, generation.scheduling.cache_salt)
    limit = model.context_limit(workers_limit)
    prompt = await _prompt_token_ids(generation, model, cache_salt, limit, tenant)
    is_long = _is_long(generation, prompt)
    draft = await work.run(tenant, partial(_checked, generation, model, prompt, limit), is_long)
    continued = generation.continue_output.ids
    grammar = ""
    if draft.generation.HasField("constraint"):
        assert model.constraints is not None, "checked above"
        grammar = await model.constraints.grammar_of(draft.generation.constraint, continued, tenant)

    def finish() -> Prepared:
        submit = _submit(draft, model, prompt, request_id, tenant, cache_salt, adapter)
        if grammar:
            submit.constraint.grammar = grammar
        started = generation_pb2.Started(
            request_id=request_id,
            model=generation.model if models.is_adapter(generation.model) else model.name,
            prompt_tokens=len(prompt),
            effective_sampling=draft.sampling,
            effective_stop=draft.stop,
        )
        candidates = _candidates(draft.settings, request_id, submit.candidate_count, continued)
        return Prepared(model, submit, started, draft.generation.output, draft.settings, candidates)

    return await work.run(tenant, finish, is_long)


@dataclass(frozen=True, slots=True)
class _Draft:
    """A request that contradicts neither itself nor the model, with every setting in force."""

    generation: generation_pb2.Generation
    sampling: common_pb2.SamplingParams
    stop: common_pb2.StopCriteria
    parsing: generation_pb2.Parsing
    settings: OutputSettings


def _is_long(generation: generation_pb2.Generation, prompt: Sequence[int]) -> bool:
    """Return whether looking at all of a request takes so long that the event loop must not."""
    chat = generation.chat
    num_bytes = len(chat.template_options_json) + sum(map(len, chat.tools_json))
    num_tokens = len(prompt) + len(generation.continue_output.ids)
    num_texts = max(len(chat.messages), len(generation.sampling.bad_words))
    return num_tokens > INLINE_TOKENS or num_bytes > INLINE_CHARS or num_texts > _INLINE_MESSAGES


def _checked(generation: generation_pb2.Generation, model: ServedModel, prompt: Sequence[int], limit: int) -> _Draft:
    stop = _effective_stop(generation.stop)
    sampling = _effective_sampling(generation.sampling, model)
    generation = force_tool_call(generation)
    _set_max_new_tokens(stop, generation, len(prompt), limit, clamps=model.clamps_max_tokens)
    _check_values(generation, model, stop, prompt)
    parsing = resolve_parsing(generation, model, prompt)
    settings = _output_settings(generation, model, stop, prompt, parsing)
    return _Draft(generation, sampling, stop, parsing, settings)


def _submit(
    draft: _Draft,
    model: ServedModel,
    prompt: Sequence[int],
    request_id: str,
    tenant: str,
    cache_salt: str,
    adapter: Adapter | None,
) -> scheduler_pb2.Submit:
    """Return what the scheduler gets, but for the grammar."""
    generation, stop = draft.generation, draft.stop
    submit = scheduler_pb2.Submit(
        request_id=request_id,
        prompt_token_ids=prompt,
        continue_token_ids=generation.continue_output.ids,
        sampling=draft.sampling,
        stop=stop,
        candidate_count=generation.candidate_count or 1,
        logprobs=generation.output.logprobs,
        chosen_logprob=_wants_logprobs(generation.output),
        priority=generation.scheduling.priority,
        tenant=tenant,
        cache_salt=cache_salt,
        bypass_prefix_cache=generation.scheduling.bypass_prefix_cache,
        progress_interval_ms=generation.output.progress_interval_ms,
        resume_window_ms=generation.scheduling.resume_window_ms,
        prompt_logprobs=generation.output.prompt_logprobs,
        adapter=adapter.key if adapter is not None else "",
        adapter_path=adapter.path if adapter is not None else "",
    )
    if submit.resume_window_ms:
        resolved = _resolved(generation, prompt, draft.sampling, stop, draft.parsing)
        resolved.adapter = submit.adapter  # these files, whatever the name means later
        submit.gateway_state = resolved.SerializeToString()
    del submit.stop.stop_sequences[:]  # the gateway's business
    del submit.sampling.bad_words[:]
    submit.sampling.bad_words_token_ids.extend(_bad_words(draft.sampling.bad_words, model))
    if not stop.ignore_end_of_sequence:
        submit.end_of_sequence_ids.extend(model.tokenizer.end_of_sequence_ids)
    return submit


def _bad_words(words: Sequence[str], model: ServedModel) -> list[common_pb2.TokenIds]:
    """Return the tokens of words, as they begin a text, and as they follow a space. Raises INVALID_FIELD."""
    found: list[list[int]] = []
    for index, word in enumerate(words):
        text = word.lstrip() or word
        first = model.tokenizer.encode_anew(text, add_special_tokens=False)
        spaced = model.tokenizer.encode_anew(" " + text, add_special_tokens=False)
        if not first:
            raise invalid_field(f"generation.sampling.bad_words[{index}]", "has no tokens; leave it out")
        found.append(first)
        if len(spaced) == len(first) and spaced[0] != first[0]:  # vLLM's rule
            found.append(spaced)
    if (count := sum(map(len, found))) > MAX_BAD_WORDS_TOKENS:
        description = f"has {count} tokens; send words of at most {MAX_BAD_WORDS_TOKENS} in all"
        raise invalid_field("generation.sampling.bad_words", description)
    return [common_pb2.TokenIds(ids=ids) for ids in found]


def _candidates(
    settings: OutputSettings, request_id: str, count: int, continued: Sequence[int]
) -> list[CandidateOutput]:
    """Return the outputs of the candidates, with `continued` behind them. Raises INVALID_FIELD if that has ended."""

    def new(candidate: int) -> CandidateOutput:
        return CandidateOutput(settings, lambda index: call_id(request_id, candidate, index, settings.parser))

    candidates = [new(index) for index in range(count)]
    if continued:  # the output of the only one
        candidates[0].push(continued)
        _check_continues(candidates[0], settings, continued)
    return candidates


def _resolved(
    generation: generation_pb2.Generation,
    prompt: Sequence[int],
    sampling: common_pb2.SamplingParams,
    stop: common_pb2.StopCriteria,
    parsing: generation_pb2.Parsing,
) -> generation_pb2.Generation:
    """Return the request with everything in force, for a gateway that goes on with it: `prepare` takes it again.

    A prompt that is too long to be kept is cut to its end, which is all that the text of the output depends on.
    """
    resolved = generation_pb2.Generation()
    resolved.CopyFrom(generation)
    resolved.sampling.CopyFrom(sampling)
    resolved.stop.CopyFrom(stop)
    resolved.output.parsing.CopyFrom(parsing)
    resolved.token_ids.ids.extend(prompt)
    if resolved.ByteSize() > MAX_STATE_BYTES:
        resolved.token_ids.ids[:] = prompt[-KEPT_PROMPT_TOKENS:]
    if resolved.HasField("constraint") and resolved.ByteSize() > MAX_STATE_BYTES:
        description = f"a constraint of {resolved.constraint.ByteSize()} bytes is too long to be kept for resuming"
        raise invalid_field("generation.scheduling.resume_window_ms", description + "; shorten it, or leave this unset")
    return resolved


def _wants_logprobs(output: generation_pb2.OutputOptions) -> bool:
    return output.chosen_logprob or output.logprobs > 0


def check_headers(generation: generation_pb2.Generation, headers: Mapping[str, str]) -> None:
    """Refuse headers that say something else than the body: a router may have believed them."""
    for header, field, value in (
        ("x-model", "generation.model", generation.model),
        ("x-session-id", "generation.scheduling.session_id", generation.scheduling.session_id),
    ):
        if header in headers and headers[header] != value:
            raise invalid_field(field, f"differs from the header {header}; send the same value or leave the header out")


def _check_features(generation: generation_pb2.Generation, model: ServedModel) -> None:
    for asked, feature, field in (
        (generation.HasField("constraint") and not model.constraints, "structured_output", "generation.constraint"),
        (
            generation.chat.tool_choice.mode == generation_pb2.ToolChoice.MODE_REQUIRED and not model.constraints,
            "structured_output",
            "generation.chat.tool_choice",
        ),
        (generation.idempotency_key, "idempotency", "generation.idempotency_key"),
    ):
        if asked:
            raise feature_disabled(feature, f"{field} needs the feature {feature!r}, which is off here; leave it unset")


def _effective_sampling(given: common_pb2.SamplingParams, model: ServedModel) -> common_pb2.SamplingParams:
    """Return the model's defaults with what the client set on top, and a seed in any case."""
    sampling = common_pb2.SamplingParams(seed=secrets.randbits(64))
    sampling.MergeFrom(model.tokenizer.default_sampling)
    sampling.MergeFrom(given)
    return sampling


def _effective_stop(given: common_pb2.StopCriteria) -> common_pb2.StopCriteria:
    stop = common_pb2.StopCriteria(min_new_tokens=0, ignore_end_of_sequence=False, include_stop_sequence=False)
    stop.MergeFrom(given)
    return stop


async def _prompt_token_ids(
    generation: generation_pb2.Generation, model: ServedModel, cache_salt: str, limit: int, tenant: str
) -> Sequence[int]:
    """Return the prompt as tokens. Raises CONTEXT_LENGTH_EXCEEDED for a text of more than `limit`, INVALID_FIELD."""
    kind = generation.WhichOneof("prompt")
    if kind == "token_ids":
        return generation.token_ids.ids
    text, add_special_tokens = generation.text, True
    if kind == "chat":
        # The template has all special tokens in it already.
        text, add_special_tokens = await chat_text(generation.chat, model, "generation.chat", tenant), False
        begin = answer_begin(generation, model)
        text = text.removesuffix(begin) + begin  # some templates end with it
    encode = partial(model.tokenizer.encode, text, add_special_tokens, cache_salt, limit)
    try:
        return await model.tokenizer.long_work.run(tenant, encode, len(text) > INLINE_CHARS)
    except TooManyTokensError as error:
        raise _too_long(generation, error.count, limit, "at least ") from None


async def chat_text(chat: generation_pb2.Chat, model: ServedModel, path: str, tenant: str) -> str:
    """Return the prompt that the model's template makes of `chat`, which lies at `path` in the request.

    Raises FEATURE_DISABLED, INVALID_FIELD, QUEUE_FULL.
    """
    template = model.tokenizer.chat_template
    if template is None:
        message = f"the model {model.name!r} has no chat template; send text, or serve a chat model"
        raise feature_disabled("chat", message)
    facts = await template.facts()

    def request() -> bytes:
        return read_chat(chat, facts, path).request()

    is_long = chat.ByteSize() > INLINE_CHARS or len(chat.messages) > _INLINE_MESSAGES
    return await template.render(await model.tokenizer.long_work.run(tenant, request, is_long), tenant)


def _set_max_new_tokens(
    stop: common_pb2.StopCriteria, generation: generation_pb2.Generation, num_prompt: int, limit: int, *, clamps: bool
) -> None:
    """Fill `max_new_tokens` in with the room there is; raise CONTEXT_LENGTH_EXCEEDED if it does not fit.

    clamps: what does not fit is cut to the room, if there is any.
    """
    wanted = stop.max_new_tokens if stop.HasField("max_new_tokens") else 0
    room = limit - num_prompt
    if room >= max(1 if clamps else wanted, 1):
        stop.max_new_tokens = min(wanted or room, room)
        return
    raise _too_long(generation, num_prompt, limit)


def _too_long(generation: generation_pb2.Generation, num_prompt: int, limit: int, least: str = "") -> ServingError:
    wanted, room = generation.stop.max_new_tokens, limit - num_prompt
    output = f" and {wanted} of output" if wanted else ""
    message = f"{least}{num_prompt} tokens of prompt{output} do not fit the model's context of {limit}"
    message += f"; set max_new_tokens to at most {room}" if room > 0 else "; shorten the prompt"
    field = "generation.stop.max_new_tokens" if room > 0 else f"generation.{generation.WhichOneof('prompt')}"
    return ServingError(
        Reason.CONTEXT_LENGTH_EXCEEDED,
        message,
        metadata={"prompt": str(num_prompt), "limit": str(limit), "max_new_tokens": str(wanted)},
        violations=[FieldViolation(field, message)],
    )


def _check_values(
    generation: generation_pb2.Generation,
    model: ServedModel,
    stop: common_pb2.StopCriteria,
    prompt: Sequence[int],
) -> None:
    """Refuse what the rules beside the fields cannot know: the vocabulary, and fields that contradict each other."""
    violations: list[FieldViolation] = []

    def report(field: str, description: str) -> None:
        violations.append(FieldViolation(f"generation.{field}", description))

    kind = generation.WhichOneof("prompt")
    if not prompt:
        report("token_ids.ids" if kind == "token_ids" else kind, "the prompt is empty; send at least one token")
    vocab_size = model.tokenizer.vocab_size
    continued = generation.continue_output.ids
    for field, token_ids in (
        ("token_ids.ids" if kind == "token_ids" else kind, prompt),
        ("continue_output.ids", continued),
        ("sampling.allowed_token_ids", generation.sampling.allowed_token_ids),
        ("sampling.logit_bias", generation.sampling.logit_bias),
        ("stop.stop_token_ids", stop.stop_token_ids),
    ):
        if token_ids and max(token_ids) >= vocab_size:
            index, token_id = next((at, value) for at, value in enumerate(token_ids) if value >= vocab_size)
            at = token_id if field.endswith("logit_bias") else index
            report(f"{field}[{at}]", f"token {token_id} is not in the vocabulary; ids are below {vocab_size}")
    if generation.HasField("constraint") and stop.ignore_end_of_sequence:
        report("stop.ignore_end_of_sequence", "leave it unset: a constraint ends the output where it is complete")
    if stop.min_new_tokens > stop.max_new_tokens:
        report("stop.min_new_tokens", f"is above max_new_tokens; send at most {stop.max_new_tokens}")
    if generation.output.prompt_logprobs and generation.scheduling.resume_window_ms:
        report("output.prompt_logprobs", "is not kept for resuming; leave scheduling.resume_window_ms unset")
    if continued and generation.candidate_count > 1:
        report("candidate_count", "continue_output belongs to one candidate; continue each in a call of its own")
    if len(continued) >= stop.max_new_tokens and continued:
        description = f"has {len(continued)} tokens, and max_new_tokens ({stop.max_new_tokens}) counts them"
        report("continue_output.ids", description + "; nothing is left to produce")
    if violations:
        raise invalid_fields(violations[:MAX_VIOLATIONS])


def _output_settings(
    generation: generation_pb2.Generation,
    model: ServedModel,
    stop: common_pb2.StopCriteria,
    prompt: Sequence[int],
    parsing: generation_pb2.Parsing,
) -> OutputSettings:
    parser = None if generation.output.omit_text else parser_settings(parsing)
    ends = [] if stop.ignore_end_of_sequence else model.tokenizer.end_of_sequence_ids
    return OutputSettings(
        new_detokenizer=lambda: model.tokenizer.new_detokenizer(prompt),
        stop_strings=StopStrings(stop.stop_sequences) if stop.stop_sequences else None,
        include_stop_sequence=stop.include_stop_sequence,
        min_new_tokens=stop.min_new_tokens,
        ending_token_ids=frozenset([*ends, *stop.stop_token_ids]),
        omit_text=generation.output.omit_text,
        parser=parser,
        marks=marks(parser, model, generation.output.keep_special_tokens),
    )


def _check_continues(candidate: CandidateOutput, settings: OutputSettings, continued: Sequence[int]) -> None:
    """Refuse to continue an output that has ended already."""
    field = "generation.continue_output.ids"
    if candidate.matched is not None:
        raise invalid_field(
            field, f"already ended with the stop string {candidate.matched!r}; nothing is left to produce"
        )
    if candidate.is_complete:
        raise invalid_field(
            field, "already ended with the one tool call that was asked for; nothing is left to produce"
        )
    for index, token_id in enumerate(continued):
        if token_id in settings.ending_token_ids and index + 1 >= settings.min_new_tokens:
            raise invalid_field(f"{field}[{index}]", f"token {token_id} already ended the output; nothing is left")


def cache_salt_of(tenant: str, salt: str) -> str:
    """Return what cached prefixes are shared within: never across tenants, whatever their clients send."""
    return hashlib.sha256(f"{len(tenant)}:{tenant}{salt}".encode()).hexdigest()
