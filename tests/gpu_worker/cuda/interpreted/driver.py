"""Drives an engine with plans as a scheduler makes them: ragged, chunked, preempted, two in flight."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tiny import make_checkpoint

from octavo.gpu_worker.devices.cuda.runner import CudaRunner
from octavo.gpu_worker.devices.reference.device import ReferenceDevice
from octavo.gpu_worker.engine import Engine
from octavo.gpu_worker.loading.loading import load_model
from octavo.gpu_worker.ops import Model
from octavo.gpu_worker.sampling.grammars import Grammars
from octavo.gpu_worker.steps.batch import Limits
from octavo.gpu_worker.steps.host_runner import HostRunner
from octavo.worker.v1 import worker_pb2

VOCABULARY = 320
LIMITS = Limits(max_running=5, max_batch_tokens=32, max_blocks_per_sequence=6, num_blocks=40, vocab_size=VOCABULARY)


def column(*values: float, dtype: str = "<u4") -> bytes:
    return np.array(values, dtype).tobytes()


def load(folder: Path, name: str, dtype: str = "auto", **settings: Any) -> Model:
    make_checkpoint(folder, name, **{"num_hidden_layers": 2, **settings})
    return load_model(folder, dtype, 96, lambda *_: None).model


def cuda_runner(model: Model, limits: Limits = LIMITS, **settings: Any) -> CudaRunner:
    runner = CudaRunner(
        model,
        limits.max_batch_tokens,
        limits.max_running,
        limits.max_blocks_per_sequence,
        device="cpu",
        **settings,
    )
    runner.allocate_kv(limits.num_blocks)
    return runner


def cuda_engine(model: Model, **settings: Any) -> Engine:
    return Engine(cuda_runner(model, **settings), LIMITS, 96)


def reference_engine(model: Model, grammars: Grammars | None = None) -> Engine:
    sizes = (LIMITS.max_running, LIMITS.max_blocks_per_sequence)
    runner = HostRunner(ReferenceDevice(model, LIMITS.max_batch_tokens, *sizes), *sizes, VOCABULARY, grammars)
    runner.allocate_kv(LIMITS.num_blocks)
    return Engine(runner, LIMITS, 96)


@dataclass(eq=False)
class Sequence:
    """A sequence that runs: `tokens` are known, `num_pending` more are sampled by steps in flight."""

    tokens: list[int]
    settings: dict[str, Any]
    num_prompt: int
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_pending: int = 0

    @property
    def length(self) -> int:
        return len(self.tokens) + self.num_pending


class Driver:
    """A scheduler whose decisions follow from a seed alone, so that two engines get the same plans."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine = engine
        self.results: list[worker_pb2.StepResult] = []
        self._random = random.Random(seed)
        self._free_slots = list(range(LIMITS.max_running))
        self._free_blocks = list(range(1, LIMITS.num_blocks))
        self._random.shuffle(self._free_blocks)
        self._running: list[Sequence] = []
        self._in_flight: list[list[Sequence]] = []
        self._plan = worker_pb2.StepPlan()
        self._num_steps = 0

    def open(self, sequence: Sequence) -> None:
        """Give a sequence a slot, in the next plan."""
        sequence.slot = self._free_slots.pop(0)
        self._running.append(sequence)
        update: dict[str, Any] = {"top_p": 1.0, **sequence.settings, "prompt_length": sequence.num_prompt}
        if any(name.endswith("penalty") or name in ("grammar", "sampling") for name in update):
            update["history_token_ids"] = column(*sequence.tokens)
        self._plan.sampling_updates.append(worker_pb2.SamplingUpdate(slot=sequence.slot, **update))

    def share_block(self, writer: Sequence, reader: Sequence) -> None:
        """Give both two blocks, one of which `writer` will fill for both of them."""
        shared, *own = (self._free_blocks.pop(0) for _ in range(3))
        writer.blocks, reader.blocks = ([shared, block] for block in own)
        reader.num_computed = 16
        self._plan.block_table_rows += column(writer.slot, reader.slot)
        self._plan.block_table_counts += column(2, 2)
        self._plan.block_ids += column(*writer.blocks, *reader.blocks)

    def close(self, sequence: Sequence) -> None:
        """Take everything back from a sequence; what is in flight must have been collected."""
        assert not sequence.num_pending
        self._running.remove(sequence)
        self._plan.freed_slots += column(sequence.slot)
        self._free_slots.append(sequence.slot)
        self._free_blocks += sequence.blocks
        sequence.slot, sequence.blocks, sequence.num_computed = -1, [], 0

    def step(self, rows: list[tuple[Sequence, int]]) -> None:
        """Start a plan in which each sequence computes so many tokens; collect what is too many in flight."""
        if self.engine.num_in_flight == 2:
            self.collect()
        self._num_steps += 1
        plan, sampled = self._plan, []
        plan.step_id, plan.num_sequences = self._num_steps, len(rows)
        for sequence, count in rows:
            start, end = sequence.num_computed, sequence.num_computed + count
            num_new = -(-end // 16) - len(sequence.blocks)
            if num_new > 0:
                new, self._free_blocks = self._free_blocks[:num_new], self._free_blocks[num_new:]
                sequence.blocks += new
                plan.block_table_rows += column(sequence.slot)
                plan.block_table_counts += column(num_new)
                plan.block_ids += column(*new)
            flags = (1 if end == sequence.length else 0) | (2 if end > len(sequence.tokens) else 0)
            plan.slot_indexes += column(sequence.slot)
            plan.query_lengths += column(count)
            plan.context_lengths += column(start)
            plan.token_ids += column(*sequence.tokens[start:end])
            plan.row_flags += bytes([flags])
            plan.num_tokens += count
            sequence.num_computed = end
            if flags & 1:
                sequence.num_pending += 1
                sampled.append(sequence)
        self.engine.start(worker_pb2.StepPlan.FromString(plan.SerializeToString()))
        self._in_flight.append(sampled)
        self._plan = worker_pb2.StepPlan()

    def collect(self) -> None:
        """Take the result of the oldest plan."""
        result = self.engine.collect()
        self.results.append(result)
        for sequence, token in zip(self._in_flight.pop(0), np.frombuffer(result.token_ids, "<u4"), strict=True):
            sequence.tokens.append(int(token))
            sequence.num_pending -= 1

    def collect_all(self) -> None:
        while self.engine.num_in_flight:
            self.collect()

    def run(self, settings: list[dict[str, Any]], num_steps: int) -> list[worker_pb2.StepResult]:
        """Run sequences with these settings, some at a time; return all results."""
        waiting = [self._new(update) for update in settings]
        for step in range(num_steps):
            if step % 5 == 4 and self._running:  # one is preempted, and another one ends
                self.collect_all()
                victim = self._random.choice(self._running)
                self.close(victim)
                waiting.insert(0, victim)
                if len(self._running) > 2:
                    self.close(self._running[0])
            while waiting and self._free_slots and self._random.random() < 0.7:
                self.open(waiting.pop(0))
            self.step(self._choose_rows())
        self.collect_all()
        return self.results

    def _choose_rows(self) -> list[tuple[Sequence, int]]:
        budget, rows = LIMITS.max_batch_tokens, []
        for sequence in self._running:
            behind = sequence.length - sequence.num_computed
            count = 1 if behind == 1 else min(self._random.randint(1, 20), behind)
            if count <= budget:
                rows.append((sequence, count))
                budget -= count
        self._random.shuffle(rows)
        return rows

    def _new(self, settings: dict[str, Any]) -> Sequence:
        prompt = [self._random.randrange(VOCABULARY) for _ in range(self._random.randint(1, 40))]
        return Sequence(prompt, settings, len(prompt))
