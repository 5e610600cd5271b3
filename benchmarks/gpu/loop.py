"""The real scheduler core and a worker's engine in one process: every step of a server but for the transport."""

from __future__ import annotations

import random
import sys
import time
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType

from octavo.gpu_worker.engine import Engine
from octavo.gpu_worker.loading.loading import LoadedModel
from octavo.gpu_worker.protocol import BLOCK_SIZE
from octavo.gpu_worker.steps.batch import Limits
from octavo.gpu_worker.steps.runner import MAX_STEPS_IN_FLIGHT, Runner
from octavo.scheduler.v1 import scheduler_pb2
from octavo.worker.v1 import worker_pb2


def provide_status_codes() -> None:
    """Stand in for googleapis-common-protos where it is not installed: all that is used of it is the codes' numbers."""
    try:
        import google.rpc.code_pb2
    except ImportError:
        import google
        import grpc

        rpc, codes = ModuleType("google.rpc"), ModuleType("google.rpc.code_pb2")
        for code in grpc.StatusCode:
            setattr(codes, code.name, code.value[0])
        rpc.code_pb2 = codes  # type: ignore[attr-defined]
        google.rpc = rpc  # type: ignore[attr-defined]
        sys.modules.update({"google.rpc": rpc, "google.rpc.code_pb2": codes})


provide_status_codes()

from octavo.services.scheduler.config import SchedulerConfig  # noqa: E402 - after the codes are there
from octavo.services.scheduler.core.effects import SendPlan, SendToGateway  # noqa: E402
from octavo.services.scheduler.core.scheduler import Scheduler  # noqa: E402
from octavo.services.scheduler.groups.worker_group import GroupLimits  # noqa: E402

MAX_BATCH_TOKENS = 8192


def make_engine(
    runner: Runner, loaded: LoadedModel, max_running: int, max_batch_tokens: int, num_blocks: int
) -> Engine:
    """Allocate the cache of a runner and capture its graphs; return the engine."""
    runner.allocate_kv(num_blocks)
    per_sequence = -(-loaded.max_model_len // BLOCK_SIZE)
    limits = Limits(max_running, max_batch_tokens, per_sequence, num_blocks, loaded.model.vocab_size)
    return Engine(runner, limits, loaded.max_model_len)


def request(handle: int, prompt: Sequence[int], num_new: int, **sampling: float) -> scheduler_pb2.Submit:
    """Return a request for exactly `num_new` tokens; greedy unless `sampling` says otherwise."""
    settings = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": handle}
    return scheduler_pb2.Submit(
        handle=handle,
        request_id=str(handle),
        prompt_token_ids=prompt,
        sampling={**settings, **sampling},
        stop={"max_new_tokens": num_new},
        candidate_count=1,
        bypass_prefix_cache=True,
    )


def requests_of(vocab_size: int, batch: int, context: int, num_new: int) -> list[scheduler_pb2.Submit]:
    """Return requests with random prompts whose decodes lie around `context`."""
    rng = random.Random(0)
    length = context - num_new // 2
    prompts = [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(batch)]
    return [request(handle, prompt, num_new) for handle, prompt in enumerate(prompts, start=1)]


@dataclass
class Trace:
    """What happened: the plans, when each one's result came, the scheduler's own time for it, and the tokens."""

    plans: list[worker_pb2.StepPlan] = field(default_factory=list)
    ended_at: list[float] = field(default_factory=list)
    scheduler_us: list[float] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=dict)

    def decode_us(self, batch: int) -> list[float]:
        """Return the time from result to result of the steps that decode all of `batch` sequences and nothing else."""
        times = []
        for index in range(1, len(self.ended_at)):
            both = self.plans[index - 1 : index + 1]
            if all(plan.num_tokens == plan.num_sequences == batch for plan in both):
                times.append((self.ended_at[index] - self.ended_at[index - 1]) * 1e6)
        return times


def serve(engine: Engine, requests: Sequence[scheduler_pb2.Submit]) -> Trace:
    """Run requests to their end."""
    core = _core(engine)
    for submit in requests:
        core.submit("gateway", submit, now=time.monotonic())
    trace = Trace()
    spent = 0.0
    while core.num_requests:
        started = time.perf_counter()
        core.schedule(time.monotonic())
        plans = _deliver(core, trace)
        spent += time.perf_counter() - started
        for plan in plans:
            trace.plans.append(plan)
            engine.start(plan)
        assert engine.num_in_flight, "the scheduler has requests and plans nothing"
        result = engine.collect()
        trace.ended_at.append(time.perf_counter())
        core.step_done("group", result, time.monotonic())
        _deliver(core, trace)
        trace.scheduler_us.append((spent + time.perf_counter() - trace.ended_at[-1]) * 1e6)
        spent = 0.0
    return trace


def plans_of(engine: Engine, requests: Sequence[scheduler_pb2.Submit]) -> list[worker_pb2.StepPlan]:
    """Return the plans that the scheduler makes for `requests`, without computing them."""
    core = _core(engine)
    for submit in requests:
        core.submit("gateway", submit, now=0.0)
    made: list[worker_pb2.StepPlan] = []
    waiting: deque[worker_pb2.StepPlan] = deque()
    while core.num_requests:
        core.schedule(0.0)
        waiting += _deliver(core, Trace())
        plan = waiting.popleft()
        made.append(plan)
        sampled = sum(flags & 1 for flags in plan.row_flags)
        rows = array("I", plan.slot_indexes)
        slots = [slot for slot, flags in zip(rows, plan.row_flags, strict=True) if flags & 1]
        result = worker_pb2.StepResult(
            step_id=plan.step_id,
            slot_indexes=array("I", slots).tobytes(),
            token_ids=array("I", [5] * sampled).tobytes(),
        )
        core.step_done("group", result, 0.0)
        waiting += _deliver(core, Trace())
    return made


def replay(engine: Engine, plans: Sequence[worker_pb2.StepPlan]) -> Trace:
    """Compute plans that were made beforehand, as fast as the engine takes them."""
    trace = Trace(plans=list(plans))
    for plan in plans:
        if engine.num_in_flight == MAX_STEPS_IN_FLIGHT:
            engine.collect()
            trace.ended_at.append(time.perf_counter())
        engine.start(plan)
    while engine.num_in_flight:
        engine.collect()
        trace.ended_at.append(time.perf_counter())
    return trace


def _core(engine: Engine) -> Scheduler:
    limits = engine.limits
    config = SchedulerConfig(
        max_num_seqs=limits.max_running,
        max_num_batched_tokens=limits.max_batch_tokens,
        max_prefill_tokens=limits.max_batch_tokens,
    )
    core = Scheduler(config, now=0.0)
    core.worker_joined("group", 1, GroupLimits(limits.num_blocks, engine.max_model_len), now=0.0)
    return core


def _deliver(core: Scheduler, trace: Trace) -> list[worker_pb2.StepPlan]:
    """Take the scheduler's effects: tokens to the trace; return the plans."""
    plans = []
    for effect in core.take_effects():
        if isinstance(effect, SendPlan):
            plans.append(effect.plan)
        elif isinstance(effect, SendToGateway):
            message = effect.message
            kind = message.WhichOneof("kind")
            assert kind not in ("rejected", "failed"), message
            if kind == "step_outputs":
                for handle, token in zip(message.step_outputs.handles, message.step_outputs.token_ids, strict=True):
                    trace.tokens.setdefault(handle, []).append(token)
    return plans
