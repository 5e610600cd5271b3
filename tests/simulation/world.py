"""Runs one seed: the real Node among simulated processes, and checks what they see and what the Node remembers.

What clients see is checked after every event; the scheduler's books after as many as the seed says, and at the end.
"""

from __future__ import annotations

import functools
import heapq
import logging
import random
from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any

from octavo.common.v1 import common_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.config import SchedulerConfig
from octavo.services.scheduler.core.effects import SendToGateway
from octavo.services.scheduler.core.scheduler import Scheduler
from octavo.services.scheduler.groups.block_allocator import max_tokens
from octavo.services.scheduler.node import Node
from octavo.worker.v1 import worker_pb2
from tests.services.scheduler.simulation import expected_output

from .bomb import Bomb, InjectedError
from .gateway import Call, SimGateway
from .swarm import Event, Swarm
from .worker import POISON, Network, SimWorker

TICK_S = 0.1
MAX_EVENTS = 50_000
CROWD = 1000  # tenants
DEATHS = (
    "worker_crash", "worker_hang", "worker_fault", "partition", "lost frame", "worker_slow", "reordered frame",
)  # fmt: skip
RESTARTS = "scheduler_restart", "drain", "exception raised"

# Why a call may end without being finished, and of what one must have happened for it. Refusals are checked as well
# when they are made: against what the scheduler has then (`_check_refusal`).
LEGITIMATE: dict[str, tuple[str, ...]] = {
    "cancelled": ("cancel",),
    "TAKEN_OVER": ("resume_again",),
    "broken": ("gateway_death",),
    "QUARANTINED": (*DEATHS, "poison"),
    "WORKER_FAULT": ("not_finite",),
    "QUEUE_TIMEOUT": ("deadline", "clock_jump"),
    "GENERATION_TIMEOUT": ("deadline", "clock_jump"),
    "DEADLINE_UNREACHABLE": ("deadline",),
    "KV_CAPACITY_EXCEEDED": ("submit", "cancel_early"),
    "QUEUE_FULL": ("submit", "cancel_early"),
    "QUOTA_EXCEEDED": ("submit", "cancel_early"),
    "DRAINING": ("drain",),
    "NO_WORKERS": (*DEATHS, "poison", "clock_jump"),
    "UNAVAILABLE": ("stream_break", "gateway_death", "gateway cut off", *RESTARTS),
}


class World:
    """Time, events, and the processes of one seed. `counts` says which faults and paths were met."""

    def __init__(self, swarm: Swarm, is_unlimited: bool = False) -> None:
        """is_unlimited: whoever comes is admitted, and nobody is ended before the deadline."""
        self.swarm = swarm
        self._is_unlimited = is_unlimited
        self.now = 1000.0
        self.start = self.now
        self.healed = False
        self.counts: Counter[str] = Counter()
        self.num_events = 0
        self._skew_s = 0.0  # of the scheduler's clock
        self._stands_until = self._stands_at = 0.0
        self._bomb: Bomb | None = None
        self._is_crash_due = False  # as soon as a preempted sequence waits for a step in flight
        self._is_pump_due = False
        self._unchecked = swarm.seed % swarm.check_every
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0
        unlimited = {"max_waiting": 1_000_000} if is_unlimited else {}
        self.config = SchedulerConfig(**swarm.settings | unlimited)
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
        self._gateways = {gateway.name: gateway for gateway in self.gateways}
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

    @property
    def clock(self) -> float:
        """The scheduler's clock, which jumps and stands still, and never goes back."""
        return self._stands_at if self.now < self._stands_until else self.now + self._skew_s

    def run(self) -> None:
        """Run until everything has ended; AssertionError if something is wrong or does not end."""
        heap, end = self._heap, self.start + self.swarm.faults_end + self.swarm.patience_s
        while not (self.healed and self.node.core.is_idle and all(call.ending for call in self.calls)):
            self.now, _, action, arguments = heapq.heappop(heap)
            action(*arguments)
            self.num_events += 1
            if self.now > end or self.num_events > MAX_EVENTS:
                stuck = [call.submit.request_id for call in self.calls if not call.ending]
                raise AssertionError(f"does not end: {stuck}, {list(self.node.core.requests())}")
        self._check_end()

    def _tick(self) -> None:
        self.after(TICK_S, self._tick)
        self._enter(False, self.node.tick, self.clock)
        self._pump()

    def _pump(self) -> None:
        """Plan and deliver."""
        self._is_pump_due = False
        self._enter(False, self.node.pump, self.clock)
        if self._is_crash_due and (awaiting := self.node.core._waiting.awaiting_output):
            self._is_crash_due = False
            self._by_identity[next(iter(awaiting)).group_id.encode()].die(restart_s=0.02)
            self.count("worker_crash")

    def _pump_soon(self) -> None:
        """Plan and deliver after what happens at the same time, like the engine."""
        if not self._is_pump_due:
            self._is_pump_due = True
            self.after(0.0, self._pump)

    def _enter(self, has_news: bool, event: Callable[..., object], *arguments: Any) -> None:
        """Handle an event like the engine: it ends the process if anything is raised.

        The books are checked if they can have changed, and if it is time to.
        """
        node = self.node
        num_plans = node.num_plans
        if self._bomb is None:
            event(*arguments)
        else:
            try:
                with self._bomb:
                    event(*arguments)
            except InjectedError:
                self._bomb = None
                self.count("exception raised")
                self._restart_scheduler()
                return
            assert not self._bomb.has_gone_off, "an exception was swallowed"
        if has_news or node.num_plans != num_plans:
            self._unchecked += 1
            if self._unchecked >= self.swarm.check_every:
                self._unchecked = 0
                self._check_books()

    def _check_books(self) -> None:
        core = self.node.core
        core.check_invariants()
        salts: dict[tuple[str, int], str] = {}
        for request in core.requests():
            for seq in request.sequences:
                for block in chain.from_iterable(seq.block_tables):
                    if block.ref_count > 1:
                        salt = salts.setdefault((seq.group_id, block.id), request.submit.cache_salt)
                        assert salt == request.submit.cache_salt, f"block {block.id} is shared by two tenants"

    # -- hops ------------------------------------------------------------------------------------

    def _start_scheduler(self) -> None:
        self.epoch += 1
        self.is_up = True
        self.node = Node(
            self.config, "scheduler", self.epoch, self.clock,
            send=self._to_worker, deliver=self._to_gateway, changed=lambda: None, fenced=self._on_fenced,
        )  # fmt: skip
        core = self.node.core
        setattr(core, "worker_lost", functools.partial(self._on_worker_lost, core))  # noqa: B010
        if self._is_unlimited:
            setattr(core._admission, "_refuse_for_deadline", lambda *_: None)  # noqa: B010
            setattr(core._deadlines, "take", lambda _: ())  # noqa: B010
        for gateway in self.gateways:
            self.after(0.01 if self.epoch > 1 else 0.0, gateway.connect)

    def _to_worker(self, identity: bytes, frame: worker_pb2.WorkerFrame) -> bool:
        worker = self._by_identity[identity]
        if not worker.is_alive:
            return False
        self.network.carry(worker, worker.receive, worker.life, frame, to_worker=True)
        return True

    def from_worker(self, worker: SimWorker, frame: worker_pb2.WorkerFrame) -> None:
        if self.is_up:
            has_news = not frame.HasField("heartbeat")
            self._enter(has_news, self.node.on_frame, worker.identity, frame, self.clock)
            if has_news:
                self._pump()

    def _to_gateway(self, effect: SendToGateway) -> None:
        self._gateways[effect.gateway_id].deliver(effect.message)

    def to_scheduler(self, gateway: SimGateway, message: scheduler_pb2.AttachRequest) -> None:
        self.after(0.001, self._from_gateway, gateway, gateway.connection, message)

    def _from_gateway(self, gateway: SimGateway, connection: int, message: scheduler_pb2.AttachRequest) -> None:
        if gateway.connection == connection and not gateway.is_cut_off:
            self._enter(True, self._on_gateway_message, gateway.name, message)
            self._pump_soon()

    def _on_gateway_message(self, gateway_id: str, message: scheduler_pb2.AttachRequest) -> None:
        self.node.on_gateway_message(gateway_id, message, self.clock)
        if message.HasField("submit"):
            effects = self.node.core._effects._effects
            last = effects[-1] if effects else None
            if isinstance(last, SendToGateway) and last.message.HasField("rejected"):
                self._check_refusal(message.submit, last.message.rejected)

    def cut_off(self, gateway: SimGateway, connection: int) -> None:
        """Close the stream of a gateway that does not read."""
        if gateway.connection == connection:
            self._lose_gateway(gateway)
            gateway.disconnect()

    def _lose_gateway(self, gateway: SimGateway) -> None:
        if gateway.connection:
            self._enter(True, self.node.gateway_lost, gateway.name, self.clock)
            self._pump_soon()

    def _on_worker_lost(self, core: Scheduler, group_id: str, now: float, crashed: bool = False) -> None:
        awaiting = core._waiting.awaiting_output
        self.counts["lost while settling"] += any(seq.group_id == group_id for seq in awaiting)
        Scheduler.worker_lost(core, group_id, now, crashed)

    def _on_fenced(self, worker_id: str, reason: str) -> None:
        if reason.startswith(("hangs", "is silent")):
            causes = DEATHS if self.swarm.tells_progress else (*DEATHS, "speed_change")
            assert any(self.counts[cause] for cause in causes), f"{worker_id} was given up without a cause: {reason}"
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
        name = f"r{rng.getrandbits(40)}"  # the same in a twin of this world
        prompt = rng.choice([[], *self.prefixes]) + [rng.randrange(10, 40_000) for _ in range(rng.randrange(1, 30))]
        if self.swarm.poison and len(self.calls) == 0:
            prompt[-1] = POISON
        submit = scheduler_pb2.Submit(
            request_id=name,
            prompt_token_ids=prompt,
            sampling={"seed": rng.randrange(1000)},  # type: ignore[arg-type]
            stop={"max_new_tokens": rng.choice(self.swarm.outputs)},  # type: ignore[arg-type]
            candidate_count=rng.choice([1, 1, 1, 3]),
            remaining_ms=rng.choice(self.swarm.deadlines),
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
        call = Call(submit, self.gateways[rng.randrange(len(self.gateways))], self.now)
        self.calls.append(call)
        call.gateway.submit(call)

    def _do_cancel(self, rng: random.Random) -> None:
        live = [call for call in self.calls if not call.ending]
        if live:
            call = live[rng.randrange(len(live))]
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

    def _do_crash_at_preemption(self, _: random.Random) -> None:
        """A worker dies while a sequence that was preempted waits for its step."""
        self._is_crash_due = True

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
            self._lose_gateway(gateway)
            gateway.disconnect()

    def _do_gateway_slow(self, rng: random.Random) -> None:
        rng.choice(self.gateways).be_slow(rng.choice([0.02, 0.2, 1.0]))

    def _do_gateway_death(self, rng: random.Random) -> None:
        """A gateway process dies: clients with a resume window come back through another one."""
        gateway = rng.choice(self.gateways)
        calls = [call for call in self.calls if call.gateway is gateway and not call.ending]
        self._lose_gateway(gateway)
        gateway.die()
        for call in calls:
            if call.ending:  # the scheduler has restarted over the loss, and the call with it
                continue
            wanted = tuple(index for index in call.candidates if index not in call.finished)
            call.handles.clear()
            if call.submit.resume_window_ms and call.admitted:
                call.gateway = self.gateways[-1]
                self.after(0.05, self.gateways[-1].resume, call, wanted)
            else:
                call.end("broken")

    def _do_speed_change(self, rng: random.Random) -> None:
        rng.choice(self.workers).speed = rng.choice([0.1, 1.0, 3.0])

    def _do_crowd(self, rng: random.Random) -> None:
        """A thousand tenants come at once, each with a short prompt."""
        for number in range(CROWD):
            submit = scheduler_pb2.Submit(
                request_id=f"c{number}", tenant=f"t{number}", cache_salt=f"t{number}",
                prompt_token_ids=[rng.randrange(10, 40_000) for _ in range(rng.randrange(1, 8))],
                stop={"max_new_tokens": 1}, end_of_sequence_ids=[7],  # type: ignore[arg-type]
            )  # fmt: skip
            call = Call(submit, self.gateways[number % len(self.gateways)], self.now)
            self.calls.append(call)
            call.gateway.submit(call)

    def _do_clock_jump(self, rng: random.Random) -> None:
        """The scheduler's clock leaps, as after a suspend."""
        jump_s = rng.choice([0.5, 3.0, 20.0, 700.0, 7200.0])
        self._skew_s += jump_s
        self._stands_at += jump_s

    def _do_clock_stop(self, rng: random.Random) -> None:
        """The scheduler's clock stands still, and goes on from there."""
        self._stands_at = self.clock
        self._stands_until = self.now + rng.choice([0.05, 0.5, 2.0])
        self._skew_s = self._stands_at - self._stands_until

    def _do_exception(self, rng: random.Random) -> None:
        """One of the next calls within the scheduler raises an exception."""
        self._bomb = Bomb(int(rng.expovariate(1 / 200)))

    def _do_resume_again(self, rng: random.Random) -> None:
        """A client asks for all of an output in a second call, while the first one may still go on."""
        kept = [
            call for call in self.calls
            if call.submit.resume_window_ms and call.admitted and call.epoch == self.epoch
            and call.ending in ("", "finished", "broken")
        ]  # fmt: skip
        if kept:
            first = rng.choice(kept)
            call = Call(first.submit, rng.choice(self.gateways), first.submitted_at, is_again=True)
            call.admitted, call.epoch = True, first.epoch
            self.calls.append(call)
            call.gateway.resume(call, tuple(call.candidates))

    def _do_scheduler_restart(self, _: random.Random) -> None:
        self._restart_scheduler()

    def _restart_scheduler(self) -> None:
        """The scheduler's process ends, and starts again at once."""
        self.is_up = False
        for gateway in self.gateways:
            if gateway.connection:
                gateway.disconnect()
        self._count_preemptions()
        self._start_scheduler()

    def _do_drain(self, rng: random.Random) -> None:
        self.node.core.drain()
        self.after(0.2, self._do_scheduler_restart, rng)

    def _do_flush(self, _: random.Random) -> None:
        self._enter(True, self.node.core.flush_prefix_cache)
        self._pump_soon()

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
        self.counts["preemption"] += self.node.core._metrics.preemptions

    def _check_refusal(self, submit: scheduler_pb2.Submit, rejected: scheduler_pb2.Rejected) -> None:
        """A refusal needs a cause, in what the scheduler has at this moment."""
        core, reason = self.node.core, rejected.reason
        name = f"{submit.request_id} was refused: {rejected.message}"
        if reason == "NO_WORKERS":
            assert not core._groups, name
        elif reason == "QUEUE_FULL" and "by turns" in rejected.message:
            self._check_turn(submit, name)
        elif reason == "QUEUE_FULL":
            tenants = len({call.submit.tenant for call in self.calls})
            of_tenant = sum(seq.request.submit.tenant == submit.tenant for seq in core._waiting.everything())
            assert core._waiting.num_sequences >= self.config.max_waiting or (
                of_tenant and 2 * of_tenant * tenants >= self.config.max_waiting  # of those refused lately, about
            ), name
        elif reason == "QUOTA_EXCEEDED":
            most = self.config.tenant_max_requests
            num_live = sum(request.submit.tenant == submit.tenant for request in core.requests())
            assert most, name
            assert num_live >= most, name
            assert not submit.is_failover, name
        elif reason == "KV_CAPACITY_EXCEEDED":
            num_tokens = len(submit.prompt_token_ids) + len(submit.continue_token_ids)
            self._check_capacity(num_tokens, name, self.now)
        elif reason == "DEADLINE_UNREACHABLE":
            assert submit.remaining_ms, name

    def _check_turn(self, submit: scheduler_pb2.Submit, name: str) -> None:
        """Only who asks for much in a hurry is let in by turns, and not where all is free that nobody else wants."""
        assert submit.remaining_ms, name
        assert not submit.is_failover, name
        in_a_hurry = [call for call in self.calls if call.submit.remaining_ms and not call.is_again]
        assert sum(call.submit.tenant == submit.tenant for call in in_a_hurry) > 1, f"{name}, at its first request"
        has_others = any(call.submit.tenant != submit.tenant for call in self.calls)
        assert has_others or any(group.num_running for group in self.node.core._groups.values()), name

    def _check_capacity(self, num_tokens: int, name: str, submitted_at: float) -> None:
        """Nobody has room for another token: only where the larger workers are gone, the smaller ones count.

        Those count as gone that did not join in the time that a scheduler gives them after its start.
        """
        windows, longest = self.swarm.windows, self.swarm.max_model_len
        lengths = [min(longest, max_tokens(windows, worker.num_blocks - 1)) for worker in self.workers]
        has_loss = any(self.counts[loss] for loss in (*DEATHS, "poison", "clock_jump"))
        if self.config.worker_grace_s < 1 or self.swarm.token_s:  # a worker joins again when its long step is through
            has_loss |= submitted_at - self.start < 0.1 or any(self.counts[restart] for restart in RESTARTS)
        assert num_tokens >= (min(lengths) if has_loss else max(lengths)), name

    def _count_deadlines(self) -> None:
        """How often a request with a deadline was in time, late or refused; among faults or not."""
        where = " among faults" if any(event.action != "submit" for event in self.swarm.script) else ""
        for call in self.calls:
            if call.submit.remaining_ms and not call.is_again:
                if call.ending == "finished":
                    self.count(f"deadline met{where}")
                elif call.ending in ("QUEUE_TIMEOUT", "GENERATION_TIMEOUT"):
                    self.count(f"deadline missed{where}")
                elif call.ending == "DEADLINE_UNREACHABLE":
                    self.count(f"deadline refused{where}")

    def refused_for_deadline(self) -> set[str]:
        """Return the names of the requests that were refused because of their deadline."""
        return {call.submit.request_id for call in self.calls if call.ending == "DEADLINE_UNREACHABLE"}

    def in_time(self) -> set[str]:
        """Return the names of the requests that have finished."""
        return {call.submit.request_id for call in self.calls if call.ending == "finished" and not call.is_again}

    def _check_end(self) -> None:
        self._check_books()
        self._count_preemptions()
        self._count_deadlines()
        load = self.node.core.load(self.clock)
        assert load.kv_blocks_free == load.kv_blocks_total, "blocks are lost"
        for call in self.calls:
            name, submit = call.submit.request_id, call.submit
            if call.ending == "finished":
                for index, finished in call.finished.items():
                    is_whole = finished.reason != common_pb2.FINISH_REASON_CONTEXT_LIMIT
                    if is_whole:
                        assert call.tokens[index] == self.expected(call, index), f"{name} ended early"
                    else:
                        num_tokens = len(submit.prompt_token_ids) + len(call.tokens[index])
                        self._check_capacity(num_tokens, f"{name} was cut", call.submitted_at)
                continue
            assert call.ending in LEGITIMATE, f"{name} ended with {call.ending}"
            causes = LEGITIMATE[call.ending]
            if call.ending == "NO_WORKERS" and self.swarm.token_s:
                causes += RESTARTS  # they join again when their long steps are through
            assert any(self.counts[cause] for cause in causes), f"{name} ended with {call.ending} without a cause"
            if call.ending == "KV_CAPACITY_EXCEEDED":
                longest = max(map(len, call.tokens.values()), default=0)
                num_tokens = len(submit.prompt_token_ids) + longest
                self._check_capacity(num_tokens, f"{name} ended with {call.ending}", call.submitted_at)
            elif call.ending == "QUARANTINED" and POISON not in submit.prompt_token_ids:
                assert any(self.counts[death] for death in DEATHS), f"{name} was blamed for nothing"
            elif call.ending in ("QUEUE_TIMEOUT", "GENERATION_TIMEOUT"):
                assert submit.remaining_ms or self.counts["clock_jump"], f"{name} has no deadline"


def quiet() -> None:
    """Keep the log of thousands of lost workers to ourselves."""
    logging.getLogger("octavo.scheduler").setLevel(logging.CRITICAL)
