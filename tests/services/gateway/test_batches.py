"""The folder of files and batches, and the jobs that run them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from octavo.services.batch.lines import Line
from octavo.services.batch.results import Answer
from octavo.services.common.errors import Reason, ServingError
from octavo.services.gateway.batches.job import BatchJob
from octavo.services.gateway.batches.jobs import BatchJobs, JobLimits
from octavo.services.gateway.batches.store import BatchStore, StoredBatch, StoreLimits


@pytest.fixture
def store(tmp_path: Path) -> BatchStore:
    return BatchStore(tmp_path / "store", StoreLimits(1 << 20, 10_000, max_files=3, max_batches=2))


def add_file(store: BatchStore, count: int = 5, tenant: str = "t") -> str:
    path = store.temporary_path()
    path.write_text("".join(f'{{"custom_id": "c{number}", "prompt": "{number}"}}\n' for number in range(count)))
    return store.add_file(tenant, "in.jsonl", "batch", path).id


def add_batch(store: BatchStore, count: int = 5, window_s: int = 3600) -> StoredBatch:
    return store.add_batch("t", "/v1/completions", add_file(store, count), window_s, None)


async def answer(line: Line) -> Answer:
    return Answer(200 if line.index != 3 else 400, "r", {"n": line.index})


def job(store: BatchStore, batch: StoredBatch, max_requests: int = 100) -> BatchJob:
    return BatchJob(store, batch, lambda batch: answer, window=2, max_requests=max_requests)


def contents(store: BatchStore, file_id: str | None) -> list[str]:
    assert file_id is not None
    return sorted(json.loads(line)["custom_id"] for line in store.data_path(file_id).read_text().splitlines())


async def test_a_job_goes_through_its_states(store: BatchStore) -> None:
    batch = add_batch(store)
    await job(store, batch).run()
    kept = store.batch("t", batch.id)
    assert (kept.status, kept.total, kept.completed, kept.failed) == ("completed", 5, 4, 1)
    assert contents(store, kept.output_file_id) == ["c0", "c1", "c2", "c4"]
    assert contents(store, kept.error_file_id) == ["c3"]
    assert not store.results_path(batch).exists()


async def test_a_job_that_is_stopped_anywhere_is_gone_on_with(store: BatchStore) -> None:
    """Stop it after each number of results; the next one does the rest."""
    for stop_after in range(5):
        batch = add_batch(store)
        seen = 0
        blocked = asyncio.Event()

        async def stopping(line: Line, stop_after: int = stop_after, blocked: asyncio.Event = blocked) -> Answer:
            nonlocal seen
            if seen >= stop_after:
                blocked.set()
                await asyncio.Event().wait()
            seen += 1
            return await answer(line)

        first = asyncio.create_task(BatchJob(store, batch, lambda _, send=stopping: send, 1, 100).run())
        await blocked.wait()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        left = store.batch("t", batch.id)
        assert left.status == "in_progress"
        await job(store, left).run()
        kept = store.batch("t", batch.id)
        assert (kept.status, kept.completed, kept.failed) == ("completed", 4, 1)
        for file in store.files("t"):
            store.delete_file("t", file.id)


async def test_what_is_not_answered_in_time_expires(store: BatchStore) -> None:
    batch = add_batch(store, window_s=0)

    async def never(line: Line) -> Answer:
        await asyncio.Event().wait()
        raise AssertionError(line)

    await BatchJob(store, batch, lambda batch: never, window=2, max_requests=100).run()
    kept = store.batch("t", batch.id)
    assert (kept.status, kept.failed) == ("expired", 5)
    assert contents(store, kept.error_file_id) == [f"c{number}" for number in range(5)]


async def test_a_batch_of_too_many_requests_fails(store: BatchStore) -> None:
    batch = add_batch(store)
    await job(store, batch, max_requests=4).run()
    assert store.batch("t", batch.id).status == "failed"


async def test_one_of_two_gateways_runs_a_batch(store: BatchStore) -> None:
    batch = add_batch(store)
    count = 0

    async def counting(line: Line) -> Answer:
        nonlocal count
        count += 1
        return await answer(line)

    gateways = [BatchJobs(store, lambda batch: counting, JobLimits(1, 2, 100)) for _ in range(2)]
    for gateway in gateways:
        gateway.start()
    while store.batch("t", batch.id).status != "completed":  # noqa: ASYNC110 - it is in a file
        await asyncio.sleep(0)
    for gateway in gateways:
        await gateway.stop()
    assert count == 5


def test_a_tenant_sees_only_its_own(store: BatchStore) -> None:
    batch = add_batch(store)
    for look in (
        lambda: store.file("other", batch.input_file_id),
        lambda: store.delete_file("other", batch.input_file_id),
        lambda: store.batch("other", batch.id),
        lambda: store.add_batch("other", "/v1/completions", batch.input_file_id, 1, None),
    ):
        with pytest.raises(ServingError) as failure:
            look()
        assert failure.value.reason == Reason.REQUEST_NOT_FOUND
    assert store.files("other") == store.batches("other") == []


def test_what_a_tenant_may_keep(store: BatchStore) -> None:
    for _ in range(3):
        add_file(store)
    with pytest.raises(ServingError, match="3 files are kept"):
        add_file(store)
    add_file(store, tenant="other")
    with pytest.raises(ServingError, match="bytes"):
        add_file(store, count=1000, tenant="other")
    for file in store.files("t"):
        store.delete_file("t", file.id)
    for _ in range(2):
        add_batch(store)
    with pytest.raises(ServingError, match="2 batches are waiting or running"):
        add_batch(store, 1)
