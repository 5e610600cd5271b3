"""`octavo top`: what a server does right now, in the terminal."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from octavo.services.cli import terminal
from octavo.services.common import config as config_loader

if TYPE_CHECKING:
    from rich.table import Table

    from octavo.inference.v1 import load_pb2

_COLUMNS = (
    "scheduler", "running", "waiting", "queue", "out tok/s", "prompt tok/s", "cache used", "cache hits", "preempted",
)  # fmt: skip
_WORKER_COLUMNS = ("worker", "running", "tok/s", "cache used")


@dataclass(frozen=True, kw_only=True)
class TopConfig:
    """Settings of `octavo top`."""

    address: str = field(default="127.0.0.1:50051", metadata={"help": "the server: host:port or unix:PATH"})
    api_key: str = field(
        default="", metadata={"help": "a key of a server that needs one; better in the environment: OCTAVO_API_KEY"}
    )
    interval_s: float = field(default=1.0, metadata={"help": "how often to look"})
    once: bool = field(default=False, metadata={"help": "look twice, an interval apart, print that and end"})

    def __post_init__(self) -> None:
        if not 0.05 <= self.interval_s <= 3600:
            raise ValueError(f"--interval-s must be from 50ms to an hour, not {self.interval_s:g}")


def main(argv: Sequence[str]) -> int:
    """Show the load until Ctrl-C; `argv[0]` is the command's name. Return 1, with a line on stderr, if that fails."""
    config = config_loader.load(
        TopConfig, argv[1:], prog="octavo top", description="Shows what a server does right now; Ctrl-C ends."
    )
    return asyncio.run(_watch(config))


@dataclass(frozen=True)
class Look:
    """The schedulers' load at one time, by scheduler."""

    at: float
    loads: Mapping[str, load_pb2.SchedulerLoad]


async def _watch(config: TopConfig) -> int:
    from rich.console import Console, Group
    from rich.live import Live

    from octavo.services.client import Client, OctavoError

    console = Console()
    async with Client(config.address, token=config.api_key, timeout_s=10) as client:

        async def look() -> Look:
            return Look(time.monotonic(), {load.scheduler_id: load for load in await client.load()})

        try:
            before = await look()
            if config.once:
                await asyncio.sleep(config.interval_s)
                now = await look()
                console.print(make_table(before, now), make_worker_table(now))
                return 0
            with Live(console=console, auto_refresh=False, screen=True) as live:
                while True:
                    await asyncio.sleep(config.interval_s)
                    now = await look()
                    live.update(Group(make_table(before, now), make_worker_table(now)), refresh=True)
                    before = now
        except OctavoError as error:
            print(f"octavo top: {terminal.hint(error, error.reason, config.address)}", file=sys.stderr)
            return 1


def make_table(before: Look, now: Look) -> Table:
    """Return a row for each scheduler; rates are those since the look before."""
    from rich.table import Table

    models = sorted({load.model for load in now.loads.values()})
    table = Table(*_COLUMNS, title=", ".join(models) or "no scheduler is connected", title_justify="left")
    for name, load in now.loads.items():
        table.add_row(name, *_cells(before.loads.get(name), load, now.at - before.at))
    return table


def _cells(before: load_pb2.SchedulerLoad | None, load: load_pb2.SchedulerLoad, seconds: float) -> Iterator[str]:
    def rate(old: int, new: int) -> str:
        # Less than before: it has started again.
        return "-" if before is None or new < old or seconds <= 0 else f"{(new - old) / seconds:.0f}"

    yield str(load.running)
    yield f"{load.waiting} ({load.waiting_uncached_tokens} tok)"
    yield "draining" if load.draining else f"{load.estimated_queue_ms / 1000:.1f} s"
    yield rate(before.output_tokens if before else 0, load.output_tokens)
    yield rate(before.prompt_tokens if before else 0, load.prompt_tokens)
    yield _used(load.kv_blocks_free, load.kv_blocks_total)
    yield f"{load.cached_tokens / load.looked_up_tokens:.0%}" if load.looked_up_tokens else "-"
    yield str(load.preemptions)


def make_worker_table(now: Look) -> Table:
    """Return a row for each worker of all schedulers."""
    from rich.table import Table

    table = Table(*_WORKER_COLUMNS)
    for name, load in now.loads.items():
        for worker in load.workers:
            used = _used(worker.kv_blocks_free, worker.kv_blocks_total)
            table.add_row(f"{name} / {worker.worker_id}", str(worker.running), f"{worker.tokens_per_s:.0f}", used)
    return table


def _used(free: int, total: int) -> str:
    return f"{1 - free / total:.0%} of {total}" if total else "-"
