"""`octavo top`: what a server does right now, in the terminal."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from octavo.services.cli import server_options, terminal
from octavo.services.cli.server_options import ServerConfig

if TYPE_CHECKING:
    from rich.table import Table

    from octavo.common.v1 import common_pb2
    from octavo.inference.v1 import load_pb2

_COLUMNS: tuple[str, ...] = (
    "scheduler", "running", "waiting", "waiting tokens", "queue", "out tok/s", "prompt tok/s", "cache used",
    "cache hits", "preempted",
)  # fmt: skip
_WORKER_COLUMNS: tuple[str, ...] = ("worker", "running", "tok/s", "cache used")


@dataclass(frozen=True, kw_only=True)
class TopConfig(ServerConfig):
    """Settings of `octavo top`."""

    interval_s: float = field(default=1.0, metadata={"help": "how often to look"})
    once: bool = field(default=False, metadata={"help": "look twice, an interval apart, print that and end"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.05 <= self.interval_s <= 3600:
            raise ValueError(f"--interval-s must be from 50ms to an hour, not {self.interval_s:g}")


def main(argv: Sequence[str]) -> int:
    """Show the load until Ctrl-C; `argv[0]` is the command's name. Return 1, with a line on stderr, if that fails."""
    config = server_options.load(
        TopConfig, argv[1:], prog="octavo top", description="Shows what a server does right now; Ctrl-C ends."
    )
    if not config.once and importlib.util.find_spec("rich") is None:
        print("octavo top: rich is missing: pip install rich, or give --once", file=sys.stderr)
        return 1
    return asyncio.run(_watch(config))


@dataclass(frozen=True)
class Look:
    """The schedulers' load at one time, by scheduler."""

    at: float
    loads: Mapping[str, load_pb2.SchedulerLoad]


async def _watch(config: TopConfig) -> int:
    from octavo.services.client import OctavoError

    async with config.client(timeout_s=10) as client:

        async def look() -> Look:
            return Look(time.monotonic(), {load.scheduler_id: load for load in await client.load()})

        try:
            before = await look()
            if config.once:
                await asyncio.sleep(config.interval_s)
                now = await look()
                _print(before, now)
                return 0
            from rich.console import Console, Group
            from rich.live import Live

            with Live(console=Console(), auto_refresh=False, screen=True) as live:
                while True:
                    await asyncio.sleep(config.interval_s)
                    now = await look()
                    live.update(Group(*_tables(before, now)), refresh=True)
                    before = now
        except OctavoError as error:
            print(f"octavo top: {config.explain(error)}", file=sys.stderr)
            return 1


def _print(before: Look, now: Look) -> None:
    """Print the tables: drawn for a person, in plain columns for a pipe."""
    if terminal.is_terminal() and importlib.util.find_spec("rich"):
        from rich.console import Console

        Console().print(*_tables(before, now))
        return
    print(_title(now))
    for rows in (scheduler_rows(before, now), worker_rows(now)):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _tables(before: Look, now: Look) -> list[Table]:
    """Return what is drawn: it fits 80 columns if names are short."""
    from rich.table import Table

    tables = []
    for title, rows in ((_title(now), scheduler_rows(before, now)), (None, worker_rows(now))):
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
        for name in rows[0]:
            # Two words of a header stand in two lines, which takes half the width.
            table.add_column(name.replace(" ", "\n", 1), overflow="fold")
        for row in rows[1:]:
            table.add_row(*row)
        tables.append(table)
    return tables


def _title(now: Look) -> str:
    models = ", ".join(sorted({load.model for load in now.loads.values()})) or "no scheduler is connected"
    accepted = sum(load.accepted_tokens for load in now.loads.values())
    made = sum(load.output_tokens for load in now.loads.values())
    lines = [f"{models}: {accepted / made:.0%} of tokens guessed" if accepted else models]
    by_name: dict[str, list[common_pb2.Proposer]] = {}
    for each in (proposer for load in now.loads.values() for proposer in load.proposers):
        by_name.setdefault(each.name, []).append(each)
    for name, of_all in sorted(by_name.items()):
        drafted, right, time_us = (
            sum(getattr(each, field) for each in of_all) for field in ("drafted_tokens", "accepted_tokens", "time_us")
        )
        lines.append(f"  {name}: {right} of {drafted} tokens right, in {time_us / 1e6:.1f} s")
    return "\n".join(lines)


def scheduler_rows(before: Look, now: Look) -> list[tuple[str, ...]]:
    """Return the header and a row for each scheduler; rates are those since the look before."""
    rows = [_COLUMNS]
    for name, load in now.loads.items():
        rows.append((name, *_cells(before.loads.get(name), load, now.at - before.at)))
    return rows


def _cells(before: load_pb2.SchedulerLoad | None, load: load_pb2.SchedulerLoad, seconds: float) -> Iterator[str]:
    def rate(old: int, new: int) -> str:
        # Less than before: it has started again.
        return "-" if before is None or new < old or seconds <= 0 else f"{(new - old) / seconds:.0f}"

    yield str(load.running)
    yield str(load.waiting)
    yield str(load.waiting_uncached_tokens)
    yield "draining" if load.draining else f"{load.estimated_queue_ms / 1000:.1f} s"
    yield rate(before.output_tokens if before else 0, load.output_tokens)
    yield rate(before.prompt_tokens if before else 0, load.prompt_tokens)
    yield f"{1 - load.kv_blocks_free / load.kv_blocks_total:.0%}" if load.kv_blocks_total else "-"
    yield f"{load.cached_tokens / load.looked_up_tokens:.0%}" if load.looked_up_tokens else "-"
    yield str(load.preemptions)


def worker_rows(now: Look) -> list[tuple[str, ...]]:
    """Return the header and a row for each worker of all schedulers."""
    rows = [_WORKER_COLUMNS]
    for name, load in now.loads.items():
        for worker in load.workers:
            total = worker.kv_blocks_total
            used = f"{1 - worker.kv_blocks_free / total:.0%} of {total}" if total else "-"
            rows.append((f"{name} / {worker.worker_id}", str(worker.running), f"{worker.tokens_per_s:.0f}", used))
    return rows
