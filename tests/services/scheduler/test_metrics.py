"""What is counted of the scheduler's work, and what of it is traced."""

from __future__ import annotations

import pytest

from octavo.services.scheduler.core.metrics import SchedulerMetrics, SpanRecord
from octavo.services.telemetry import catalog
from octavo.services.telemetry.store import Store

from .simulation import World, expected_output

PROMPT = list(range(100, 140))
STEP_S = 0.01
PARENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
NOT_RECORDED = PARENT[:-2] + "00"


@pytest.fixture
def store() -> Store:
    return Store(catalog.SCHEDULER)


def counted(store: Store, metric: catalog.Metric, *labels: str) -> int:
    return sum(store.histogram(metric, *labels).counts)


def run_with_gaps(world: World, gap_s: float) -> None:
    """Answer steps one after the other, each so long after the one before."""
    while world.core.num_requests:
        step(world, gap_s)


def step(world: World, gap_s: float) -> None:
    """Answer a step after so long; a step of the world takes time of its own."""
    before = world.now
    world.now += gap_s - STEP_S
    world.step()
    assert world.now == pytest.approx(before + gap_s)


def test_every_gap_between_two_tokens_of_a_sequence_is_counted_and_first_tokens_are_not(store: Store) -> None:
    world = World(metrics=SchedulerMetrics(store))
    for number in range(3):
        world.submit([*PROMPT, number], max_new_tokens=5)
    run_with_gaps(world, 0.012)

    gaps = store.histogram(catalog.ITL)
    assert sum(gaps.counts) == 3 * 4
    assert gaps.sum == pytest.approx(12 * 0.012)
    assert counted(store, catalog.QUEUE_TIME) == counted(store, catalog.PREFILL_TIME) == 3
    assert counted(store, catalog.DECODE_TIME) == 3
    assert store.histogram(catalog.DECODE_TIME).sum == pytest.approx(3 * 4 * 0.012)


def test_a_token_computed_again_after_a_loss_comes_after_a_longer_gap(store: Store) -> None:
    world = World(metrics=SchedulerMetrics(store))
    stream = world.submit(PROMPT, max_new_tokens=4)
    step(world, 0.01)
    step(world, 0.01)
    world.lose("group-0", crashed=True)
    world.now += 3.0
    world.join("group-0")
    run_with_gaps(world, 0.01)

    gaps = store.histogram(catalog.ITL)
    assert stream.tokens[0] == expected_output(PROMPT, 4)
    assert sum(gaps.counts) == 3
    assert gaps.sum == pytest.approx(0.01 + 3.01 + 0.01)
    assert store.value(catalog.WORKER_LOSSES, "true").value == 1
    assert store.value(catalog.RECOVERIES).value == 1


def test_tokens_are_counted_as_they_are_computed_looked_up_and_found(store: Store) -> None:
    world = World(metrics=(metrics := SchedulerMetrics(store)))
    world.submit(PROMPT, max_new_tokens=6)
    world.run()
    again = world.submit(PROMPT, max_new_tokens=6)
    world.run()

    found = again.finished[0].usage.cached_prompt_tokens
    assert found == 32
    assert metrics.looked_up_tokens == 2 * len(PROMPT)
    assert metrics.cached_tokens == found
    assert metrics.prompt_tokens == 2 * len(PROMPT) - found
    assert metrics.output_tokens == 12
    load = world.core.load(world.now)
    assert (load.prompt_tokens, load.output_tokens) == (metrics.prompt_tokens, 12)
    assert (load.looked_up_tokens, load.cached_tokens) == (2 * len(PROMPT), found)
    assert [(worker.worker_id, worker.running) for worker in load.workers] == [("group-0", 0)]
    assert load.workers[0].tokens_per_s > 0 or world.now == 1000.0


def test_preemptions_and_refusals_are_counted(store: Store) -> None:
    world = World(num_blocks=7, metrics=(metrics := SchedulerMetrics(store)), max_waiting=2)
    streams = [world.submit([n] * 30, max_new_tokens=60) for n in range(2)]
    world.run()
    assert all(stream.finished for stream in streams)
    assert metrics.preemptions == sum(stream.finished[0].timing.preemptions for stream in streams) > 0
    world.core.drain()
    world.submit(PROMPT)
    assert store.value(catalog.REFUSALS, "DRAINING").value == 1
    assert store.value(catalog.ADMISSIONS).value == 2


def test_a_traced_request_has_spans_that_follow_each_other_and_one_for_a_recovery() -> None:
    world = World(metrics=(metrics := SchedulerMetrics(traces=True)))
    world.submit(PROMPT, max_new_tokens=4, traceparent=PARENT)
    world.submit(PROMPT[:20], max_new_tokens=4, traceparent=NOT_RECORDED)
    world.submit(PROMPT[:10], max_new_tokens=4)
    step(world, 0.5)
    world.lose("group-0")
    world.now += 2.0
    world.join("group-0")
    run_with_gaps(world, 0.01)

    spans: dict[str, SpanRecord] = {span.name: span for span in metrics.take_spans()}
    assert list(spans) == ["octavo.recovery", "octavo.queue", "octavo.prefill", "octavo.decode"]
    assert {span.traceparent for span in spans.values()} == {PARENT}
    recovery, queue, prefill, decode = spans.values()
    assert (recovery.start, recovery.end) == (1000.5, 1002.5)
    assert queue.start == 1000.0
    assert queue.end == prefill.start
    assert prefill.end == decode.start == 1000.5
    assert decode.end > recovery.end
    assert decode.attributes["octavo.output_tokens"] == 4
    assert metrics.take_spans() == []


def test_the_worker_is_told_only_of_traces_that_are_recorded() -> None:
    world = World()
    for traceparent in (PARENT, NOT_RECORDED, ""):
        world.submit(PROMPT, traceparent=traceparent)
    world.run()
    told = [update.traceparent for plan in world.plans for update in plan.sampling_updates]
    assert told == [PARENT, "", ""]
