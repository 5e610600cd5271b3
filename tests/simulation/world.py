"""Runs one seed: the real Node among simulated processes, and checks everything after every event."""

from __future__ import annotations

import functools
import heapq
import logging
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from octavo.common.v1 import common_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.config import SchedulerConfig
from octavo.services.scheduler.effects import SendToGateway
from octavo.services.scheduler.node import Node
from octavo.services.scheduler.scheduler import Scheduler
from octavo.worker.v1 import worker_pb2
from tests.services.scheduler.simulation import expected_output

from .gateway import Call, SimGateway
from .swarm import Event, Swarm
from .worker import POISON, Network, SimWorker

TICK_S = 0.1
PATIENCE_S = 120.0  # after the last fault everything must have ended
MAX_EVENTS = 50_000

# Why a call may end without being finished, and what must have happened for it.
LEGITIMATE = {
    "cancelled": "cancel",
    "TAKEN_OVER": "resume_again",
    "broken": "gateway_death",
    "QUARANTINED": "",
    "WORKER_FAULT": "not_finite",
    "QUEUE_TIMEOUT": "deadline",
    "GENERATION_TIMEOUT": "deadline",
    "DEADLINE_UNREACHABLE": "deadline",
    "KV_CAPACITY_EXCEEDED": "",
    "QUEUE_FULL": "",
    "QUOTA_EXCEEDED": "",
    "DRAINING": "drain",
    "NO_WORKERS": "",
    "UNAVAILABLE": "",
}


class World:
    """Time, events, and the processes of one seed. `counts` says which faults and paths were met."""

    def __init__(self, swarm: Swarm) -> None:
        self.swarm = swarm
        self.now = 1000.0
        self.start = self.now
        self.healed = False
        self.counts: Counter[str] = Counter()
        self.num_events = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0
        self.config = SchedulerConfig(**swarm.settings)
        self.network = Network(self)
        self.spoiled = False
        self.calls: list[Call] = []
        self.epoch = 0
        self.is_up = False
        self.node: Node
        rng = random.Random(swarm.seed)
        self.prefixes = [[rng.randrange(10, 40_000) for _ in range(length)] for length in (16, 40)]
        self._expected: dict[int, list[int]] = {}
        self.gateways = [SimGateway(self, f"gateway-{n}") for n in range(swarm.num_gateways)]
        self._start_scheduler()
        self.workers = [SimWorker(self, f"worker-{n}") for n in range(swarm.num_workers)]
        self._by_identity = {worker.identity: worker for worker in self.workers}
        self.after(0.0, self._tick)
        for event in swarm.script:
            self.at(self.start + event.at, self._act, event)
        self.at(self.start + swarm.faults_end, self._heal)

    # -- time ------------------------------------------------------------------------------------

    def at(self, time: float, action: Callable[..., None], *arguments: Any) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (time, self._sequence, action, arguments))

    def after(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        self.at(self.now + delay_s, action, *arguments)

    def count(self, what: str) -> None:
        self.counts[what] += 1

    def run(self) -> None:
        """Run until everything has ended; AssertionError if something is wrong or does not end."""
        while not (self.healed and self.node.core.is_idle and all(call.ending for call in self.calls)):
            self.now, _, action, arguments = heapq.heappop(self._heap)
            action(*arguments)
            self.num_events += 1
            if self.now > self.start + self.swarm.faults_end + PATIENCE_S or self.num_events > MAX_EVENTS:
                stuck = [call.submit.request_id for call in self.calls if not call.ending]
                raise AssertionError(f"does not end: {stuck}, {list(self.node.core.requests())}")
        self._check_end()

    def _tick(self) -> None:
        self.after(TICK_S, self._tick)
        self.node.tick(self.now)
        self._pump()

    def _pump(self, has_news: bool = True) -> None:
        """Plan and deliver, and check the books if they can have changed."""
        num_plans = self.node.num_plans
        self.node.pump(self.now)
        if not has_news and self.node.num_plans == num_plans:
            return
        core = self.node.core
        core.check_invariants()
        salts: dict[tuple[int, int], str] = {}
        for request in core.requests():
            for seq in request.sequences:
                for block in seq.blocks:
                    if block.ref_count > 1:
                        salt = salts.setdefault((id(seq.group), block.id), request.submit.cache_salt)
                        assert salt == request.submit.cache_salt, f"block {block.id} is shared by two tenants"

    # -- hops ------------------------------------------------------------------------------------

    def _start_scheduler(self) -> None:
        self.epoch += 1
        self.is_up = True
        self.node = Node(
            self.config, "scheduler", self.epoch, self.now,
            send=self._to_worker, deliver=self._to_gateway, changed=lambda: None, fenced=self._on_fenced,
        )  # fmt: skip
        setattr(self.node.core, "worker_lost", functools.partial(self._on_worker_lost, self.node.core))  # noqa: B010
        for gateway in self.gateways:
            self.after(0.01, gateway.connect)

    def _to_worker(self, identity: bytes, frame: worker_pb2.WorkerFrame) -> bool:
        worker = self._by_identity[identity]
        if not worker.is_alive:
            return False
        life = worker.life
        self.network.carry(worker, lambda: worker.receive(life, frame), to_worker=True)
        return True

    def from_worker(self, worker: SimWorker, frame: worker_pb2.WorkerFrame) -> None:
        if self.is_up:
            self.node.on_frame(worker.identity, frame, self.now)
            self._pump(has_news=not frame.HasField("heartbeat"))

    def _to_gateway(self, effect: SendToGateway) -> None:
        gateway = next(gateway for gateway in self.gateways if gateway.name == effect.gateway_id)
        self.after(0.001, gateway.receive, gateway.connection, effect.message)

    def to_scheduler(self, gateway: SimGateway, message: scheduler_pb2.AttachRequest) -> None:
        self.after(0.001, self._from_gateway, gateway, gateway.connection, message)

    def _from_gateway(self, gateway: SimGateway, connection: int, message: scheduler_pb2.AttachRequest) -> None:
        if gateway.connection == connection:
            self.node.on_gateway_message(gateway.name, message, self.now)
            self._pump()

    def _on_worker_lost(self, core: Scheduler, group_id: str, now: float, crashed: bool = False) -> None:
        group = core._groups[group_id]
        self.counts["lost while settling"] += any(seq.group is group for seq in core._states.settling())
        Scheduler.worker_lost(core, group_id, now, crashed)

    def _on_fenced(self, worker_id: str, reason: str) -> None:
        self.count("fenced: out of order" if "out of order" in reason else "fenced: " + reason.split(":")[0])

    # -- the script ------------------------------------------------------------------------------

    def _act(self, event: Event) -> None:
        self.count(event.action)
        getattr(self, "_do_" + event.action)(random.Random(event.number))

    def _heal(self) -> None:
        """Faults stop: whoever is down or cut off comes back."""
        self.healed = True
        for worker in self.workers:
            worker.partitioned_until = worker.slow_until = 0.0
            worker.spoil_next = False

    def _do_submit(self, rng: random.Random) -> None:
        prompt = rng.choice([[], *self.prefixes]) + [rng.randrange(10, 40_000) for _ in range(rng.randrange(1, 30))]
        if self.swarm.poison and self.counts["submit"] == 1:
            prompt[-1] = POISON
        submit = scheduler_pb2.Submit(
            request_id=f"r{len(self.calls)}",
            prompt_token_ids=prompt,
            sampling={"seed": rng.randrange(1000)},  # type: ignore[arg-type]
            stop={"max_new_tokens": rng.choice(self.swarm.outputs)},  # type: ignore[arg-type]
            candidate_count=rng.choice([1, 1, 1, 3]),
            remaining_ms=rng.choice([0, 0, 0, 300]),
            priority=rng.choice([0, 0, 1]),
            tenant=(tenant := rng.choice(["", "x"])),
            cache_salt=tenant,
            resume_window_ms=rng.choice([0, 5000]),
            bypass_prefix_cache=rng.random() < 0.1,
            end_of_sequence_ids=[expected_output(prompt, 9)[-1]],
        )
        submit.chosen_logprob = rng.random() < 0.3
        submit.logprobs = rng.choice([0, 2]) if submit.chosen_logprob else 0
        self.counts["deadline"] += bool(submit.remaining_ms)
        call = Call(submit, self.gateways[rng.randrange(len(self.gateways))])
        self.calls.append(call)
        call.gateway.submit(call)

    def _do_cancel(self, rng: random.Random) -> None:
        live = [call for call in self.calls if not call.ending]
        if live:
            call = rng.choice(live)
            call.gateway.cancel(call)

    def _do_cancel_early(self, rng: random.Random) -> None:
        """A cancel that overtakes its submit, and one of a request that never was."""
        self.count("cancel")
        gateway = rng.choice(self.gateways)
        gateway.num_handles += 1
        cancel = scheduler_pb2.Cancel(handle=gateway.num_handles)
        self.to_scheduler(gateway, scheduler_pb2.AttachRequest(cancel=cancel))
        self._do_submit(rng)
        call = self.calls[-1]
        if not call.ending:
            call.gateway.cancel(call)

    def _do_worker_crash(self, rng: random.Random) -> None:
        rng.choice(self.workers).die(restart_s=rng.choice([0.02, 0.3]))

    def _do_worker_hang(self, rng: random.Random) -> None:
        rng.choice(self.workers).hangs_until = self.now + rng.choice([0.5, 3.0, 8.0])

    def _do_worker_slow(self, rng: random.Random) -> None:
        rng.choice(self.workers).slow_until = self.now + 0.5

    def _do_worker_fault(self, rng: random.Random) -> None:
        rng.choice(self.workers).fault(rng.choice(["OUT_OF_MEMORY", "DEVICE_FAULT"]))

    def _do_partition(self, rng: random.Random) -> None:
        rng.choice(self.workers).partitioned_until = self.now + rng.choice([0.1, 0.5, 4.0])

    def _do_not_finite(self, rng: random.Random) -> None:
        rng.choice(self.workers).spoil_next = True

    def _do_stream_break(self, rng: random.Random) -> None:
        gateway = rng.choice(self.gateways)
        if gateway.connection:
            self.node.gateway_lost(gateway.name, self.now)
            gateway.disconnect()
            self._pump()

    def _do_gateway_death(self, rng: random.Random) -> None:
        """A gateway process dies: clients with a resume window come back through another one."""
        gateway = rng.choice(self.gateways)
        calls = [call for call in self.calls if call.gateway is gateway and not call.ending]
        if gateway.connection:
            self.node.gateway_lost(gateway.name, self.now)
            self._pump()
        gateway.die()
        for call in calls:
            wanted = tuple(index for index in call.candidates if index not in call.finished)
            call.handles.clear()
            if call.submit.resume_window_ms and call.admitted:
                call.gateway = self.gateways[-1]
                self.after(0.05, self.gateways[-1].resume, call, wanted)
            else:
                call.end("broken")

    def _do_resume_again(self, rng: random.Random) -> None:
        """A client asks for all of an output in a second call, while the first one may still go on."""
        kept = [
            call for call in self.calls
            if call.submit.resume_window_ms and call.admitted and call.epoch == self.epoch
            and call.ending in ("", "finished", "broken")
        ]  # fmt: skip
        if kept:
            first = rng.choice(kept)
            call = Call(first.submit, rng.choice(self.gateways), admitted=True, epoch=first.epoch)
            self.calls.append(call)
            call.gateway.resume(call, tuple(call.candidates))

    def _do_scheduler_restart(self, rng: random.Random) -> None:
        self.is_up = False
        for gateway in self.gateways:
            if gateway.connection:
                gateway.disconnect()
        self.node.core.take_effects()
        self._count_preemptions()
        self._start_scheduler()

    def _do_drain(self, rng: random.Random) -> None:
        self.node.core.drain()
        self.after(0.2, self._do_scheduler_restart, rng)

    def _do_flush(self, rng: random.Random) -> None:
        self.node.core.flush_prefix_cache()
        self._pump()

    # -- what must hold --------------------------------------------------------------------------

    def expected(self, call: Call, index: int) -> list[int]:
        """What the fake model makes of a request, computed alone."""
        submit = call.submit
        key = hash((call.submit.request_id, index))
        if key not in self._expected:
            self._expected[key] = expected_output(
                list(submit.prompt_token_ids),
                submit.stop.max_new_tokens,
                submit.sampling.seed,
                index,
                eos=submit.end_of_sequence_ids[0],
            )
        return self._expected[key]

    def check_tokens(self, call: Call, index: int) -> None:
        """A client has seen a prefix of what the model makes, whatever happened."""
        tokens, expected = call.tokens[index], self.expected(call, index)
        assert tokens == expected[: len(tokens)], f"{call.submit.request_id}/{index}: wrong, lost or repeated tokens"

    def _count_preemptions(self) -> None:
        self.counts["preemption"] += self.node.core.load(self.now).preemptions

    def _check_end(self) -> None:
        self._count_preemptions()
        load = self.node.core.load(self.now)
        assert load.kv_blocks_free == load.kv_blocks_total, "blocks are lost"
        for call in self.calls:
            name = call.submit.request_id
            if call.ending == "finished":
                for index, finished in call.finished.items():
                    is_whole = finished.reason != common_pb2.FINISH_REASON_CONTEXT_LIMIT
                    assert not is_whole or call.tokens[index] == self.expected(call, index), f"{name} ended early"
            else:
                assert call.ending in LEGITIMATE, f"{name} ended with {call.ending}"
                cause = LEGITIMATE[call.ending]
                assert not cause or self.counts[cause], f"{name} ended with {call.ending} without a {cause}"
            if call.ending == "QUARANTINED":
                died = (
                    "worker_crash",
                    "worker_hang",
                    "worker_fault",
                    "partition",
                    "lost frame",
                    "worker_slow",
                    "reordered frame",
                )
                innocent = POISON not in call.submit.prompt_token_ids
                assert not innocent or any(self.counts[fault] for fault in died), f"{name} was blamed for nothing"


def quiet() -> None:
    """Keep the log of thousands of lost workers to ourselves."""
    logging.getLogger("octavo.scheduler").setLevel(logging.CRITICAL)
