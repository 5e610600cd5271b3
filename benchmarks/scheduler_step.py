"""Time one step of the scheduler: plan and digest, with many decoding sequences.

    python benchmarks/scheduler_step.py [--running 256] [--steps 2000]

Prints the median and the 99th percentile of planning a step, digesting its result, and both, in
microseconds of wall time. The worker is answered with random tokens that end nothing.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from array import array

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.config import SchedulerConfig
from octavo.services.scheduler.core.effects import SendPlan
from octavo.services.scheduler.core.scheduler import Scheduler
from octavo.services.scheduler.groups.worker_group import GroupLimits
from octavo.worker.v1 import worker_pb2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    rng = random.Random(0)
    blocks_each = (options.steps + 256) // 16 + 2
    core = Scheduler(SchedulerConfig(max_num_seqs=options.running, max_num_batched_tokens=8192), now=0.0)
    core.worker_joined("group", 1, GroupLimits(options.running * blocks_each + 1, 1 << 20), now=0.0)
    for handle in range(options.running):
        submit = scheduler_pb2.Submit(
            handle=handle + 1,
            request_id=str(handle),
            prompt_token_ids=[rng.randrange(1, 50_000) for _ in range(128)],
            stop={"max_new_tokens": options.steps + 64},
            end_of_sequence_ids=[0],
        )
        core.submit(f"gateway-{handle % 2}", submit, now=0.0)
    plans: list[worker_pb2.StepPlan] = []
    plan_us, digest_us = [], []
    gc.collect()
    gc.freeze()
    for step in range(options.steps):
        now = float(step)
        started = time.perf_counter()
        core.schedule(now)
        effects = core.take_effects()
        planned = time.perf_counter()
        plans += [effect.plan for effect in effects if isinstance(effect, SendPlan)]
        plan = plans.pop(0)
        sampled = sum(flags & 1 for flags in plan.row_flags)
        result = worker_pb2.StepResult(
            step_id=plan.step_id,
            slot_indexes=plan.slot_indexes,
            token_ids=array("I", [rng.randrange(1, 50_000) for _ in range(sampled)]).tobytes(),
        )
        begun = time.perf_counter()
        core.step_done("group", result, now)
        core.take_effects()
        digested = time.perf_counter()
        if plan.num_sequences == options.running == plan.num_tokens:
            plan_us.append(1e6 * (planned - started))
            digest_us.append(1e6 * (digested - begun))
    both = [a + b for a, b in zip(plan_us, digest_us, strict=True)]
    print(f"{options.running} running sequences, {len(both)} steps, microseconds: median (99th percentile)")
    for name, values in (("plan", plan_us), ("digest", digest_us), ("plan + digest", both)):
        print(f"  {name:14} {statistics.median(values):7.1f} ({statistics.quantiles(values, n=100)[98]:.1f})")


if __name__ == "__main__":
    main()
