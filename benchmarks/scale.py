"""Routing over many replicas, in simulated time: python benchmarks/scale.py [--replicas 1000] [--requests 20000].

Everything that decides is the real code: each replica is a scheduler core with its block pool and cache feed, each
gateway chooses with its `Router` from loads and prefix indexes as old as they are in production. Simulated are
the workers (a step takes a fixed time and a time for each token), the clock and the clients: applications with
system prompts, popular by Zipf's law, whose conversations grow turn by turn and all arrive by chance.

Compared are prefix-aware routing as it is; the same blind to caches; round robin; and sessions that stick to a replica
(the ring that the gateways have, and nothing else), all with one giant cache that never forgets, the most that any
routing could hit. With --deaths replicas die while it runs, and new ones with empty caches join in their places;
what ran there goes on elsewhere, with the output so far, as gateways do it.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import random
import statistics
import time
from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.gateway.schedulers.prefix_index import prompt_block_hashes
from octavo.services.gateway.schedulers.router import Route, Router, SessionRing
from octavo.services.gateway.schedulers.routing import RouteRequest
from octavo.services.scheduler.config import BLOCK_SIZE, SchedulerConfig
from octavo.services.scheduler.core.effects import SendPlan
from octavo.services.scheduler.core.metrics import SchedulerMetrics
from octavo.services.scheduler.core.scheduler import Scheduler
from octavo.services.scheduler.groups.worker_group import GroupLimits
from octavo.worker.v1 import worker_pb2

REPORT_S = 0.2  # loads and cache events, as in production
STEP_S, TOKEN_S = 0.010, 0.0001
ANSWER = 7  # every token of every output
GATEWAYS = 4
REJOIN_S = 1.0
POLICIES = ("aware", "blind", "round-robin", "sticky")


@dataclass(eq=False)
class Replica:
    """A scheduler with one worker."""

    number: int
    core: Scheduler
    metrics: SchedulerMetrics
    plans: deque[worker_pb2.StepPlan] = field(default_factory=deque)
    computing: bool = False
    busy_s: float = 0.0
    sequences: int = 0  # running and waiting, summed over reports
    changed: bool = True
    alive: bool = True
    born: int = 0  # in reports
    died: int = 0


class Request(NamedTuple):
    """What a client sends."""

    handle: int
    prompt: list[int]
    num_output_tokens: int
    session: int


class Death(NamedTuple):
    """The event that a replica dies: any of those that live."""


class Birth(NamedTuple):
    """The event that a new one joins."""


class Gateway:
    """What one gateway knows of all replicas."""

    def __init__(self, policy: str, num_replicas: int) -> None:
        self._policy = policy
        self._router = Router()
        self._routes: dict[int, Route] = {}
        self._ring = SessionRing()
        self._turn = 0
        for number in range(num_replicas):
            self.add(number)

    def add(self, number: int) -> None:
        """A replica joined."""
        route = self._routes[number] = self._router.add(str(number))
        route.open(route.address, BLOCK_SIZE)
        if self._policy == "sticky":
            self._ring.add(number, str(number))

    def remove(self, number: int) -> None:
        """A replica died."""
        self._router.remove(self._routes.pop(number))
        if self._policy == "sticky":
            self._ring.remove(number, str(number))

    def choose(self, request: Request, hashes: list[int], now: float) -> int:
        """Return which replica gets a request."""
        if self._policy == "round-robin":
            self._turn += 1
            return list(self._routes)[self._turn % len(self._routes)]
        if self._policy == "sticky":
            home = self._ring.home(str(request.session))
            assert home is not None, "every replica is in the ring"
            return home
        known = hashes if self._policy == "aware" else []
        asked = RouteRequest(str(request.handle), len(request.prompt))
        route = self._router.choose(asked, lambda _: known, _any, now)
        assert route is not None, "every replica is open"
        route.sent(len(request.prompt), 1)
        return int(route.address)

    def report(self, number: int, load: scheduler_pb2.Load, events: list[scheduler_pb2.WatchCacheResponse]) -> None:
        """Take what a replica says of itself."""
        route = self._routes[number]
        for event in events:
            route.prefixes.apply(event)
        route.take_load(load)


@dataclass
class Conversation:
    """What has been said so far, ending with an answer."""

    tokens: list[int]
    session: int


class Clients:
    """Makes prompts: a new conversation of an application, or a further turn of one."""

    def __init__(self, rng: random.Random, num_applications: int) -> None:
        self._rng = rng
        self._system = [self._text(rng.randrange(256, 2048)) for _ in range(num_applications)]
        self._weights = [1 / (rank + 1) for rank in range(num_applications)]
        self._open: deque[Conversation] = deque()

    def next(self, handle: int) -> Request:
        """Return a request. A new session has the number of its first request."""
        rng = self._rng
        if len(self._open) > 200 and rng.random() < 0.6:
            conversation = self._open.popleft()  # the one that waited longest: people read before they answer
        else:
            conversation = Conversation(list(rng.choices(self._system, self._weights)[0]), handle)
        prompt = conversation.tokens + self._text(rng.randrange(32, 160))
        num_output_tokens = rng.randrange(24, 72)
        if len(prompt) < 6000:
            self._open.append(Conversation(prompt + [ANSWER] * num_output_tokens, conversation.session))
        return Request(handle, prompt, num_output_tokens, conversation.session)

    def _text(self, length: int) -> list[int]:
        return [self._rng.randrange(10, 50_000) for _ in range(length)]


class Simulation:
    """All replicas under one workload. `policy`: one of POLICIES."""

    def __init__(self, options: argparse.Namespace, policy: str) -> None:
        self._options = options
        self._chance = random.Random(options.seed + 1)  # of deaths: the workload is the same without them
        self._rng = random.Random(options.seed)
        self._events: list[tuple[float, int, object]] = []
        self._num_events = 0
        self.replicas = [self._replica(number) for number in range(options.replicas)]
        self._gateways = [Gateway(policy, options.replicas) for _ in range(GATEWAYS)]
        self._giant: set[int] = set()
        self.giant_hits = self.looked_up = 0
        self._is_steady = False  # neither the start, when caches are empty, nor the end
        self.span_s = 0.0
        self.choose_s: list[float] = []
        self.first_token_s: list[float] = []
        self._arrived: dict[int, float] = {}
        self._running: dict[int, tuple[Request, int, int]] = {}  # by handle: with its replica, and tokens so far
        self.num_moved = self.num_finished = self.num_reports = 0

    def _replica(self, number: int) -> Replica:
        metrics = SchedulerMetrics()
        core = Scheduler(SchedulerConfig(check_every_steps=0), now=0.0, metrics=metrics)
        core.worker_joined("worker", 1, GroupLimits(self._options.blocks, 1 << 17), now=0.0)
        return Replica(number, core, metrics)

    def run(self) -> None:
        """Let all requests arrive, and everything end."""
        clients = Clients(self._rng, self._options.applications)
        now = 0.0
        for handle in range(1, self._options.requests + 1):
            now += self._rng.expovariate(self._options.rate * self._options.replicas)
            self._at(now, clients.next(handle))
        for number in range(self._options.deaths):
            self._at(now * (number + 1) / (self._options.deaths + 1), Death())
        self._at(0.0, None)
        left = self._options.requests
        while self._events:
            now, _, event = heapq.heappop(self._events)
            if event is None:
                self._report(now)
                if left or any(replica.computing for replica in self.replicas):
                    self._at(now + REPORT_S, None)
            elif isinstance(event, Replica):
                if event.alive:
                    self._step_done(event, now)
            elif isinstance(event, Death):
                self._die(now)
            elif isinstance(event, Birth):
                self._join()
            else:
                left -= 1
                self._is_steady = 0 < left < self._options.requests * 3 // 4
                self.span_s = now
                self._arrive(event, now)  # type: ignore[arg-type]

    def _at(self, when: float, event: object) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (when, self._num_events, event))

    def _arrive(self, request: Request, now: float) -> None:
        prompt = request.prompt
        hashes = prompt_block_hashes(scheduler_pb2.Submit(prompt_token_ids=prompt), BLOCK_SIZE)
        known = next((n for n, each in enumerate(hashes) if each not in self._giant), len(hashes))
        self.giant_hits += known * BLOCK_SIZE
        self.looked_up += len(prompt)
        whole = scheduler_pb2.Submit(prompt_token_ids=[*prompt, *[ANSWER] * request.num_output_tokens])
        self._giant.update(prompt_block_hashes(whole, BLOCK_SIZE))
        self._arrived[request.handle] = now
        self._send(request, self._rng.choice(self._gateways), hashes, 0, now)

    def _send(self, request: Request, gateway: Gateway, hashes: list[int], num_done: int, now: float) -> None:
        """Submit a request of which so many tokens are known already."""
        started = time.perf_counter()
        number = gateway.choose(request, hashes, now)
        self.choose_s.append(time.perf_counter() - started)
        submit = scheduler_pb2.Submit(
            handle=request.handle,
            request_id=str(request.handle),
            prompt_token_ids=request.prompt,
            continue_token_ids=[ANSWER] * num_done,
            stop={"max_new_tokens": request.num_output_tokens},
        )
        self._running[request.handle] = request, number, num_done
        self.replicas[number].core.submit("gateway", submit, now)
        self._pump(self.replicas[number], now)

    def _die(self, now: float) -> None:
        """Let a replica die; what ran there goes on elsewhere."""
        victim = self._chance.choice([replica for replica in self.replicas if replica.alive])
        victim.alive = victim.computing = False
        victim.died = self.num_reports
        for gateway in self._gateways:
            gateway.remove(victim.number)
        for request, number, num_done in list(self._running.values()):
            if number == victim.number:
                hashes = prompt_block_hashes(scheduler_pb2.Submit(prompt_token_ids=request.prompt), BLOCK_SIZE)
                self.num_moved += 1
                self._send(request, self._chance.choice(self._gateways), hashes, num_done, now)
        self._at(now + REJOIN_S, Birth())

    def _join(self) -> None:
        replica = self._replica(len(self.replicas))
        replica.born = self.num_reports
        self.replicas.append(replica)
        for gateway in self._gateways:
            gateway.add(replica.number)

    def _report(self, now: float) -> None:
        self.num_reports += self._is_steady
        for replica in self.replicas:
            if replica.alive and (replica.changed or replica.computing):
                replica.changed = replica.computing
                replica.core.tick(now)
                replica.core.take_effects()
                load = replica.core.load(now)
                if self._is_steady:
                    replica.sequences += load.running + load.waiting
                events = list(replica.core.cache_events.flush())
                for gateway in self._gateways:
                    gateway.report(replica.number, load, events)

    def _pump(self, replica: Replica, now: float) -> None:
        replica.changed = True
        replica.core.schedule(now)
        for effect in replica.core.take_effects():
            if isinstance(effect, SendPlan):
                replica.plans.append(effect.plan)
            elif effect.message.WhichOneof("kind") == "step_outputs":
                self._take(effect.message.step_outputs, now)
        if replica.plans and not replica.computing:
            replica.computing = True
            seconds = STEP_S + TOKEN_S * replica.plans[0].num_tokens
            replica.busy_s += seconds
            self._at(now + seconds, replica)

    def _take(self, outputs: scheduler_pb2.StepOutputs, now: float) -> None:
        for row, handle in enumerate(outputs.handles):
            arrived = self._arrived.pop(handle, None)
            if arrived is not None:
                self.first_token_s.append(now - arrived)
            request, number, num_done = self._running[handle]
            count = outputs.token_counts[row] if outputs.token_counts else 1
            self._running[handle] = request, number, num_done + count
        for finished in outputs.finished:
            request, _, num_done = self._running.pop(finished.handle)
            assert num_done == request.num_output_tokens, (finished.handle, num_done, request.num_output_tokens)
            self.num_finished += 1

    def _step_done(self, replica: Replica, now: float) -> None:
        plan = replica.plans.popleft()
        replica.computing = False
        num_sampled = sum(flags & 1 for flags in plan.row_flags)
        tokens = array("I", [ANSWER] * num_sampled).tobytes()
        result = worker_pb2.StepResult(step_id=plan.step_id, slot_indexes=plan.slot_indexes, token_ids=tokens)
        replica.core.step_done("worker", result, now)
        self._pump(replica, now)

    def describe(self, name: str) -> float:
        """Print a line; return the hit rate."""
        hits = sum(replica.metrics.cached_tokens for replica in self.replicas)
        computed = [replica.metrics.prompt_tokens + replica.metrics.output_tokens for replica in self.replicas]
        busy = sum(replica.busy_s for replica in self.replicas) / len(self.replicas) / self.span_s
        lives = [(each, (each.died if not each.alive else self.num_reports) - each.born) for each in self.replicas]
        load = [each.sequences / reports for each, reports in lives if reports > self.num_reports / 2]
        rate = hits / sum(replica.metrics.looked_up_tokens for replica in self.replicas)
        ttft = statistics.quantiles(self.first_token_s, n=100)
        p99 = statistics.quantiles(load, n=100, method="inclusive")[98]
        print(
            f"{name}: hit rate {rate:.3f}; tokens computed {sum(computed) / 1e6:.2f} M; workers busy {busy:.0%}; "
            f"sequences of a replica, p99 / mean {p99 / statistics.mean(load):.2f}, max / mean "
            f"{max(load) / statistics.mean(load):.2f}; first token p50 {1000 * ttft[49]:.0f} ms, p99 "
            f"{1000 * ttft[98]:.0f} ms; a decision takes {1000 * statistics.median(self.choose_s):.2f} ms",
            flush=True,
        )
        if self._options.deaths:
            print(
                f"  {self._options.deaths} replicas died and as many joined; {self.num_moved} requests moved; "
                f"{self.num_finished} of {self._options.requests} ended with all their tokens"
            )
        return rate


def _any(route: Route) -> bool:
    """Let every replica have any request."""
    del route
    return True


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--applications", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second for each replica")
    parser.add_argument("--blocks", type=int, default=2048, help="KV blocks of a replica")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deaths", type=int, default=0, help="replicas that die while it runs, and are replaced")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES, help="each takes as long")
    parser.add_argument("--aware-only", action="store_true", help="the same as --policies aware")
    options = parser.parse_args()
    gc.disable()
    for policy in ("aware",) if options.aware_only else options.policies:
        simulation = Simulation(options, policy)
        simulation.run()
        giant = simulation.giant_hits / simulation.looked_up
        rate = simulation.describe(policy)
        print(f"  {rate / giant:.1%} of the hits of one giant cache, whose hit rate is {giant:.3f}", flush=True)
        del simulation
        gc.collect()


if __name__ == "__main__":
    main()
