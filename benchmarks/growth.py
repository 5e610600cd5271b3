"""Measure what the scheduler's operations cost as what it knows of grows.

    python benchmarks/growth.py [--only WORD]

Prints, for each operation, microseconds of CPU with 10, 100, 1,000 and 10,000 of something: requests
that wait, tenants that wait, tenants that were served before, blocks in the cache, tenants with blocks there,
finished requests that are kept. The last column is the last figure divided by the first. The core runs alone,
with 64 running sequences; times are medians.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import time
from array import array
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from octavo.admin.v1 import admin_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.admin import AdminServicer
from octavo.services.scheduler.config import SchedulerConfig
from octavo.services.scheduler.core.effects import SendPlan
from octavo.services.scheduler.core.scheduler import Scheduler
from octavo.services.scheduler.groups.worker_group import GroupLimits
from octavo.services.scheduler.kv_cache.block_pool import BlockPool
from octavo.services.scheduler.kv_cache.cache_events import CacheEvents
from octavo.services.scheduler.kv_cache.free_blocks import Block
from octavo.services.scheduler.queueing.policy import ShortestFirst
from octavo.worker.v1 import worker_pb2

SIZES = (10, 100, 1_000, 10_000)
NUM_RUNNING = 64
NUM_REPEATS = 50
TICK_S = 0.025

Seconds = Iterator[float]
"""What an operation took, each time it was repeated."""


def cpu_s(operation: Callable[[], object]) -> float:
    """Return the CPU time of a call."""
    started = time.process_time_ns()
    operation()
    return 1e-9 * (time.process_time_ns() - started)


class Core:
    """A scheduler with running and waiting requests, and a worker that answers any tokens."""

    def __init__(self, num_waiting: int = 0, num_tenants: int = 1, **settings: Any) -> None:
        self.now = 100.0
        self.num_submitted = 0
        self.plans: list[worker_pb2.StepPlan] = []
        limits = {"max_waiting": 1 << 20, "max_waiting_tokens": 1 << 30, **settings}
        self.core = Scheduler(SchedulerConfig(max_num_seqs=NUM_RUNNING, **limits), self.now)
        self.core.worker_joined("group", 1, GroupLimits(NUM_RUNNING * 64, 1 << 14), self.now)
        for number in range(NUM_RUNNING):
            self.submit(f"tenant {number % num_tenants}", max_new_tokens=900)
        for _ in range(4):
            self.step()
        for number in range(num_waiting):
            self.submit(f"tenant {number % num_tenants}")

    def submit(self, tenant: str, max_new_tokens: int = 8, **fields: Any) -> scheduler_pb2.Submit:
        """Submit a request of 24 tokens."""
        self.num_submitted += 1
        submit = scheduler_pb2.Submit(
            handle=self.num_submitted,
            request_id=f"request {self.num_submitted}",
            prompt_token_ids=[self.num_submitted % 50_000 + 1] * 24,
            tenant=tenant,
            stop={"max_new_tokens": max_new_tokens},
            **fields,
        )
        self.core.submit("gateway", submit, self.now)
        return submit

    def schedule(self) -> None:
        """Plan what can be planned."""
        self.core.schedule(self.now)
        self.plans += [effect.plan for effect in self.core.take_effects() if isinstance(effect, SendPlan)]

    def step(self) -> None:
        """Plan, and answer the oldest plan."""
        self.schedule()
        self.answer()

    def answer(self) -> None:
        """Answer the oldest plan."""
        if self.plans:
            self.now += 0.01
            plan = self.plans.pop(0)
            sampled = sum(flags & 1 for flags in plan.row_flags)
            tokens = array("I", [5] * sampled).tobytes()
            result = worker_pb2.StepResult(step_id=plan.step_id, slot_indexes=plan.slot_indexes, token_ids=tokens)
            self.core.step_done("group", result, self.now)
            self.core.take_effects()


def plan(core: Core) -> Seconds:
    """Plan steps in which one running request ends, and one that waits begins."""
    for handle in range(1, 9):
        core.answer()
        core.core.cancel("gateway", scheduler_pb2.Cancel(handle=handle), core.now)
        yield cpu_s(core.schedule)


def admit(core: Core) -> Seconds:
    for number in range(NUM_REPEATS):
        yield cpu_s(lambda number=number: core.submit(f"new tenant {number}"))  # type: ignore[misc]


def admit_by_deadline(core: Core) -> Seconds:
    for number in range(NUM_REPEATS):
        yield cpu_s(lambda number=number: core.submit(f"new tenant {number}", remaining_ms=600_000))  # type: ignore[misc]


def refuse(core: Core) -> Seconds:
    for number in range(NUM_REPEATS):
        yield cpu_s(lambda number=number: core.submit(f"tenant {number}", remaining_ms=20))  # type: ignore[misc]


def cancel(core: Core) -> Seconds:
    """Cancel requests that wait."""
    for handle in range(core.num_submitted - 9, core.num_submitted + 1):
        message = scheduler_pb2.Cancel(handle=handle)
        yield cpu_s(lambda message=message: core.core.cancel("gateway", message, core.now))  # type: ignore[misc]


def cancel_by_id(core: Core) -> Seconds:
    for number in range(core.num_submitted - 9, core.num_submitted + 1):
        message = scheduler_pb2.Cancel(request_id=f"request {number}")
        yield cpu_s(lambda message=message: core.core.cancel("gateway", message, core.now))  # type: ignore[misc]


def tick(core: Core) -> Seconds:
    """Look at the time, with a report due for one request that waits."""
    core.submit("tenant 0", progress_interval_ms=1)
    for _ in range(NUM_REPEATS):
        core.now += TICK_S
        yield cpu_s(lambda: core.core.tick(core.now))
        core.core.take_effects()


def load(core: Core) -> Seconds:
    for _ in range(NUM_REPEATS):
        yield cpu_s(lambda: core.core.load(core.now))


def list_requests(core: Core) -> Seconds:
    """List the ten oldest requests."""
    admin = AdminServicer(SimpleNamespace(core=core.core), SchedulerConfig())  # type: ignore[arg-type]
    request = admin_pb2.ListRequestsRequest(max_requests=10)

    async def timed() -> float:
        started = time.process_time_ns()
        await admin.ListRequests(request, None)
        return 1e-9 * (time.process_time_ns() - started)

    for _ in range(NUM_REPEATS):
        yield asyncio.run(timed())


def take_block(pool: BlockPool) -> Seconds:
    """Give out blocks when the cache is full, and take them back with other content, as tenants come in turn."""
    owners = sorted({block.owner for block in pool._blocks[1:]})
    number = len(pool._blocks)
    for each in range(1000):
        taken: list[Block] = []
        took_s = cpu_s(lambda taken=taken: taken.extend(pool.get_new_blocks(1)))  # type: ignore[misc]
        number += 1
        pool.cache_full_block(taken[0], number.to_bytes(32, "little"), owners[each % len(owners)])
        yield took_s + cpu_s(lambda taken=taken: pool.free_blocks(taken))  # type: ignore[misc]


def place(core: Core) -> Seconds:
    """Choose between two groups for a prompt of 4,096 tokens, half of which one of them has cached."""
    core.core.worker_joined("other group", 2, GroupLimits(NUM_RUNNING * 64, 1 << 14), core.now)
    groups, policy = core.core._groups, ShortestFirst(0.0)
    submit = scheduler_pb2.Submit(handle=1 << 20, prompt_token_ids=range(4096), stop={"max_new_tokens": 1})
    core.core.submit("other gateway", submit, core.now)
    request = core.core._requests.get("other gateway", 1 << 20)
    assert request is not None
    seq, pool = request.sequences[0], groups["other group"].pool
    groups["other group"].allocator.get_computed_blocks(seq)  # which names its blocks
    for block, name in zip(pool.get_new_blocks(128), seq.block_hashes, strict=False):
        pool.cache_full_block(block, name, "tenant 0")
    for _ in range(NUM_REPEATS):
        ahead = {group: group.num_uncomputed_tokens() for group in groups.values()}
        yield cpu_s(lambda ahead=ahead: policy.choose_group(seq, groups.values(), ahead))  # type: ignore[misc]


def waiting(n: int) -> Core:
    return Core(n)


def waiting_tenants(n: int) -> Core:
    return Core(n, n)


def full(n: int) -> Core:
    return Core(n, max_waiting=n)


def full_of_tenants(n: int) -> Core:
    return Core(n, n, max_waiting=n)


def past_tenants(n: int) -> Core:
    """Tenants that had something, and have nothing now; and ten that wait."""
    core = Core()
    for number in range(n):
        submit = core.submit(f"past tenant {number}", max_new_tokens=1)
        core.core.cancel("gateway", scheduler_pb2.Cancel(handle=submit.handle), core.now)
    for number in range(10):
        core.submit(f"tenant {number}")
    return core


def kept(n: int) -> Core:
    """Finished requests that can still be resumed; and ten that wait."""
    core = Core()
    for _ in range(n):
        core.submit("tenant 0", resume_window_ms=600_000, continue_token_ids=[1] * 8)  # has all its tokens already
    for _ in range(10):
        core.submit("tenant 0")
    core.core.take_effects()
    return core


def cached(n: int, num_tenants: int = 1) -> BlockPool:
    pool = BlockPool(n + 1, CacheEvents(), {})
    blocks = pool.get_new_blocks(n)
    for number, block in enumerate(blocks):
        pool.cache_full_block(block, number.to_bytes(32, "little"), f"tenant {number % num_tenants}")
    pool.free_blocks(blocks)
    return pool


def cached_by_tenants(n: int) -> BlockPool:
    return cached(2 * n, n)


OPERATIONS: list[tuple[str, str, Callable[[int], Any], Callable[[Any], Seconds]]] = [
    ("plan a step", "waiting", waiting, plan),
    ("plan a step", "waiting tenants", waiting_tenants, plan),
    ("plan a step", "past tenants", past_tenants, plan),
    ("plan a step", "finished kept", kept, plan),
    ("admit", "waiting", waiting, admit),
    ("admit", "waiting tenants", waiting_tenants, admit),
    ("admit", "past tenants", past_tenants, admit),
    ("admit", "finished kept", kept, admit),
    ("admit in time", "waiting", waiting, admit_by_deadline),
    ("admit in time", "waiting tenants", waiting_tenants, admit_by_deadline),
    ("admit in time", "past tenants", past_tenants, admit_by_deadline),
    ("refuse", "waiting", full, refuse),
    ("refuse", "waiting tenants", full_of_tenants, refuse),
    ("cancel", "waiting", waiting, cancel),
    ("cancel", "waiting tenants", waiting_tenants, cancel),
    ("cancel by id", "waiting", waiting, cancel_by_id),
    ("tick", "waiting", waiting, tick),
    ("tick", "waiting tenants", waiting_tenants, tick),
    ("tick", "finished kept", kept, tick),
    ("report the load", "waiting", waiting, load),
    ("report the load", "waiting tenants", waiting_tenants, load),
    ("list 10 requests", "waiting", waiting, list_requests),
    ("evict a block", "cached blocks", cached, take_block),
    ("evict a block", "caching tenants", cached_by_tenants, take_block),
    ("place a request", "waiting", waiting, place),
]


def measure(setup: Callable[[int], Any], operation: Callable[[Any], Seconds], n: int) -> float:
    """Return the microseconds of CPU that an operation takes with `n` of something."""
    prepared = setup(n)
    gc.collect()
    gc.disable()
    try:
        return 1e6 * statistics.median(operation(prepared))
    finally:
        gc.enable()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="operations with this word in their line")
    options = parser.parse_args()
    print(f"{'microseconds of CPU':<18} {'with so many':<16}" + "".join(f"{n:>10,}" for n in SIZES) + "    growth")
    for name, axis, setup, operation in OPERATIONS:
        if options.only in f"{name} {axis}":
            times = [measure(setup, operation, n) for n in SIZES]
            figures = "".join(f"{each:10.1f}" for each in times)
            print(f"{name:<18} {axis:<16}{figures}{times[-1] / times[0]:9.1f}x", flush=True)


if __name__ == "__main__":
    main()
