"""Token ids of requests, held against the vocabulary of the workers' model.

A worker cannot compute an id that its model does not have. Gateways check what clients send, but one that has
the tokenizer of another model would send such ids without knowing.
"""

from __future__ import annotations

from collections.abc import Iterable

from google.rpc import code_pb2

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.admission import reject


def refuse(submit: scheduler_pb2.Submit, vocab_size: int) -> scheduler_pb2.Rejected | None:
    """Return why a model with so many token ids cannot take a request, or None. 0: not known yet."""
    problem = mismatch(submit, vocab_size)
    return reject(submit, code_pb2.INVALID_ARGUMENT, "INVALID_FIELD", problem) if problem else None


def mismatch(submit: scheduler_pb2.Submit, vocab_size: int) -> str:
    """Return which token id of a request the model does not have, or nothing."""
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
        ("stop.stop_token_ids", submit.stop.stop_token_ids),
        ("end_of_sequence_ids", submit.end_of_sequence_ids),
    )
