"""Sampling on the `cuda` device: settings and penalty state of every slot live on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from octavo.gpu_worker.devices.cuda.changes import Changes
from octavo.gpu_worker.errors import PlanError
from octavo.gpu_worker.protocol import NOT_FINITE_TOKEN, NOTHING_ALLOWED_TOKEN
from octavo.gpu_worker.sampling.grammars import Automaton, Grammars, open_automaton, pack_bits, refusals
from octavo.gpu_worker.sampling.sampler import Sampled
from octavo.gpu_worker.sampling.settings import SamplingSettings
from octavo.kernels.alternatives import MAX_ALTERNATIVES, alternatives
from octavo.kernels.configs import LOGITS
from octavo.kernels.draw import COLUMNS, FLOATS, column_values
from octavo.kernels.sampling import NOT_FINITE, DrawSettings, LogitRules, logprobs, make_workspace, sample
from octavo.kernels.step_inputs import FIELDS, record_tokens, row_settings, scatter_words

Int32Array = npt.NDArray[np.int32]
T = TypeVar("T", torch.Tensor, npt.NDArray[np.int32])

MAX_LISTED_TOKENS = 2048
"""Most tokens with a bias, and most banned ones, of a slot."""

_RULES = ("has_mask", "num_biases", "num_banned", "banned_until", "repetition", "frequency", "presence")
_ALL_FIELDS = (*FIELDS, *_RULES)
_FLOATS = {*FLOATS, "repetition", "frequency", "presence"}


@dataclass(frozen=True)
class _Flags:
    """What the host must know of a slot to choose what is launched."""

    has_rules: bool
    has_edges: bool
    wants_logprobs: bool
    num_alternatives: int
    has_bans: bool = False


@dataclass(frozen=True)
class Wanted:
    """What a step's sampling returns: R rows, padding included; `flags` are those of the real ones."""

    num_rows: int
    flags: list[_Flags]

    @property
    def num_alternatives(self) -> int:
        """Alternatives of every row: the most that one wants."""
        return max((flags.num_alternatives for flags in self.flags), default=0)

    @property
    def num_words(self) -> int:
        """Words of the result: tokens, log probabilities, ranks, alternatives, their log probabilities."""
        return 3 * _padded(self.num_rows) + 2 * _padded(self.num_rows * self.num_alternatives)


class DeviceSampler:
    """Owner of what sampling needs."""

    def __init__(
        self, last_tokens: torch.Tensor, vocab_size: int, target: str, grammars: Grammars | None = None
    ) -> None:
        """last_tokens [max_running] int32: is made to hold what each slot sampled last."""
        max_running, device = len(last_tokens), last_tokens.device
        self._vocab_size = vocab_size
        self._grammars = grammars
        self._automata: dict[int, Automaton] = {}  # of the slots that have one
        self._config = LOGITS[target]
        self._max_alternatives = min(MAX_ALTERNATIVES, vocab_size)
        assert max_running * vocab_size < 2**31, f"{max_running} slots of {vocab_size} tokens cannot be counted"
        self._flags: list[_Flags | None] = [None] * max_running

        def words(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        lists = (max_running, MAX_LISTED_TOKENS)
        self._table = words(len(_ALL_FIELDS), max_running)
        self._lists = {"bias_ids": words(*lists), "bias_values": words(*lists), "banned_ids": words(*lists)}
        self._allowed = words(max_running, -(-vocab_size // 32))
        self.counts = words(max_running, vocab_size)
        self.seen = torch.zeros(max_running, vocab_size, dtype=torch.int8, device=device)
        self._last_tokens = last_tokens
        self._rows = words(len(COLUMNS), max_running)
        self._seeds = words(max_running, 2)
        self._workspace = make_workspace(max_running, vocab_size, self._config, device)
        self._rules = LogitRules(
            allowed=self._allowed,
            bias_ids=self._lists["bias_ids"],
            bias_values=self._lists["bias_values"].view(torch.float32),
            banned_ids=self._lists["banned_ids"],
            counts=self.counts,
            seen=self.seen,
            **{name: self._field(name) for name in _RULES},
        )

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        tensors = [self._table, *self._lists.values(), self._allowed, self.counts, self.seen, self._rows]
        return sum(tensor.nbytes for tensor in [*tensors, *vars(self._workspace).values()])

    def max_result_words(self) -> int:
        """Return the words of the largest result."""
        return Wanted(len(self._flags), [_Flags(True, True, True, self._max_alternatives)]).num_words

    def check(self, settings: SamplingSettings) -> None:
        """Raise PlanError where settings ask for more than there is room for."""
        for name, values in (("bias", settings.bias_token_ids), ("banned", settings.banned_token_ids)):
            if len(values) > MAX_LISTED_TOKENS:
                raise PlanError(f"sampling_updates: {len(values)} {name} tokens, the device takes {MAX_LISTED_TOKENS}")
        if settings.grammar and self._grammars is None:
            raise PlanError("sampling_updates: grammar is set, but this worker takes none")
        if settings.logprobs > self._max_alternatives:
            raise PlanError(f"sampling_updates: logprobs is {settings.logprobs}, at most {self._max_alternatives}")

    def open_slot(self, slot: int, settings: SamplingSettings, changes: Changes) -> None:
        """Give a slot its settings; add what is to be written on the device to `changes`."""
        has_rules = settings.has_penalties or settings.forbidden is not None
        has_bans = len(settings.banned_token_ids) > 0
        has_rules = has_rules or len(settings.bias_token_ids) > 0 or has_bans or settings.is_constrained
        self._flags[slot] = _Flags(
            has_rules, settings.draw.has_edges, settings.wants_logprobs, settings.logprobs, has_bans
        )
        self.free_slot(slot)
        if (automaton := open_automaton(self._grammars, settings)) is not None:
            self._automata[slot] = automaton
        fields = _field_words(settings)
        changes.add(self._table, np.arange(len(fields)) * len(self._flags) + slot, fields)
        if settings.forbidden is not None:
            changes.add_row(self._allowed, slot, pack_bits(~settings.forbidden).view(np.int32))
        bias_ids, bias_values = _joined(settings)
        changes.add_row(self._lists["bias_ids"], slot, bias_ids)
        changes.add_row(self._lists["bias_values"], slot, bias_values.view(np.int32))
        changes.add_row(self._lists["banned_ids"], slot, settings.banned_token_ids.astype(np.int32))
        if settings.has_penalties:
            self.counts[slot].zero_()
            self.seen[slot].zero_()
            tokens, counts = _counted(settings)
            changes.add(self.counts, slot * self._vocab_size + tokens, counts, seen=self.seen)

    def free_slot(self, slot: int) -> None:
        """Forget what a slot holds on the host."""
        self._automata.pop(slot, None)

    def reset(self) -> None:
        """Forget it of every slot."""
        self._automata.clear()

    def constrained(self, slots: Int32Array) -> list[tuple[int, Automaton]]:
        """Return the rows of `slots` that have an automaton."""
        if not self._automata:
            return []
        return [(row, self._automata[slot]) for row, slot in enumerate(slots.tolist()) if slot in self._automata]

    def refuse(
        self,
        rows: list[tuple[int, Automaton]],
        slots: Int32Array,
        follows: npt.NDArray[np.bool_],
        is_computing: Callable[[], bool],
        changes: Changes,
    ) -> dict[int, int]:
        """Wait for what automata allow in a step; add it to `changes`. Return the rows without a token, and why.

        `rows` are those of `constrained(slots)`; other arguments as in `grammars.refusals`. What gets no
        token has nothing allowed: so it is not counted.
        """
        automata = [automaton for _, automaton in rows]
        patience_s = None if self._grammars is None else self._grammars.patience_s
        codes = refusals(automata, [bool(follows[row]) for row, _ in rows], patience_s, is_computing)
        until = _ALL_FIELDS.index("banned_until") * len(self._flags)
        for (row, automaton), code in zip(rows, codes, strict=True):
            slot = int(slots[row])
            allowed = np.zeros(self._allowed.shape[1], np.int32) if code else automaton.allowed.view(np.int32).copy()
            changes.add_row(self._allowed, slot, allowed)
            if not code and automaton.is_complete:  # there is no longer output
                changes.add(self._table, np.array([until + slot]), np.zeros(1, np.int32))
        return {row: code for (row, _), code in zip(rows, codes, strict=True) if code}

    def wanted(self, slots: Int32Array, num_rows: int) -> Wanted:
        """Say what sampling `slots` returns, padded to `num_rows` rows."""
        flags = [self._flags[slot] for slot in slots.tolist()]
        known = [flag for flag in flags if flag is not None]
        assert len(known) == len(flags), f"a slot of {slots} is not open"
        return Wanted(num_rows, known)

    def warm_up(self, logits: torch.Tensor, result: torch.Tensor) -> None:
        """Launch every kernel once, on a padding row, so that none is compiled in a step. `logits` is [1, V]."""
        slots = torch.full((1,), -1, dtype=torch.int32, device=logits.device)
        scratch = torch.zeros_like(slots)
        scatter_words(scratch, torch.zeros_like(slots), slots, torch.zeros_like(scratch, dtype=torch.int8))
        for has_rules in (False, True):
            for has_edges in (False, True):
                wanted = Wanted(1, [_Flags(has_rules, has_edges, has_rules, int(has_rules))])
                self.launch(logits, slots, slots, wanted, result[: wanted.num_words])

    def launch(
        self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, wanted: Wanted, result: torch.Tensor
    ) -> None:
        """Sample a token for each row; write `result` [wanted.num_words] int32, and the slots' last tokens.

        logits  [R, vocab_size] float32;  slots, positions  [R] int32, -1 in padding rows
        """
        count = wanted.num_rows
        row_settings(self._table, slots, self._rows, self._seeds, count)
        token_ids, values, ranks, ids, id_values = _sections(result, wanted)
        has_rules = any(flags.has_rules for flags in wanted.flags)
        sample(
            logits,
            DrawSettings(
                slots=slots,
                positions=positions,
                columns={name: _typed(row[:count], name) for name, row in zip(COLUMNS, self._rows, strict=True)},
                seeds=self._seeds[:count],
            ),
            self._rules if has_rules else None,
            self._workspace,
            token_ids,
            config=self._config,
            has_edges=any(flags.has_edges for flags in wanted.flags),
        )
        record_tokens(token_ids, slots, self._last_tokens)
        if any(flags.wants_logprobs for flags in wanted.flags):
            logprobs(logits, token_ids, values.view(torch.float32), ranks, config=self._config)
        if wanted.num_alternatives:
            alternatives(logits, ids, id_values.view(torch.float32), config=self._config)

    def _field(self, name: str) -> torch.Tensor:
        return _typed(self._table[_ALL_FIELDS.index(name)], name)


def _typed(row: torch.Tensor, name: str) -> torch.Tensor:
    """Return the words of a field in its type."""
    return row.view(torch.float32) if name in _FLOATS else row


def unpack(result: Int32Array, wanted: Wanted) -> Sampled:
    """Return what a step's result holds for its real rows, as the sampler of the host does."""
    flags = wanted.flags
    token_ids, values, ranks, ids, id_values = _sections(result, wanted)
    token_ids = token_ids[: len(flags)]
    is_finite = token_ids != NOT_FINITE
    rows = np.flatnonzero([flag.wants_logprobs for flag in flags])
    kept = (
        np.arange(wanted.num_alternatives)[None, :] < np.array([flags[row].num_alternatives for row in rows])[:, None]
    )
    finite = is_finite[rows, None]
    return Sampled(
        token_ids=np.where(is_finite, token_ids, NOT_FINITE_TOKEN).astype(np.uint32),
        logprobs=values.view(np.float32)[rows],
        ranks=ranks[rows].astype(np.uint32),
        candidate_token_ids=np.where(finite, ids[rows], NOT_FINITE_TOKEN).astype(np.uint32)[kept],
        candidate_logprobs=np.where(finite, id_values.view(np.float32)[rows], np.float32(np.nan))[kept],
    )


def advance(rows: list[tuple[int, Automaton]], sampled: Sampled, wanted: Wanted, refused: dict[int, int]) -> Sampled:
    """Advance the automata of a step's rows with their tokens; return what was sampled, with what was refused."""
    token_ids = sampled.token_ids.copy()
    for row, automaton in rows:
        if row in refused:
            token_ids[row] = refused[row]
        elif token_ids[row] != NOT_FINITE_TOKEN:
            automaton.advance(int(token_ids[row]))
        elif wanted.flags[row].has_bans:  # of all that the grammar allows
            token_ids[row] = NOTHING_ALLOWED_TOKEN
    return replace(sampled, token_ids=token_ids)


def _sections(result: T, wanted: Wanted) -> tuple[T, T, T, T, T]:
    """Return the parts of a result, on the device or on the host."""
    rows, count = wanted.num_rows, wanted.num_alternatives
    step, wide = _padded(rows), _padded(rows * count)
    start = 3 * step

    def table(begin: int) -> T:
        return result[begin : begin + rows * count].reshape(rows, count)

    token_ids, values, ranks = (result[begin : begin + rows] for begin in (0, step, 2 * step))
    return token_ids, values, ranks, table(start), table(start + wide)


def _padded(num_words: int) -> int:
    return -(-num_words // 4) * 4


def _field_words(settings: SamplingSettings) -> Int32Array:
    """Return the values of `_ALL_FIELDS`, floats by their bits."""
    values = {
        **column_values(settings.draw),
        "seed_low": settings.draw.seed & 0xFFFFFFFF,
        "seed_high": settings.draw.seed >> 32,
        "has_mask": settings.forbidden is not None or settings.is_constrained,
        "num_biases": len(_joined(settings)[0]),
        "num_banned": len(settings.banned_token_ids),
        "banned_until": min(settings.prompt_length + settings.min_new_tokens, 2**31 - 1),
        "repetition": settings.repetition_penalty,
        "frequency": settings.frequency_penalty,
        "presence": settings.presence_penalty,
    }
    words = np.empty(len(_ALL_FIELDS), np.uint32)
    for index, name in enumerate(_ALL_FIELDS):
        words[index] = np.float32(values[name]).view(np.uint32) if name in _FLOATS else values[name]
    return words.view(np.int32)


def _joined(settings: SamplingSettings) -> tuple[Int32Array, npt.NDArray[np.float32]]:
    """Return biased tokens, each once, and what is added to them."""
    ids, inverse = np.unique(settings.bias_token_ids, return_inverse=True)
    values = np.zeros(len(ids), np.float32)
    np.add.at(values, inverse, settings.bias_values)
    return ids.astype(np.int32), values


def _counted(settings: SamplingSettings) -> tuple[npt.NDArray[np.int64], Int32Array]:
    """Return the tokens of a history, each once, and how often each was produced."""
    tokens, inverse = np.unique(settings.history_token_ids.astype(np.int64), return_inverse=True)
    produced = np.arange(len(settings.history_token_ids)) >= settings.prompt_length
    counts = np.bincount(inverse, weights=produced, minlength=len(tokens))
    return tokens, counts.astype(np.int32)
