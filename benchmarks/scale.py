"""Routing over many replicas, in simulated time: python benchmarks/scale.py [--replicas 1000] [--requests 20000].

Everything that decides is the real code: each replica is a scheduler core with its block pool and cache feed, each
gateway chooses with its `Router` from loads and prefix indexes as old as they are in production. Simulated are
the workers (a step takes a fixed time and a time for each token), the clock and the clients: applications with
system prompts, popular by Zipf's law, whose conversations grow turn by turn and all arrive by chance.

Compared are: prefix-aware routing as it is; the same blind to caches; and one giant cache that never forgets, the
most that any routing could hit.
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

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.gateway.prefix_index import prompt_block_hashes
from octavo.services.gateway.router import Route, Router
from octavo.services.gateway.routing import RouteRequest
from octavo.services.scheduler.config import BLOCK_SIZE, SchedulerConfig
from octavo.services.scheduler.effects import SendPlan
from octavo.services.scheduler.scheduler import Scheduler
from octavo.services.scheduler.tally import Tally
from octavo.worker.v1 import worker_pb2

REPORT_S = 0.2  # loads and cache events, as in production
STEP_S, TOKEN_S = 0.010, 0.0001
ANSWER = 7  # every token of every output
GATEWAYS = 4


@dataclass(eq=False)
class Replica:
    """A scheduler with one worker."""

    number: int
    core: Scheduler
    tally: Tally
    plans: deque[worker_pb2.StepPlan] = field(default_factory=deque)
    computing: bool = False
    busy_s: float = 0.0
    sequences: int = 0  # running and waiting, summed over reports
    changed: bool = True


class Gateway:
    """What one gateway knows of all replicas."""

    def __init__(self, num_replicas: int) -> None:
        self.router = Router()
        self.routes = [self.router.add(str(number)) for number in range(num_replicas)]
        for route in self.routes:
            route.open(route.address, BLOCK_SIZE)

    def report(self, number: int, load: scheduler_pb2.Load, events: list[scheduler_pb2.WatchCacheResponse]) -> None:
        """Take what a replica says of itself."""
        route = self.routes[number]
        for event in events:
            route.prefixes.apply(event)
        route.take_load(load)


@dataclass
class Conversation:
    """What has been said so far, ending with an answer."""

    tokens: list[int]


class Clients:
    """Makes prompts: a new conversation of an application, or a further turn of one."""

    def __init__(self, rng: random.Random, num_applications: int) -> None:
        self._rng = rng
        self._system = [self._text(rng.randrange(256, 2048)) for _ in range(num_applications)]
        self._weights = [1 / (rank + 1) for rank in range(num_applications)]
        self._open: deque[Conversation] = deque()

    def next(self) -> tuple[list[int], int]:
        """Return a prompt and the length of its output."""
        rng = self._rng
        if len(self._open) > 200 and rng.random() < 0.6:
            conversation = self._open.popleft()  # the one that waited longest: people read before they answer
        else:
            conversation = Conversation(list(rng.choices(self._system, self._weights)[0]))
        prompt = conversation.tokens + self._text(rng.randrange(32, 160))
        num_output = rng.randrange(24, 72)
        if len(prompt) < 6000:
            self._open.append(Conversation(prompt + [ANSWER] * num_output))
        return prompt, num_output

    def _text(self, length: int) -> list[int]:
        return [self._rng.randrange(10, 50_000) for _ in range(length)]


class Simulation:
    """All replicas under one workload. `aware`: routing looks at caches."""

    def __init__(self, options: argparse.Namespace, aware: bool) -> None:
        self._options = options
        self._aware = aware
        self._rng = random.Random(options.seed)
        self._events: list[tuple[float, int, object]] = []
        self._num_events = 0
        self.replicas = [self._replica(number) for number in range(options.replicas)]
        self._gateways = [Gateway(options.replicas) for _ in range(GATEWAYS)]
        self._giant: set[int] = set()
        self.giant_hits = self.looked_up = 0
        self._is_steady = False  # neither the start, when caches are empty, nor the end
        self.span_s = 0.0
        self.choose_s: list[float] = []
        self.first_token_s: list[float] = []
        self._arrived: dict[int, float] = {}

    def _replica(self, number: int) -> Replica:
        tally = Tally()
        core = Scheduler(SchedulerConfig(check_every_steps=0), now=0.0, tally=tally)
        core.worker_joined("worker", 1, self._options.blocks, 1 << 17, now=0.0)
        return Replica(number, core, tally)

    def run(self) -> None:
        """Let all requests arrive, and everything end."""
        clients = Clients(self._rng, self._options.applications)
        now = 0.0
        for handle in range(1, self._options.requests + 1):
            now += self._rng.expovariate(self._options.rate * self._options.replicas)
            self._at(now, (handle, *clients.next()))
        self._at(0.0, None)
        left = self._options.requests
        while self._events:
            now, _, event = heapq.heappop(self._events)
            if event is None:
                self._report(now)
                if left or any(replica.computing for replica in self.replicas):
                    self._at(now + REPORT_S, None)
            elif isinstance(event, Replica):
                self._step_done(event, now)
            else:
                left -= 1
                self._is_steady = 0 < left < self._options.requests * 3 // 4
                self.span_s = now
                self._arrive(event, now)  # type: ignore[arg-type]

    def _at(self, when: float, event: object) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (when, self._num_events, event))

    def _arrive(self, request: tuple[int, list[int], int], now: float) -> None:
        handle, prompt, num_output = request
        submit = scheduler_pb2.Submit(
            handle=handle, request_id=str(handle), prompt_token_ids=prompt, stop={"max_new_tokens": num_output}
        )
        hashes = prompt_block_hashes(submit, BLOCK_SIZE)
        known = next((n for n, each in enumerate(hashes) if each not in self._giant), len(hashes))
        self.giant_hits += known * BLOCK_SIZE
        self.looked_up += len(prompt)
        whole = scheduler_pb2.Submit(prompt_token_ids=[*prompt, *[ANSWER] * num_output])
        self._giant.update(prompt_block_hashes(whole, BLOCK_SIZE))
        gateway = self._rng.choice(self._gateways)
        started = time.perf_counter()
        route = gateway.router.choose(
            RouteRequest(str(handle), len(prompt)), lambda _: hashes if self._aware else [], _any, now
        )
        self.choose_s.append(time.perf_counter() - started)
        assert route is not None, "every replica is open"
        route.sent(len(prompt), 1)
        replica = self.replicas[int(route.address)]
        self._arrived[handle] = now
        replica.core.submit("gateway", submit, now)
        self._pump(replica, now)

    def _report(self, now: float) -> None:
        for replica in self.replicas:
            if replica.changed or replica.computing:
                replica.changed = replica.computing
                replica.core.tick(now)
                replica.core.take_effects()
                load = replica.core.load(now)
                if self._is_steady:
                    replica.sequences += load.running + load.waiting
                events = list(replica.core.cache_feed.flush())
                for gateway in self._gateways:
                    gateway.report(replica.number, load, events)

    def _pump(self, replica: Replica, now: float) -> None:
        replica.changed = True
        replica.core.schedule(now)
        for effect in replica.core.take_effects():
            if isinstance(effect, SendPlan):
                replica.plans.append(effect.plan)
            elif effect.message.WhichOneof("kind") == "step_outputs":
                for handle in effect.message.step_outputs.handles:
                    arrived = self._arrived.pop(handle, None)
                    if arrived is not None:
                        self.first_token_s.append(now - arrived)
        if replica.plans and not replica.computing:
            replica.computing = True
            seconds = STEP_S + TOKEN_S * replica.plans[0].num_tokens
            replica.busy_s += seconds
            self._at(now + seconds, replica)

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
        hits = sum(replica.tally.cached_tokens for replica in self.replicas)
        computed = [replica.tally.prompt_tokens + replica.tally.output_tokens for replica in self.replicas]
        busy = sum(replica.busy_s for replica in self.replicas) / len(self.replicas) / self.span_s
        load = [replica.sequences for replica in self.replicas]
        rate = hits / sum(replica.tally.looked_up_tokens for replica in self.replicas)
        ttft = statistics.quantiles(self.first_token_s, n=100)
        p99 = statistics.quantiles(load, n=100, method="inclusive")[98]
        print(
            f"{name}: hit rate {rate:.3f}; tokens computed {sum(computed) / 1e6:.2f} M; workers busy {busy:.0%}; "
            f"sequences of a replica, p99 / mean {p99 / statistics.mean(load):.2f}, max / mean "
            f"{max(load) / statistics.mean(load):.2f}; first token p50 {1000 * ttft[49]:.0f} ms, p99 "
            f"{1000 * ttft[98]:.0f} ms; a decision takes {1000 * statistics.median(self.choose_s):.2f} ms",
            flush=True,
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
    parser.add_argument("--aware-only", action="store_true", help="leave the blind run out: it takes as long")
    options = parser.parse_args()
    gc.disable()
    aware = Simulation(options, aware=True)
    aware.run()
    giant = aware.giant_hits / aware.looked_up
    print(f"one giant cache: hit rate {giant:.3f}")
    rate = aware.describe("prefix-aware")
    print(f"prefix-aware routing reaches {rate / giant:.1%} of the giant cache's hits")
    if options.aware_only:
        return
    blind = Simulation(options, aware=False)
    blind.run()
    blind.describe("blind to caches")


if __name__ == "__main__":
    main()
