"""Requests for vectors: a sequence for each input, computed like a prompt, and a vector instead of a token."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from google.rpc import code_pb2

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.admission import reject
from octavo.services.scheduler.model_facts import ModelFacts
from octavo.services.scheduler.outputs import WorkerMisbehavedError, read_column
from octavo.worker.v1 import worker_pb2

_ELEMENT_BYTES = 4


def prompts_of(submit: scheduler_pb2.Submit) -> list[array[int]]:
    """Return what each sequence of a request starts with: its input, or what all candidates share."""
    if not submit.HasField("pooling"):
        tokens = array("I", submit.prompt_token_ids)
        tokens.extend(submit.continue_token_ids)
        return [tokens[:] for _ in range(max(submit.candidate_count, 1))]
    tokens, prompts, start = array("I", submit.prompt_token_ids), [], 0
    for length in submit.pooling.input_lengths:
        prompts.append(tokens[start : start + length])
        start += length
    return prompts


def refuse(submit: scheduler_pb2.Submit, model: ModelFacts | None) -> scheduler_pb2.Rejected | None:
    """Return why a model cannot do what a request asks for, or None. A model of None is not known yet."""
    if model is not None and (problem := mismatch(submit, model)):
        return reject(submit, code_pb2.FAILED_PRECONDITION, "FEATURE_DISABLED", problem)
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


def mismatch(submit: scheduler_pb2.Submit, model: ModelFacts) -> str:
    """Return why a request is not for this kind of model, or nothing."""
    if submit.HasField("pooling") == model.makes_vectors:
        return ""
    if model.makes_vectors:
        return "the model makes vectors and generates no text; serve a model that does"
    return "the model generates text and makes no vectors; serve a model for embeddings"


def vectors_of(result: worker_pb2.StepResult, count: int) -> Iterator[bytes]:
    """Yield the `count` vectors of a step's answer; one that was not finite is empty. Raises WorkerMisbehavedError."""
    sizes = read_column("I", result.vector_sizes)
    if len(sizes) != count or _ELEMENT_BYTES * sum(sizes) != len(result.vectors):
        raise WorkerMisbehavedError(
            f"step {result.step_id} makes {count} vectors, answered were {len(sizes)} in {len(result.vectors)} bytes"
        )
    return _slices(result.vectors, sizes)


def _slices(data: bytes, sizes: array[int]) -> Iterator[bytes]:
    start = 0
    for size in sizes:
        end = start + _ELEMENT_BYTES * size
        yield data[start:end]
        start = end
