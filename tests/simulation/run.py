"""Runs seeds, and makes a failing one small."""

from __future__ import annotations

import copy
import gc
import itertools
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field

from .swarm import Swarm, draw
from .world import World, quiet

PIECE = 500  # seeds that a process runs at a time


@dataclass
class Failure:
    """A seed that broke a rule, and the shortest script of its events that still does."""

    seed: int
    error: str
    script: list[str]


@dataclass
class Summary:
    """What a run of many seeds met."""

    num_seeds: int = 0
    num_events: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    failure: Failure | None = None

    def add(self, other: Summary) -> None:
        """Add what another run met at the same time."""
        self.num_seeds += other.num_seeds
        self.num_events += other.num_events
        self.counts += other.counts
        self.failure = self.failure or other.failure


def run_seeds(seeds: Iterable[int], max_seconds: float = float("inf"), make_small: bool = True) -> Summary:
    """Run seeds until one fails, none is left or the time is up. `make_small`: what fails."""
    quiet()
    gc.freeze()
    gc.set_threshold(20_000)
    summary, started = Summary(), time.monotonic()
    for seed in seeds:
        swarm = draw(seed)
        world = World(swarm)
        error = attempt(world)
        summary.num_seeds += 1
        summary.num_events += world.num_events
        summary.counts += world.counts
        summary.seconds = time.monotonic() - started
        if error is not None:
            summary.failure = shrink(swarm, error) if make_small else Failure(seed, error, [])
            break
        if refused := world.refused_for_deadline():
            twin = World(swarm, is_unlimited=True)
            if attempt(twin) is None:
                summary.counts["deadline refused in vain"] += len(refused & twin.in_time())
        if summary.seconds > max_seconds:
            break
    return summary


def run_in_processes(seeds: range, num_processes: int, max_seconds: float = float("inf")) -> Summary:
    """Run seeds in several processes, in pieces, until one fails, none is left or the time is up."""
    summary, started = Summary(), time.monotonic()
    pieces = iter([seeds[at : at + PIECE] for at in range(0, len(seeds), PIECE)])
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), max_tasks_per_child=50) as pool:
        running = {pool.submit(run_seeds, piece) for piece in itertools.islice(pieces, num_processes)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for piece in done:
                summary.add(piece.result())
            summary.seconds = time.monotonic() - started
            if summary.failure is None and summary.seconds < max_seconds:
                running |= {pool.submit(run_seeds, piece) for piece in itertools.islice(pieces, len(done))}
    return summary


def attempt(world: World) -> str | None:
    """Run a world; return what broke, or None. Whatever is raised is a failure: nothing may be."""
    try:
        world.run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def shrink(swarm: Swarm, error: str) -> Failure:
    """Drop events and network faults while something still breaks."""
    smallest, known = swarm, error
    changed = True
    while changed:
        changed = False
        for candidate in _smaller(smallest):
            found = attempt(World(candidate))
            if found is not None:
                smallest, known, changed = candidate, found, True
                break
    rates = [f"{name} {rate:g}" for name in ("loss", "duplication", "reordering") if (rate := getattr(smallest, name))]
    script = [f"{event.at:.3f} s {event.action} ({event.number})" for event in smallest.script]
    return Failure(swarm.seed, known, rates + script)


def _smaller(swarm: Swarm) -> Iterable[Swarm]:
    """Return the same swarm with one thing less, in turn."""
    for index in reversed(range(len(swarm.script))):
        smaller = copy.copy(swarm)
        smaller.script = swarm.script[:index] + swarm.script[index + 1 :]
        yield smaller
    for rate in ("loss", "duplication", "reordering"):
        if getattr(swarm, rate):
            smaller = copy.copy(swarm)
            setattr(smaller, rate, 0.0)
            yield smaller
