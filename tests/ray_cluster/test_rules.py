"""When an engine counts as stuck, and how many engines there should be: without a cluster."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from octavo.ray import QueuePolicy, build
from octavo.ray.data_actors import with_columns
from octavo.ray.engine import Progress, Sample

IDLE = Sample(running=0, waiting=0, queue_s=0, kv_usage=0, workers=1, steps=0)


def test_a_scrape_is_summed_over_labels() -> None:
    text = (
        "# TYPE octavo_sequences_running gauge\noctavo_sequences_running 3\n"
        "# TYPE octavo_steps counter\noctavo_steps_total 7\n"
        "# TYPE octavo_kv_cache_usage_ratio gauge\noctavo_kv_cache_usage_ratio 0.5\n"
        "# TYPE octavo_workers_ready gauge\noctavo_workers_ready 2\n"
    )
    assert Sample.parse(text) == Sample(running=3, waiting=0, queue_s=0, kv_usage=0.5, workers=2, steps=7)


def test_work_without_a_step_is_a_problem_and_idleness_is_none() -> None:
    progress = Progress(60.0, now=0.0)
    assert progress.problem(IDLE, 1000.0) == ""
    busy = replace(IDLE, running=1, waiting=2, steps=5)
    assert progress.problem(busy, 1001.0) == ""
    assert progress.problem(busy, 1050.0) == ""
    assert progress.problem(busy, 1062.0) == "3 sequences and no step for 61 s"
    assert progress.problem(replace(busy, steps=6), 1063.0) == ""


def test_an_engine_without_a_worker_has_some_time_to_get_one() -> None:
    progress = Progress(60.0, now=0.0)
    none = replace(IDLE, workers=0)
    assert progress.problem(none, 59.0) == ""
    assert progress.problem(none, 61.0) == "no worker for 61 s"
    assert progress.problem(IDLE, 62.0) == ""


def wanted(sequences: dict[str, float], queue_s: float = 0.0, current: int = 2) -> int:
    metrics: dict[str, Any] = {"sequences": sequences, "queue_s": dict.fromkeys(sequences, queue_s)}
    ctx = SimpleNamespace(aggregated_metrics=metrics, current_num_replicas=current, target_num_replicas=7)
    return QueuePolicy(target_sequences=10, max_queue_s=5)(ctx)[0]


def test_engines_are_as_many_as_their_sequences_need() -> None:
    assert wanted({"a": 10, "b": 10}) == 2
    assert wanted({"a": 31, "b": 10}) == 5
    assert wanted({"a": 0, "b": 0}) == 1
    assert wanted({"a": 20}) == 4, "one that has not reported counts like the others"
    assert wanted({"a": 1, "b": 1}, queue_s=6.0) == 3, "a long queue wants one more"
    assert wanted({}) == 7, "nothing is known: as it is"


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        QueuePolicy(target_sequences=0)


def test_a_command_line_builds_an_application() -> None:
    assert build({"model": "demo", "engines": "2"}) is not None


def test_a_column_that_is_there_already_is_not_overwritten() -> None:
    table = pa.table({"prompt": ["x"], "text": ["mine"]})
    with pytest.raises(ValueError, match="has a column text already: choose a prefix"):
        with_columns(table, "", {"text": pa.array(["ours"])})
    assert with_columns(table, "o_", {"text": pa.array(["ours"])}).column_names == ["prompt", "text", "o_text"]
