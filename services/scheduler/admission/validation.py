"""Validation holds a request against what the workers' model can do, and says why it cannot."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import chain

from google.rpc import code_pb2

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.groups.worker_group import ModelInfo, WorkerGroup
from octavo.services.scheduler.requests.resume import MAX_STATE_BYTES

MIN_RETRY_MS, MAX_RETRY_MS = 50, 60_000


def refuse_for_model(submit: scheduler_pb2.Submit, model: ModelInfo | None) -> scheduler_pb2.Rejected | None:
    """Return why a model cannot do what a request asks for, or None. A model of None is not known yet."""
    if model is not None and (problem := mismatch(submit, model)):
        return reject(submit, *problem)
    if (refused := _refuse_pooling(submit, model)) is not None:
        return refused
    if submit.HasField("constraint") and submit.constraint.WhichOneof("kind") != "grammar":
        message = "a constraint must be a grammar here: gateways translate the other kinds"
        return reject(submit, code_pb2.INVALID_ARGUMENT, "INVALID_CONSTRAINT", message)
    return None


def _refuse_pooling(submit: scheduler_pb2.Submit, model: ModelInfo | None) -> scheduler_pb2.Rejected | None:
    if not submit.HasField("pooling"):
        return None
    pooling = submit.pooling
    lengths, starts = pooling.input_lengths, pooling.second_segment_starts
    fits = sum(lengths) == len(submit.prompt_token_ids) and all(lengths) and len(starts) in (0, len(lengths))
    if not fits or submit.continue_token_ids or submit.candidate_count != len(lengths):
        message = "input_lengths must be at least 1 and add up to the prompt, with a candidate for each"
        return reject(submit, code_pb2.INVALID_ARGUMENT, "INVALID_FIELD", message)
    if model is not None and pooling.dimensions > model.vector_size:
        message = f"dimensions must be at most {model.vector_size}, the size of the model's vectors"
        return reject(submit, code_pb2.INVALID_ARGUMENT, "INVALID_FIELD", message)
    return None


def refuse_for_workers(
    submit: scheduler_pb2.Submit, groups: Collection[WorkerGroup], max_model_len: int
) -> scheduler_pb2.Rejected | None:
    """Return why the workers there are cannot do what is asked for.

    `max_model_len` is what they can hold, 0 if there are none, nor soon will be.
    """
    num_tokens = len(submit.prompt_token_ids) + len(submit.continue_token_ids)
    is_generation = not submit.HasField("pooling")
    longest = least_tokens(submit)
    if max_model_len == 0:
        return reject(
            submit, code_pb2.UNAVAILABLE, "NO_WORKERS", "no worker is ready; try again shortly", retry_ms=1000
        )
    if submit.HasField("constraint") and groups and not any(group.limits.takes_grammars for group in groups):
        message = "the workers take no constraints: they need the package llguidance, and the model's tokenizer"
        return reject(submit, code_pb2.FAILED_PRECONDITION, "FEATURE_DISABLED", message)
    if submit.prompt_logprobs and groups and not any(group.limits.scores_prompts for group in groups):
        message = "the workers' device gives no log probabilities of prompts"
        return reject(submit, code_pb2.FAILED_PRECONDITION, "FEATURE_DISABLED", message)
    if not submit.prompt_token_ids:
        return reject(submit, code_pb2.INVALID_ARGUMENT, "INVALID_FIELD", "the prompt is empty")
    if len(submit.gateway_state) > MAX_STATE_BYTES:
        message = f"gateway_state has {len(submit.gateway_state)} bytes; the limit is {MAX_STATE_BYTES}"
        return reject(submit, code_pb2.INVALID_ARGUMENT, "INVALID_FIELD", message)
    if longest > max_model_len:
        return reject(
            submit,
            code_pb2.INVALID_ARGUMENT,
            "KV_CAPACITY_EXCEEDED",
            f"prompt and output so far have {num_tokens} tokens; "
            f"the cache holds at most {max_model_len} of a sequence: shorten the prompt"
            if is_generation
            else f"an input has {longest} tokens; the workers take at most {max_model_len}: shorten it",
            tokens=longest - is_generation,
            limit=max_model_len,
        )
    return None


def bypasses_prefix_cache(submit: scheduler_pb2.Submit, model: ModelInfo | None) -> bool:
    """Return whether nothing of a request may come from the cache: all hidden states are needed, or it says so."""
    if submit.HasField("pooling"):
        return model is None or model.whole_sequences or not model.of_last_token
    return submit.bypass_prefix_cache or submit.prompt_logprobs > 0


def mismatch(submit: scheduler_pb2.Submit, model: ModelInfo) -> tuple[int, str, str] | None:
    """Return why a model cannot compute a request, as code, reason and message, or None."""
    if submit.HasField("pooling") != model.makes_vectors:
        message = "the model generates text and makes no vectors; serve a model for embeddings"
        if model.makes_vectors:
            message = "the model makes vectors and generates no text; serve a model that does"
        return code_pb2.FAILED_PRECONDITION, "FEATURE_DISABLED", message
    problem = vocabulary_mismatch(submit, model.vocab_size)
    return (code_pb2.INVALID_ARGUMENT, "INVALID_FIELD", problem) if problem else None


def vocabulary_mismatch(submit: scheduler_pb2.Submit, vocab_size: int) -> str:
    """Return which token id of a request the model does not have, or nothing; `vocab_size` 0: not known.

    Gateways check what clients send, but one that has the tokenizer of another model would send such ids without
    knowing, and a worker cannot compute them.
    """
    if not vocab_size:
        return ""
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(submit, name) > vocab_size:
            return f"{name}: is {getattr(submit, name)}, and the vocabulary of the workers has {vocab_size} tokens"
    for name, token_ids in _columns(submit):
        if (largest := max(token_ids, default=0)) >= vocab_size:
            return f"{name}: token id {largest} is not below {vocab_size}, the size of the vocabulary of the workers"
    return ""


def _columns(submit: scheduler_pb2.Submit) -> Iterable[tuple[str, Iterable[int]]]:
    sampling = submit.sampling
    return (
        ("prompt", submit.prompt_token_ids),
        ("continue_output", submit.continue_token_ids),
        ("sampling.logit_bias", sampling.logit_bias),
        ("sampling.allowed_token_ids", sampling.allowed_token_ids),
        ("sampling.bad_words", chain.from_iterable(word.ids for word in sampling.bad_words_token_ids)),
        ("stop.stop_token_ids", submit.stop.stop_token_ids),
        ("end_of_sequence_ids", submit.end_of_sequence_ids),
    )


def least_tokens(submit: scheduler_pb2.Submit) -> int:
    """Return how long the longest sequence of a request gets at least: text gets a token, a vector takes no room."""
    if submit.HasField("pooling"):
        return max(submit.pooling.input_lengths, default=0)
    return len(submit.prompt_token_ids) + len(submit.continue_token_ids) + 1


def wanted_tokens(submit: scheduler_pb2.Submit) -> int:
    """Return how long the longest sequence of a request gets with all the tokens that it names."""
    if submit.HasField("pooling"):
        return least_tokens(submit)
    return max(least_tokens(submit), len(submit.prompt_token_ids) + submit.stop.max_new_tokens)


def reject(
    submit: scheduler_pb2.Submit, code: int, reason: str, message: str, retry_ms: int = 0, **metadata: object
) -> scheduler_pb2.Rejected:
    """Return the refusal of a request; with `retry_ms` it is worth trying again, after about so long."""
    return scheduler_pb2.Rejected(
        handle=submit.handle,
        code=code,
        reason=reason,
        message=message,
        retry_after_ms=min(max(retry_ms, MIN_RETRY_MS), MAX_RETRY_MS) if retry_ms else 0,
        metadata={key: str(value) for key, value in metadata.items()},
    )
