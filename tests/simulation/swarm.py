"""What one seed runs: limits, rates of faults, and a script of what happens when. All drawn from the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

FAULTS = (
    "cancel", "cancel_early", "worker_crash", "worker_hang", "worker_slow", "worker_fault", "partition",
    "not_finite", "stream_break", "gateway_death", "scheduler_restart", "drain", "flush",
)  # fmt: skip


@dataclass
class Event:
    """An entry of the script: an action at a time, with a number to draw its details from."""

    at: float
    action: str
    number: int


@dataclass
class Swarm:
    """The drawn configuration of one seed."""

    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    num_blocks: int = 0
    max_model_len: int = 0
    num_workers: int = 1
    windows: tuple[int, ...] = (0,)  # of the KV groups
    small_blocks: int = 0  # of every other worker; 0: as many as the others
    outputs: tuple[int, ...] = (1, 2, 9, 24)  # lengths that are asked for
    num_gateways: int = 1
    loss: float = 0.0  # of a frame between scheduler and worker
    duplication: float = 0.0
    reordering: float = 0.0
    lateness: float = 0.0  # of rows that get no token yet
    max_row_tokens: int = 1  # of a step
    max_delay_s: float = 0.0
    step_s: float = 0.0
    token_s: float = 0.0  # what a step takes more for each of its tokens, at first
    tells_progress: bool = False  # workers count what they do, and the processor time they had
    max_unsent: int = 3  # messages that wait for a gateway that does not read
    deadlines: tuple[int, ...] = (0, 0, 0, 300)  # in milliseconds; 0: none
    check_every: int = 1  # events after which all books are checked
    patience_s: float = 120.0  # after the last fault everything must have ended
    poison: bool = False  # one prompt kills whoever computes it
    script: list[Event] = field(default_factory=list)
    faults_end: float = 0.0


def draw(seed: int, more: bool = True) -> Swarm:
    """Draw the swarm of a seed. Most kinds of fault are absent from most seeds, so that some get far.

    Without `more` it is what the seed was before `_draw_more` was written.
    """
    rng = random.Random(seed)
    max_num_seqs = rng.choice([1, 2, 4, 16])
    swarm = Swarm(
        seed,
        settings={
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max(max_num_seqs, rng.choice([1, 8, 33, 100])),
            "max_prefill_tokens": rng.choice([1, 16, 50]),
            "max_waiting": rng.choice([3, 30]),
            "max_recoveries": 1000,
            "worker_grace_s": rng.choice([0.5, 15.0]),
            "step_timeout_s": 2.0,
            "ageing_tokens_per_s": rng.choice([0.0, 100.0, 1e6]),
            "tenant_max_requests": rng.choice([0, 0, 0, 2]),
        },
        num_blocks=rng.choice([6, 9, 20, 60]),
        max_model_len=rng.choice([60, 90, 1000]),
        num_workers=rng.choice([1, 1, 2, 3]),
        num_gateways=rng.choice([1, 2]),
        max_delay_s=rng.choice([0.0005, 0.003]),
        step_s=rng.choice([0.002, 0.01, 0.03]),
        poison=rng.random() < 0.1,
    )
    if rng.random() < 0.3:
        swarm.loss = rng.choice([0.005, 0.02])
    if rng.random() < 0.3:
        swarm.duplication = rng.choice([0.02, 0.1])
    if rng.random() < 0.25:
        swarm.reordering = 0.02 if seed % 2 else 0.1
    swarm.max_row_tokens = random.Random(f"tokens {seed}").choice([1, 1, 4, 16])
    swarm.lateness = random.Random(f"late {seed}").choice([0.0, 0.0, 0.1, 0.6])
    kinds = rng.sample(FAULTS, rng.choice([0, 1, 2, 3, 5]))
    swarm.faults_end = rng.choice([0.2, 0.6, 1.5])
    for _ in range(rng.choice([1, 3, 6])):
        swarm.script.append(Event(rng.uniform(0.0, swarm.faults_end), "submit", rng.getrandbits(30)))
    for kind in kinds:
        for _ in range(rng.choice([1, 1, 2, 4])):
            swarm.script.append(Event(rng.uniform(0.0, swarm.faults_end), kind, rng.getrandbits(30)))
    if more:
        _draw_more(swarm, random.Random(f"more {seed}"))
    rng = random.Random(f"windows {seed}")
    if more and rng.random() < 0.4:
        swarm.windows = rng.choice([(0, 20), (0, 5, 5), (0, 0, 40), (7,), (33,), (0, 16, 50)])
        swarm.num_blocks *= rng.choice([1, len(swarm.windows)])
        swarm.num_blocks = max(swarm.num_blocks, 12)
        swarm.small_blocks = swarm.small_blocks and 8
    swarm.script.sort(key=lambda event: event.at)
    return swarm


def _draw_more(swarm: Swarm, rng: random.Random) -> None:
    """Draw what is rarer, and make most worlds small: most bugs show in those, and more of them can be run."""
    swarm.check_every = rng.choice([1, 8, 16, 32, 32, 32, 32, 32])
    is_small = rng.random() < 0.85
    if is_small:
        swarm.outputs = 1, 2, 9
        surplus = [event for event in swarm.script if event.action == "submit"][3:]
        swarm.script = [event for event in swarm.script if event not in surplus]
    elif rng.random() < 0.4:
        _draw_small_pool(swarm, rng)
    if rng.random() < 0.2:
        swarm.num_workers = max(swarm.num_workers, 2)
        swarm.num_blocks = max(swarm.num_blocks, 9)
        swarm.small_blocks = rng.choice([3, 5])
    swarm.tells_progress = rng.random() < 0.4
    swarm.max_unsent = rng.choice([3, 12])
    for kind, share in (
        ("resume_again", 0.3), ("gateway_death", 0.1), ("gateway_slow", 0.1), ("clock_jump", 0.08),
        ("clock_stop", 0.05), ("exception", 0.08),
    ):  # fmt: skip
        if rng.random() < share:
            for _ in range(rng.choice([1, 2, 4])):
                _add(swarm, rng, kind, 1.5)
    if rng.random() < 0.12:
        swarm.deadlines = rng.choice([(100, 300), (100, 300, 1000, 3000), (0, 1000)])
        for _ in range(rng.choice([0, 6])):
            _add(swarm, rng, "submit")
    if rng.random() < 0.04:
        _draw_restarted_gateway(swarm, rng)
    if rng.random() < 0.03:
        _draw_long_steps(swarm, rng)
    elif rng.random() < 0.004:
        _draw_crowd(swarm, rng)


def _add(swarm: Swarm, rng: random.Random, action: str, until: float = 1.0) -> None:
    swarm.script.append(Event(rng.uniform(0.0, until * swarm.faults_end), action, rng.getrandbits(30)))


def _draw_small_pool(swarm: Swarm, rng: random.Random) -> None:
    """Outputs outgrow the pool: sequences are preempted, often with a step in flight."""
    swarm.num_blocks, swarm.max_model_len = rng.choice([8, 12]), 1000
    swarm.outputs = 24, 60, 90
    swarm.settings |= {"max_num_seqs": 16, "max_num_batched_tokens": 33}
    swarm.step_s = min(swarm.step_s, 0.01)
    for _ in range(rng.choice([2, 5])):
        _add(swarm, rng, "submit", 0.5)
    for _ in range(rng.choice([0, 1, 3])):
        _add(swarm, rng, "worker_crash")
    swarm.script.append(Event(0.0, "crash_at_preemption", swarm.seed))


def _draw_restarted_gateway(swarm: Swarm, rng: random.Random) -> None:
    """A gateway starts again and gives its handles to new requests, while clients ask for the outputs of old ones."""
    swarm.num_gateways, swarm.faults_end = 1, 1.5
    for action, begin, end, count in (
        ("submit", 0.0, 0.3, 3),
        ("gateway_death", 0.2, 0.4, 1),
        ("submit", 0.75, 1.2, 4),
        ("resume_again", 0.75, 1.3, 4),
    ):
        for _ in range(count):
            swarm.script.append(Event(rng.uniform(begin, end), action, rng.getrandbits(30)))


def _draw_long_steps(swarm: Swarm, rng: random.Random) -> None:
    """Prompts take up to minutes, on workers of different speed that changes."""
    swarm.token_s = rng.choice([0.05, 0.3, 1.0])
    swarm.outputs = 1, 2
    swarm.settings |= {"max_num_batched_tokens": max(33, swarm.settings["max_num_seqs"])}
    if not swarm.tells_progress:
        swarm.settings |= {"step_timeout_s": 200.0}
    swarm.patience_s = 3000.0
    for _ in range(3):
        _add(swarm, rng, "speed_change", 3.0)


def _draw_crowd(swarm: Swarm, rng: random.Random) -> None:
    """A thousand tenants come at once."""
    swarm.script.append(Event(rng.uniform(0.0, swarm.faults_end), "crowd", rng.getrandbits(30)))
    swarm.settings |= {
        "max_waiting": 3000,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 100,
        "max_prefill_tokens": 100,
    }
    swarm.num_blocks = max(swarm.num_blocks, 20)
    swarm.step_s = min(swarm.step_s, 0.01)
    swarm.check_every = 400
