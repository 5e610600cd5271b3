"""A SamplingUpdate, checked and in the form the sampler uses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.common.sampling import SAMPLING_FIELDS
from octavo.common.v1 import common_pb2
from octavo.gpu_worker.errors import PlanError
from octavo.gpu_worker.ops import Draw, UInt32Array
from octavo.worker.v1 import worker_pb2

# Below this a temperature only makes logits overflow: it means greedy.
_MIN_TEMPERATURE = 1e-5
_LITTLE_ENDIAN: dict[type[Any], np.dtype[Any]] = {np.uint32: np.dtype("<u4"), np.float32: np.dtype("<f4")}


@dataclass(frozen=True)
class SamplingSettings:
    """How a slot's tokens are chosen. Fields as in SamplingUpdate, where they are explained.

    draw       of the token at position 0
    forbidden  [vocab_size] tokens that are never allowed, from all kinds of lists; None if all are
    bad_words  words of several tokens: which cannot be produced where the output ends with these before it
    """

    draw: Draw
    logprobs: int
    chosen_logprob: bool
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    bias_token_ids: UInt32Array
    bias_values: npt.NDArray[np.float32]
    forbidden: npt.NDArray[np.bool_] | None
    bad_words: Mapping[tuple[int, ...], UInt32Array]
    banned_token_ids: UInt32Array
    min_new_tokens: int
    prompt_length: int
    history_token_ids: UInt32Array
    grammar: str
    end_of_sequence_ids: UInt32Array
    prompt_logprobs: int = 0
    adapter_id: int = 0

    @property
    def has_penalties(self) -> bool:
        """Whether a penalty needs to know the past."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def is_constrained(self) -> bool:
        """Whether what may come next depends on the output so far: the slot has an automaton."""
        nothing_is_left = self.forbidden is not None and bool(self.forbidden.all())
        return bool(self.grammar or self.bad_words) or nothing_is_left

    @property
    def wants_logprobs(self) -> bool:
        """Whether its rows have an entry in `StepResult.logprobs`."""
        return self.chosen_logprob or self.logprobs > 0

    def draw_at(self, position: int) -> Draw:
        """Return how the token at the absolute `position` is drawn."""
        return Draw(**{**vars(self.draw), "position": position})


def read_sampling_update(update: worker_pb2.SamplingUpdate, vocab_size: int) -> SamplingSettings:
    """Check an update; raise PlanError if a field is out of range."""
    values = {
        name: field.value(update if hasattr(update, name) else update.sampling)
        for name, field in SAMPLING_FIELDS.items()
    }
    for name, value in values.items():
        if not math.isfinite(value) or value < min(SAMPLING_FIELDS[name].minimum, 0):
            raise PlanError(f"sampling_updates: {name} is {value}")
    if values["temperature"] < _MIN_TEMPERATURE:
        values["temperature"] = 0.0
    values["candidate_index"] = update.candidate_index
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(update, name) > vocab_size:
            raise PlanError(
                f"sampling_updates: {name} is {getattr(update, name)}, the vocabulary has {vocab_size} tokens"
            )
    bias_token_ids = _token_ids(update.bias_token_ids, "bias_token_ids", vocab_size)
    bias_values = column(update.bias_values, np.float32, "bias_values")
    if len(bias_values) != len(bias_token_ids):
        raise PlanError("sampling_updates: bias_values and bias_token_ids differ in length")
    if np.isnan(bias_values).any() or np.isposinf(bias_values).any():
        raise PlanError("sampling_updates: bias_values holds a value that is not a number, or is +inf")
    history = _token_ids(update.history_token_ids, "history_token_ids", vocab_size)
    bad_tokens, bad_words = _bad_words(update.sampling, vocab_size)
    settings = SamplingSettings(
        draw=Draw(**{name: values[name] for name in Draw.__match_args__ if name in values}, position=0),
        logprobs=update.logprobs,
        chosen_logprob=update.chosen_logprob,
        presence_penalty=values["presence_penalty"],
        frequency_penalty=values["frequency_penalty"],
        repetition_penalty=values["repetition_penalty"],
        bias_token_ids=bias_token_ids,
        bias_values=bias_values,
        forbidden=_forbidden(update, bad_tokens, vocab_size),
        bad_words=bad_words,
        banned_token_ids=_token_ids(update.banned_until_min_token_ids, "banned_until_min_token_ids", vocab_size),
        min_new_tokens=update.min_new_tokens,
        prompt_length=update.prompt_length,
        history_token_ids=history,
        grammar=update.grammar,
        end_of_sequence_ids=_token_ids(update.end_of_sequence_ids, "end_of_sequence_ids", vocab_size),
        prompt_logprobs=update.prompt_logprobs,
        adapter_id=update.adapter_id,
    )
    needs_history = settings.has_penalties or settings.grammar or bad_words or settings.prompt_logprobs
    if needs_history and len(history) < update.prompt_length:
        raise PlanError(
            f"sampling_updates: a penalty, bad_words, a grammar or prompt_logprobs is set, but history_token_ids holds "
            f"{len(history)} tokens and the prompt {update.prompt_length}"
        )
    return settings


def harmless(update: worker_pb2.SamplingUpdate) -> worker_pb2.SamplingUpdate:
    """Return an update without whatever may be wrong with this one, for rows that are answered with as many columns."""
    left = worker_pb2.SamplingUpdate(
        slot=update.slot,
        logprobs=update.logprobs,
        chosen_logprob=update.chosen_logprob,
        prompt_logprobs=update.prompt_logprobs,
        prompt_length=update.prompt_length,
    )
    if left.prompt_logprobs:
        left.history_token_ids = bytes(max(len(update.history_token_ids) & ~3, 4 * update.prompt_length))
    return left


def column(data: bytes, dtype: type[Any], name: str) -> npt.NDArray[Any]:
    """Return a column's elements, uint32 or float32 and little-endian, in an array of its own."""
    kind = _LITTLE_ENDIAN[dtype]
    if len(data) % kind.itemsize:
        raise PlanError(f"{name}: {len(data)} bytes are no whole number of elements")
    return np.frombuffer(data, kind).astype(dtype)


def _token_ids(data: bytes, name: str, vocab_size: int) -> UInt32Array:
    """Return a column of token ids, all below `vocab_size`."""
    token_ids = column(data, np.uint32, f"sampling_updates: {name}")
    if len(token_ids) and token_ids.max() >= vocab_size:
        raise PlanError(f"sampling_updates: {name} holds {token_ids.max()}, the vocabulary has {vocab_size} tokens")
    return token_ids


def _bad_words(
    sampling: common_pb2.SamplingParams, vocab_size: int
) -> tuple[list[int], Mapping[tuple[int, ...], UInt32Array]]:
    """Return the words of one token, and the last tokens of the others by those before them."""
    ends: dict[tuple[int, ...], list[int]] = {}
    for word in sampling.bad_words_token_ids:
        *before, last = ids = tuple(word.ids) or (vocab_size,)
        if max(ids) >= vocab_size:
            raise PlanError(f"sampling_updates: bad_words has the tokens {word.ids[:8]} of {vocab_size}")
        ends.setdefault(tuple(before), []).append(last)
    return ends.pop((), []), {prefix: np.array(tokens, np.uint32) for prefix, tokens in ends.items()}


def _forbidden(
    update: worker_pb2.SamplingUpdate, bad_tokens: list[int], vocab_size: int
) -> npt.NDArray[np.bool_] | None:
    """Join the packed mask, the list of allowed tokens and `bad_tokens`."""
    if not (update.allowed_token_mask or update.allowed_token_ids or update.sampling.bad_words_token_ids):
        return None
    allowed = np.ones(vocab_size, np.bool_)
    if update.allowed_token_mask:
        packed = np.frombuffer(update.allowed_token_mask, np.uint8)
        if len(packed) != (vocab_size + 7) // 8:
            raise PlanError(f"sampling_updates: allowed_token_mask has {len(packed)} bytes for {vocab_size} tokens")
        allowed &= np.unpackbits(packed, count=vocab_size, bitorder="little").astype(np.bool_)
    if update.allowed_token_ids:
        listed = np.zeros(vocab_size, np.bool_)
        listed[_token_ids(update.allowed_token_ids, "allowed_token_ids", vocab_size)] = True
        allowed &= listed
    allowed[bad_tokens] = False
    return ~allowed
