"""Runs steps on a device whose memory is the host's: each is done when `start` returns."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from octavo.gpu_worker.config import HOST_KV_MEMORY
from octavo.gpu_worker.memory import free_memory_bytes, resident_bytes
from octavo.gpu_worker.ops import Device, Float32Array, Int32Array, StepInput, UInt32Array
from octavo.gpu_worker.protocol import BLOCK_SIZE, FIRST_NO_TOKEN
from octavo.gpu_worker.sampling.grammars import Automaton, Grammars
from octavo.gpu_worker.sampling.sampler import Sampled, Sampler, TokenLogprobs, logprobs_of, with_logprobs_before
from octavo.gpu_worker.sampling.settings import SamplingSettings
from octavo.gpu_worker.steps.batch import LAST_TOKEN, Step
from octavo.gpu_worker.steps.rows import Rows
from octavo.gpu_worker.steps.runner import Outcome
from octavo.gpu_worker.steps.speculation import Speculation


@dataclass(frozen=True)
class PromptRows:
    """The tokens of a step that are followed by a token of their prompt, of slots that want to know about those.

    rows     [P] indexes into the step's tokens, ascending
    targets  [P] the tokens that follow
    widths   [P] how many alternatives are wanted
    """

    rows: Int32Array
    targets: UInt32Array
    widths: Int32Array


class PromptScores:
    """The prompts of slots whose log probabilities are wanted."""

    def __init__(self) -> None:
        self._slots: dict[int, SamplingSettings] = {}

    def open_slot(self, slot: int, settings: SamplingSettings) -> None:
        """Learn what a slot wants; what it held before is forgotten."""
        self._slots.pop(slot, None)
        if settings.prompt_logprobs:
            self._slots[slot] = settings

    def free_slot(self, slot: int) -> None:
        """Forget a slot."""
        self._slots.pop(slot, None)

    def rows_of(self, step: Step) -> PromptRows | None:
        """Return the rows of logits that a step needs for prompts; None if it needs none."""
        if not self._slots:
            return None
        rows: list[npt.NDArray[np.int32]] = []
        targets: list[UInt32Array] = []
        widths: list[npt.NDArray[np.int32]] = []
        starts = (step.rows.query_ends - step.rows.query_lengths).tolist()
        for index, slot in enumerate(step.rows.slots.tolist()):
            settings = self._slots.get(slot)
            if settings is None:
                continue
            length, context = int(step.rows.query_lengths[index]), int(step.context_lengths[index])
            following = settings.history_token_ids[context + 1 : min(context + length + 1, settings.prompt_length)]
            rows.append(np.arange(starts[index], starts[index] + len(following), dtype=np.int32))
            targets.append(following)
            widths.append(np.full(len(following), settings.prompt_logprobs, np.int32))
        if not any(map(len, rows)):
            return None
        return PromptRows(np.concatenate(rows), np.concatenate(targets), np.concatenate(widths))


def merged_rows(prompts: PromptRows, logits_rows: Int32Array) -> tuple[Int32Array, npt.NDArray[np.bool_]]:
    """Return all rows of logits of a step, ascending, and which of them are of prompts.

    logits_rows  those that tokens are drawn from: none is followed by a token of its prompt
    """
    rows = np.concatenate([prompts.rows, logits_rows])
    order = np.argsort(rows)
    return rows[order], order < len(prompts.rows)


def with_prompts(sampled: Sampled, prompts: PromptRows, logits: Float32Array) -> Sampled:
    """Return what a step made, with the log probabilities of prompts before those of drawn tokens.

    logits  [P, vocab_size] of the prompts' rows
    """
    columns = zip(logits, prompts.targets.tolist(), prompts.widths.tolist(), strict=True)
    scores: list[TokenLogprobs] = [logprobs_of(row, token_id, width) for row, token_id, width in columns]
    return with_logprobs_before(sampled, scores)


log = logging.getLogger("octavo.worker")

MakeSpeculation = Callable[[int, Callable[[int], Automaton | None]], Speculation]
_SPARE_MEMORY_BYTES = 256 << 20  # left to others when memory is taken that is not needed yet


class HostMemory:
    """What all runners over a `Device` share: its cache and its memory are the host's."""

    scores_prompts = False
    max_row_tokens = 1

    def __init__(self, device: Device) -> None:
        self.name = device.name
        self._device = device
        self.kv_windows = device.kv_windows
        self._num_started = 1  # steps, and one: a number that is not 0
        self.adapter_modules = device.adapter_modules
        self.pack_adapter = device.pack_adapter
        self.set_adapter = device.set_adapter

    def kv_block_bytes(self) -> int:
        """See `runner.Runner`; so are the others."""
        return self._device.kv_block_bytes()

    def kv_memory_bytes(self) -> int:
        """512 MiB: other processes want memory too."""
        return HOST_KV_MEMORY

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocate the device's cache."""
        self._device.allocate_kv(num_blocks)

    def memory_used_bytes(self) -> int:
        """Return what this process takes."""
        return resident_bytes()

    def progress(self) -> int:
        """Count what the device has done, and steps."""
        return self._num_started + self._device.progress()

    def close(self) -> None:
        """Let go of the device and all that was made for it."""
        vars(self).clear()

    def use_idle_time(self) -> bool:
        """Take the memory of a piece of the cache, as long as there is some to spare: the rest is taken when used."""
        if not self._device.touch_kv():
            return False
        if free_memory_bytes() < _SPARE_MEMORY_BYTES:
            log.info("memory is short: KV blocks take theirs when they are first used")
            return False
        return True


class HostRunner(HostMemory):
    """A `Runner` over a `Device`."""

    scores_prompts = True

    def __init__(
        self,
        device: Device,
        max_running: int,
        max_blocks_per_sequence: int,
        vocab_size: int,
        grammars: Grammars | None = None,
        speculation: MakeSpeculation | None = None,
    ) -> None:
        """speculation: makes what guesses tokens, for so many blocks and the automata of slots; None: there is none."""
        super().__init__(device)
        self._num_blocks = 0
        self._grammars = grammars
        self._sizes = (max_running, max_blocks_per_sequence, vocab_size)
        self._make_speculation = speculation
        self.reset()

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocate the device's cache."""
        super().allocate_kv(num_blocks)
        self._num_blocks = num_blocks
        self.reset()

    def reset(self) -> None:
        """Forget every slot."""
        max_running, max_blocks, vocab_size = self._sizes
        self._sampler = Sampler(self._device, vocab_size, max_running, self._grammars)
        self._prompts = PromptScores()
        self._tables = Tables(max_running, max_blocks, self.kv_windows)
        self._speculation: Speculation | None = None
        if self._make_speculation is not None:
            self._speculation = self._make_speculation(self._num_blocks, self._sampler.automaton_of)
            self.max_row_tokens = self._speculation.max_row_tokens
        self._no_logits = np.empty((0, vocab_size), np.float32)

    def start(self, step: Step) -> Done:
        """Compute the step."""
        self._num_started += 1
        for slot in step.freed_slots.tolist():
            self._sampler.free_slot(slot)
            self._prompts.free_slot(slot)
        for slot, settings in step.opened:
            self._sampler.open_slot(slot, settings)
            self._tables.adapter_ids[slot] = settings.adapter_id
            self._prompts.open_slot(slot, settings)
        self._tables.append(step)
        if len(step.copy_pairs):
            self._device.copy_blocks(step.copy_pairs)
        if self._speculation is not None:
            return self._speculate(step, self._speculation)
        sampled, times = self._compute(step)
        self._tables.record(step.rows.sampled_slots, sampled.token_ids)
        return Done(Outcome(sampled, *times))

    def _speculate(self, planned: Step, speculation: Speculation) -> Done:
        """Compute a step, and of its rows what may come after them."""
        tables = self._tables
        speculation.forget(planned)
        if len(planned.copy_pairs):
            speculation.copy_blocks(planned.copy_pairs)
        step = speculation.placed(planned, tables.block_tables)
        step = speculation.with_drafts(step, tables.last_token_ids, tables.block_tables)
        sampled, times = self._compute(step)
        speculation.took(step, sum(times) / 1e6)
        counts = speculation.accepted(planned.rows, step, sampled)
        slots, token_ids = step.rows.slots[step.rows.samples].astype(np.int32), sampled.token_ids
        tables.record(slots, token_ids if counts is None else token_ids[np.cumsum(counts[counts > 0]) - 1])
        return Done(Outcome(sampled, *times, token_counts=counts, guesses=speculation.take_guesses()))

    def _compute(self, step: Step) -> tuple[Sampled, tuple[int, int]]:
        """Compute a step and draw its tokens; return them, and the microseconds that both took."""
        started = time.perf_counter()
        prompts = self._prompts.rows_of(step)
        logits, of_prompts = self._forward(step, prompts)
        computed = time.perf_counter()
        rows = step.rows
        slots, positions = rows.sampled_slots, step.sampled_positions
        sampled = self._sampler.sample(logits, slots, positions, rows.sampled_follow, step.guesses)
        if prompts is not None:
            sampled = with_prompts(sampled, prompts, of_prompts)
        return sampled, (round((computed - started) * 1e6), round((time.perf_counter() - computed) * 1e6))

    def _forward(self, step: Step, prompts: PromptRows | None) -> tuple[Float32Array, Float32Array]:
        """Compute a step; return the logits that tokens are drawn from, and those of the rows of prompts."""
        if not len(step.rows.slots):
            return self._no_logits, self._no_logits
        batch = self._tables.step_input(step)
        if self._speculation is not None:
            self._speculation.computed(batch)
        if prompts is None:
            return self._device.forward(batch), self._no_logits
        rows, is_prompt = merged_rows(prompts, batch.logits_rows)
        logits = self._device.forward(dataclasses.replace(batch, logits_rows=rows))
        return logits[~is_prompt], logits[is_prompt]


@dataclass(frozen=True)
class Done:
    """A step that has ended."""

    outcome: Outcome

    def is_done(self) -> bool:
        """Tell that it has."""
        return True

    def wait(self) -> Outcome:
        """Return what it made."""
        return self.outcome


class Tables:
    """Each slot's block table of each KV group, 0 where there is no block, last token and adapter."""

    def __init__(self, max_running: int, max_blocks_per_sequence: int, kv_windows: tuple[int, ...] = (0,)) -> None:
        self._kv_windows = kv_windows
        self._of_slots = np.zeros((max_running, len(kv_windows), max_blocks_per_sequence), np.int32)
        self.block_tables = self._of_slots.reshape(-1, max_blocks_per_sequence)
        self.last_token_ids = np.zeros(max_running, np.int32)
        self.adapter_ids = np.zeros(max_running, np.int32)
        self._rows: Rows | None = None
        self._batch: StepInput | None = None  # of those rows
        self._has_changed = False  # since its block tables were copied

    def append(self, step: Step) -> None:
        """Empty the tables of freed and opened slots, then append the step's blocks."""
        if len(step.freed_slots) or step.opened_slots:
            self._of_slots[step.freed_slots] = 0
            self._of_slots[step.opened_slots] = 0
            self._has_changed = True
        if not len(step.block_slots):
            return
        counts = step.block_counts
        starts = np.cumsum(counts) - counts
        columns = np.arange(len(step.block_ids)) + np.repeat(step.first_blocks - starts, counts)
        self.block_tables[np.repeat(step.block_slots, counts), columns] = step.block_ids
        self._has_changed = True

    def record(self, slots: Int32Array, token_ids: UInt32Array) -> None:
        """Remember the tokens drawn for `slots`.

        A sequence that got no token ends or is computed again, but the next plan may already hold it:
        it goes on with token 0 until the scheduler knows.
        """
        self.last_token_ids[slots] = np.where(token_ids >= FIRST_NO_TOKEN, 0, token_ids)

    def step_input(self, step: Step) -> StepInput:
        """Return the batch of a step that has rows.

        A step with the rows of the one before gets the same batch, written anew.
        """
        rows = step.rows
        if self._batch is None or rows is not self._rows:
            self._rows, self._batch = rows, self._new_batch(rows)
        elif self._has_changed:
            self._batch.block_tables[:] = self._tables_of(rows)
        self._has_changed = any(self._kv_windows)
        batch, row_of_token = self._batch, rows.row_of_token
        positions = step.context_lengths[row_of_token] + rows.offset_of_token
        columns, offsets = np.divmod(positions, BLOCK_SIZE)
        batch.positions[:] = positions
        tables = batch.block_tables.reshape(len(self._kv_windows), -1, batch.block_tables.shape[1])
        batch.slot_mapping[:] = (tables[:, row_of_token, columns] * BLOCK_SIZE + offsets).ravel()
        for table, window in zip(tables, self._kv_windows, strict=True):
            if window:  # what is behind it belongs to others: whole tiles are read, and what is masked must be finite
                first = np.maximum(step.context_lengths - window + 1, 0) // BLOCK_SIZE
                table[np.arange(table.shape[1]) < first[:, None]] = 0
        batch.seq_lens[:] = step.context_lengths + rows.query_lengths
        last = self.last_token_ids[rows.slots[row_of_token]]
        batch.token_ids[:] = np.where(step.token_ids == LAST_TOKEN, last, step.token_ids) if rows.num_sent else last
        return batch

    def _tables_of(self, rows: Rows) -> Int32Array:
        """Return the block tables of rows, group after group."""
        return self._of_slots[rows.slots].swapaxes(0, 1).reshape(-1, self._of_slots.shape[2])

    def _new_batch(self, rows: Rows) -> StepInput:
        """Return a batch in which only what follows from the rows is filled in, and their block tables."""
        num_tokens = len(rows.row_of_token)
        query_start_loc = np.zeros(len(rows.slots) + 1, np.int32)
        query_start_loc[1:] = rows.query_ends
        adapter_ids = self.adapter_ids[rows.slots]
        return StepInput(
            token_ids=np.empty(num_tokens, np.int32),
            positions=np.empty(num_tokens, np.int32),
            slot_mapping=np.empty(num_tokens * len(self._kv_windows), np.int32),
            query_start_loc=query_start_loc,
            seq_lens=np.empty(len(rows.slots), np.int32),
            block_tables=self._tables_of(rows),
            logits_rows=rows.drawn_tokens.astype(np.int32),
            adapter_ids=adapter_ids[rows.row_of_token] if adapter_ids.any() else None,
        )
