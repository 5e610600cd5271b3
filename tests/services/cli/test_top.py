"""What `octavo top` shows, in 80 columns and in a pipe."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import load_pb2
from octavo.services.cli import top

WORKER = load_pb2.WorkerLoad(
    worker_id="worker-0", running=64, tokens_per_s=1234, kv_blocks_free=10, kv_blocks_total=8192
)
LOAD = load_pb2.SchedulerLoad(
    scheduler_id="scheduler", model="smollm2-135m-instruct", running=64, waiting=200, waiting_uncached_tokens=123_456,
    estimated_queue_ms=12_300, output_tokens=5_000, prompt_tokens=90_000, kv_blocks_free=10, kv_blocks_total=8192,
    cached_tokens=99, looked_up_tokens=100, preemptions=12, workers=[WORKER],
)  # fmt: skip
BEFORE, NOW = top.Look(0.0, {"scheduler": load_pb2.SchedulerLoad()}), top.Look(1.0, {"scheduler": LOAD})
HEADER = ["scheduler", "running", "waiting", "waiting tokens", "queue", "out tok/s", "prompt tok/s", "cache used"]


def test_80_columns_have_room_for_every_header_and_figure() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(*top._tables(BEFORE, NOW))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown
    for word in (*" ".join(HEADER).split(), "preempted", "123456", "90000", "100% of 8192", "scheduler / worker-0"):
        assert word in shown, shown


def test_the_title_says_how_many_tokens_were_guessed() -> None:
    load = load_pb2.SchedulerLoad(model="m", output_tokens=200, accepted_tokens=50)
    assert top._title(top.Look(0.0, {"scheduler": load})) == "m: 25% of tokens guessed"


def test_the_title_says_what_each_proposer_guessed_on_all_schedulers() -> None:
    proposers = [common_pb2.Proposer(name="repetition", drafted_tokens=90, accepted_tokens=40, time_us=1_500_000)]
    loads = {
        "a": load_pb2.SchedulerLoad(model="m", output_tokens=200, accepted_tokens=40, proposers=proposers),
        "b": load_pb2.SchedulerLoad(
            model="m", proposers=[*proposers, common_pb2.Proposer(name="grammar", drafted_tokens=5, accepted_tokens=5)]
        ),
    }
    assert top._title(top.Look(0.0, loads)).splitlines()[1:] == [
        "  grammar: 5 of 5 tokens right, in 0.0 s",
        "  repetition: 80 of 180 tokens right, in 3.0 s",
    ]


def test_a_pipe_gets_plain_columns_and_needs_no_rich(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    top._print(BEFORE, NOW)
    title, header, row, _, worker = capsys.readouterr().out.splitlines()
    assert title == "smollm2-135m-instruct"
    assert header.startswith("  ".join(HEADER[:3]))
    assert " ".join(row.split()) == "scheduler 64 200 123456 12.3 s 5000 90000 100% 99% 12"
    assert " ".join(worker.split()) == "scheduler / worker-0 64 1234 100% of 8192"
