"""Computes StepPlans: a runner with its KV memory, and the slots of the present epoch."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from octavo.gpu_worker.adapters import Adapters
from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.devices import choose_device, make_runner
from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.loading.loading import LoadedModel, positions_in_reach, vocabulary_reader
from octavo.gpu_worker.ops import Int32Array
from octavo.gpu_worker.protocol import BLOCK_SIZE
from octavo.gpu_worker.sampling.grammars import PATIENCE_S, make_grammars
from octavo.gpu_worker.steps.batch import Limits, Slots
from octavo.gpu_worker.steps.runner import MAX_STEPS_IN_FLIGHT, Outcome, Runner, Running
from octavo.gpu_worker.steps.speculation import Speculation
from octavo.worker.v1 import worker_pb2

if TYPE_CHECKING:  # it needs torch
    from octavo.gpu_worker.distributed.collectives import Collectives

log = logging.getLogger("octavo.worker")

_NO_LIMIT: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
_UINT32 = np.dtype("<u4")
_DEFAULT_MAX_BATCH_TOKENS = 2048
_DEFAULT_MAX_RUNNING = 64
_MIN_CONTEXT = 64


class Engine:
    """Owner of the runner and of the checks of plans. Not thread safe.

    A plan is started, and its result is collected later, in the same order; at most
    MAX_STEPS_IN_FLIGHT are started and not collected.

    step_limit_s  a step that takes longer ends this process, whatever it waits for and with
                  whatever lock held: a device that waits for a rank that is gone can be left in no
                  other way. 0: no limit
    """

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        max_model_len: int,
        step_limit_s: float = 0.0,
        *,
        takes_grammars: bool = False,
        adapters: Adapters | None = None,
    ) -> None:
        self.runner = runner
        self.adapters = Adapters(runner, 0, 0) if adapters is None else adapters
        self.scores_prompts = runner.scores_prompts
        self.limits = limits
        self.max_model_len = max_model_len
        self.takes_grammars = takes_grammars
        self.max_batch_tokens = limits.max_batch_tokens
        self._step_limit_s = step_limit_s
        self._in_flight: deque[_Started] = deque()
        self._slots = Slots(limits, self.adapters.ids)

    def reset(self) -> None:
        """Forget every slot and drop what is in flight; weights and KV memory stay."""
        self._in_flight.clear()
        with self._limited_time():
            self.runner.reset()
            self.adapters.reset()
        self._slots = Slots(self.limits, self.adapters.ids)

    def close(self) -> None:
        """Give back all of the device's memory; nothing else may be called then."""
        self.reset()
        self.runner.close()

    def shrink(self) -> bool:
        """Take at most half as many tokens in a step from now on; False if that would be too few to serve.

        For the device that has run out of memory. What was given up comes back with a new engine only.
        """
        smaller = max(self.max_batch_tokens // 2, self.limits.max_running)
        shrunk, self.max_batch_tokens = smaller < self.max_batch_tokens, smaller
        return shrunk

    def start(self, plan: worker_pb2.StepPlan) -> tuple[tuple[int, str], ...]:
        """Start a plan; return which slots it says something of that cannot be computed, and why.

        Raises PlanError if all of it breaks the contract; other errors are the device's.
        """
        assert self.num_in_flight < MAX_STEPS_IN_FLIGHT, self.num_in_flight
        step = self._slots.apply(plan)
        with self._limited_time():
            self._in_flight.append(_Started(plan.step_id, step.rows.sampled_slots, self.runner.start(step)))
        return step.refused

    @property
    def num_in_flight(self) -> int:
        """Plans that were started and not collected."""
        return len(self._in_flight)

    def is_done(self) -> bool:
        """Tell whether the oldest plan in flight has a result."""
        return bool(self._in_flight) and self._in_flight[0].running.is_done()

    def collect(self) -> worker_pb2.StepResult:
        """Wait for the oldest plan in flight and return its result. Raises what the device raises."""
        started = self._in_flight.popleft()
        with self._limited_time():
            return _result(started.step_id, started.sampled_slots, started.running.wait())

    def use_idle_time(self) -> bool:
        """Prepare a piece of what makes later steps faster; False if there is none left."""
        with self._limited_time():
            return self.runner.use_idle_time()

    def _limited_time(self) -> contextlib.AbstractContextManager[None]:
        """Count the limit, if there is one, in a block; also after it, if anything is in flight then."""
        return self._watch_time() if self._step_limit_s else _NO_LIMIT

    @contextlib.contextmanager
    def _watch_time(self) -> Iterator[None]:
        faulthandler.dump_traceback_later(self._step_limit_s, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            if self._in_flight:
                faulthandler.dump_traceback_later(self._step_limit_s, exit=True)


@dataclass(frozen=True)
class _Started:
    """A plan in flight."""

    step_id: int
    sampled_slots: Int32Array
    running: Running


def make_engine(
    loaded: LoadedModel, config: WorkerConfig, wanted: worker_pb2.WorkerConfig, collectives: Collectives | None = None
) -> Engine:
    """Build the device and allocate its KV cache, within the worker's and the scheduler's limits.

    collectives  the other ranks of the model; all of them must call this together

    Raises ModelError, DeviceError or RankError.
    """
    max_batch_tokens = wanted.max_batch_tokens or _DEFAULT_MAX_BATCH_TOKENS
    max_running = wanted.max_running or _DEFAULT_MAX_RUNNING
    context = loaded.max_model_len
    if loaded.pooling is None:
        model = loaded.model
        context = positions_in_reach(config, choose_device(config.device), context, model.num_layers, model.heads)
    max_blocks_per_sequence = -(-context // BLOCK_SIZE)
    vocab_size = loaded.model.vocab_size
    # Ranks must not differ in what they find late: they wait.
    patience_s = PATIENCE_S if collectives is None else None
    grammars = None
    if loaded.pooling is None:
        grammars = make_grammars(vocabulary_reader(Path(config.model), vocab_size), vocab_size, patience_s)
    speculation = None
    if config.speculative_tokens and wanted.token_counts:
        most = config.speculative_tokens
        speculation = functools.partial(Speculation, max_running, loaded.max_model_len, most, max_batch_tokens)
    runner = make_runner(
        config.device,
        loaded.model,
        max_batch_tokens,
        max_running,
        max_blocks_per_sequence,
        num_threads=config.num_threads,
        kv_cache_dtype=config.kv_cache_dtype,
        quantization=config.quantization,
        dtype=config.dtype,
        collectives=collectives,
        pooling=loaded.pooling,
        grammars=grammars,
        speculation=speculation,
        max_kv_groups=wanted.kv_groups,
    )
    kv_cache_memory = config.kv_cache_memory or runner.kv_memory_bytes()
    if collectives is not None:
        kv_cache_memory = collectives.least(kv_cache_memory)
    block_bytes, num_groups = runner.kv_block_bytes(), len(runner.kv_windows)
    has_cache = block_bytes > 0
    num_blocks = count_blocks(kv_cache_memory, block_bytes, wanted.kv_blocks, num_groups) if has_cache else 1
    runner.allocate_kv(num_blocks)
    if collectives is not None:
        collectives.least(num_blocks)  # no rank begins to compute before all can
    sizes = (max_running, max_batch_tokens, max_blocks_per_sequence, num_blocks, vocab_size)
    limits = Limits(*sizes, pooling=loaded.pooling, has_cache=has_cache, kv_windows=runner.kv_windows)
    room = (num_blocks - 1) * BLOCK_SIZE if has_cache else max_batch_tokens
    if any(runner.kv_windows):  # then the scheduler knows how far they reach
        room = max_blocks_per_sequence * BLOCK_SIZE
    max_model_len = min(loaded.max_model_len, room)
    if max_model_len < loaded.max_model_len:
        what = "kv_cache_memory" if has_cache else "max_batch_tokens"
        log.info("%s limits the context to %d of %d tokens", what, max_model_len, loaded.max_model_len)
    # The collectives' own time-out comes first, where there is a host that waits for them.
    step_limit_s = 2 * config.rank_timeout_s if collectives is not None else 0.0
    takes_grammars = grammars is not None and grammars.prepare()
    takes_adapters = collectives is None and loaded.pooling is None
    adapters = Adapters(runner, config.max_adapters if takes_adapters else 0, config.adapter_memory)
    return Engine(runner, limits, max_model_len, step_limit_s, takes_grammars=takes_grammars, adapters=adapters)


def count_blocks(kv_cache_memory: int, block_bytes: int, wanted: int, num_groups: int = 1) -> int:
    """Return how many blocks there are, block 0 included; raise ModelError if they hold no useful context.

    num_groups  the KV groups, in each of which a sequence has blocks of its own
    """
    num_blocks = kv_cache_memory // block_bytes
    if wanted:
        num_blocks = min(num_blocks, wanted)
    num_tokens = max(num_blocks - 1, 0) // num_groups * BLOCK_SIZE
    if num_tokens < _MIN_CONTEXT:
        least = (_MIN_CONTEXT // BLOCK_SIZE * num_groups + 1) * block_bytes
        raise ModelError(
            f"the KV cache has room for {num_tokens} tokens, too few to be of use: raise "
            f"--kv-cache-memory from {kv_cache_memory} to {least} bytes or more"
            + (f", and the scheduler's kv_blocks from {wanted}" if wanted else "")
        )
    return num_blocks


def _result(step_id: int, sampled_slots: Int32Array, outcome: Outcome) -> worker_pb2.StepResult:
    """Pack a step's tokens into columns."""
    sampled, vectors = outcome.sampled, outcome.vectors
    result = worker_pb2.StepResult(
        step_id=step_id,
        slot_indexes=sampled_slots.astype(_UINT32).tobytes(),
        token_ids=sampled.token_ids.astype(_UINT32).tobytes(),
        forward_us=outcome.forward_us,
        sample_us=outcome.sample_us,
    )
    if outcome.token_counts is not None:
        result.token_counts = outcome.token_counts.astype(_UINT32).tobytes()
    result.guesses.extend(worker_pb2.Guesses(**guesses._asdict()) for guesses in outcome.guesses)
    if len(sampled.logprobs):
        result.logprobs = sampled.logprobs.astype("<f4").tobytes()
        result.ranks = sampled.ranks.astype(_UINT32).tobytes()
        result.candidate_token_ids = sampled.candidate_token_ids.astype(_UINT32).tobytes()
        result.candidate_logprobs = sampled.candidate_logprobs.astype("<f4").tobytes()
    if vectors is not None:
        result.vectors = vectors.values.astype("<f4").tobytes()
        result.vector_sizes = vectors.sizes.astype(_UINT32).tobytes()
    return result
