"""Runs seeds, and makes a failing one small."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from .swarm import Swarm, draw
from .world import World, quiet


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


def run_seeds(seeds: Iterable[int], max_seconds: float = float("inf")) -> Summary:
    """Run seeds until one fails, none is left or the time is up."""
    quiet()
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
            summary.failure = shrink(swarm, error)
            break
        if summary.seconds > max_seconds:
            break
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
