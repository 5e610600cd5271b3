"""Shows measurements: a table to read, and JSON."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from octavo.services.bench.outcomes import Run, median_run

_COLUMNS = (
    "case", "requests", "failed", "out tok/s", "(min-max)", "in tok/s", "goodput", "TTFT p50", "p99", "ITL p50", "p99",
    "TPOT p50", "CPU ms/tok",
)  # fmt: skip


def table(runs: Mapping[str, Sequence[Run]]) -> str:
    """Return a Markdown table: for each case the median run of its repeats. Times are milliseconds."""
    rows = [_COLUMNS, *(_row(case, repeats) for case, repeats in runs.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def _row(case: str, repeats: Sequence[Run]) -> tuple[str, ...]:
    run = median_run(repeats)
    rates = [other.output_rate for other in repeats]
    times = (run.ttft_p50, run.ttft_p99, run.itl_p50, run.itl_p99, run.tpot_p50, run.cpu_per_token)
    return (
        case,
        str(run.requests),
        str(sum(other.failed for other in repeats)),
        f"{run.output_rate:,.0f}",
        f"{min(rates):,.0f}-{max(rates):,.0f}",
        f"{run.prompt_rate:,.0f}",
        f"{run.goodput:,.0f}",
        *(_milliseconds(seconds) for seconds in times),
    )


def _milliseconds(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    return f"{1000 * seconds:.2f}" if seconds < 0.1 else f"{1000 * seconds:,.0f}"


def document(runs: Mapping[str, Sequence[Run]], **facts: Any) -> dict[str, Any]:
    """Return everything that was measured, with facts of the machine, for JSON."""
    return {
        "machine": machine_facts(),
        **facts,
        "runs": {case: [_plain(run) for run in repeats] for case, repeats in runs.items()},
    }


def machine_facts() -> dict[str, Any]:
    """Return what a reader of a figure must know of the machine."""
    cpu = platform.processor()
    flags: set[str] = set()
    if Path("/proc/cpuinfo").exists():
        fields = dict(
            line.split(":", 1)
            for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
            if ":" in line
        )
        by_name = {name.strip(): value.strip() for name, value in fields.items()}
        cpu = by_name.get("model name", cpu)
        flags = set(by_name.get("flags", by_name.get("Features", "")).split())
    known = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16")
    return {
        "cpu": cpu,
        "instruction_sets": [name for name in known if name in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def plot(runs: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Draw output rate and latencies by case. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    best = [median_run(repeats) for repeats in runs.values()]
    figure = Figure(figsize=(9, 4), layout="constrained")
    rate, latency = figure.subplots(1, 2)
    rate.bar([run.case for run in best], [run.output_rate for run in best])
    rate.set_ylabel("output tokens/s")
    for name in ("ttft_p50", "itl_p50", "itl_p99"):
        latency.plot([run.case for run in best], [1000 * getattr(run, name) for run in best], "o-", label=name)
    latency.set_ylabel("ms")
    latency.set_yscale("log")
    latency.legend()
    figure.savefig(path)


def _plain(run: Run) -> dict[str, Any]:
    """Return a run's fields; JSON has no nan."""
    fields = {**dataclasses.asdict(run), "cpu_per_token": run.cpu_per_token}
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in fields.items()}
