"""The folder of files and batches, and the jobs that run them."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from octavo.services.batch.lines import Line
from octavo.services.batch.results import Answer
from octavo.services.common.errors import Reason, ServingError
from octavo.services.gateway.batches import file_store, jobs
from octavo.services.gateway.batches.index import insert_batch, usage_of
from octavo.services.gateway.batches.job import BatchJob
from octavo.services.gateway.batches.jobs import BatchJobs, JobLimits
from octavo.services.gateway.batches.objects import StoredBatch, StoreLimits
from octavo.services.gateway.batches.store import BatchStore

LIMITS = StoreLimits(1 << 20, 10_000, max_files=3, max_batches=2)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BatchStore]:
    store = BatchStore(tmp_path / "store", LIMITS)
    yield store
    store.close()


def lines(count: int = 5) -> bytes:
    return "".join(f'{{"custom_id": "c{number}", "prompt": "{number}"}}\n' for number in range(count)).encode()


def add_file(store: BatchStore, count: int = 5, tenant: str = "t", expires_after_s: int | None = None) -> str:
    with store.files.begin(tenant, 0) as writer:
        writer.write(lines(count))
        return writer.keep("in.jsonl", "batch", expires_after_s).id


def add_batch(store: BatchStore, count: int = 5, window_s: int = 3600) -> StoredBatch:
    return store.add_batch("t", "/v1/completions", add_file(store, count), window_s, None)


async def answer(line: Line) -> Answer:
    return Answer(200 if line.index != 3 else 400, "r", {"n": line.index})


def job(store: BatchStore, batch: StoredBatch, max_requests: int = 100) -> BatchJob:
    return BatchJob(store, batch, lambda batch: answer, window=2, max_requests=max_requests)


def contents(store: BatchStore, file_id: str | None) -> list[str]:
    assert file_id is not None
    return sorted(json.loads(line)["custom_id"] for line in store.files.data_path(file_id).read_text().splitlines())


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
        for file in store.files.list("t", 100):
            store.files.delete("t", file.id)


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
        lambda: store.files.get("other", batch.input_file_id),
        lambda: store.files.delete("other", batch.input_file_id),
        lambda: store.batch("other", batch.id),
        lambda: store.add_batch("other", "/v1/completions", batch.input_file_id, 1, None),
    ):
        with pytest.raises(ServingError) as failure:
            look()
        assert failure.value.reason == Reason.REQUEST_NOT_FOUND
    assert store.files.list("other", 100) == store.batches("other", 100) == []


def test_what_a_tenant_may_keep(store: BatchStore) -> None:
    for _ in range(3):
        add_file(store)
    with pytest.raises(ServingError, match="it would be 4 files"):
        add_file(store)
    add_file(store, tenant="other")
    with pytest.raises(ServingError, match="bytes"):
        add_file(store, count=1000, tenant="other")
    for file in store.files.list("t", 100):
        store.files.delete("t", file.id)
    for _ in range(2):
        add_batch(store)
    with pytest.raises(ServingError, match="2 batches are waiting or running"):
        add_batch(store, 1)


# What a tenant may keep


def kept_bytes(store: BatchStore, tenant: str = "t") -> int:
    with store._index.change() as db:
        return usage_of(db, tenant)["bytes"]


def contents_of(folder: Path) -> set[str]:
    """Return the names of all files below a folder, but for the database's."""
    return {path.name for path in folder.rglob("*") if path.is_file() and not path.name.startswith("index.db")}


def test_the_quota_holds_for_uploads_at_the_same_time(store: BatchStore, tmp_path: Path) -> None:
    other_gateway = BatchStore(tmp_path / "store", LIMITS)
    all_wrote = threading.Barrier(3)
    results = []

    def upload(gateway: BatchStore) -> None:
        with gateway.files.begin("t", 0) as writer:
            writer.write(b"x" * 9000)
            all_wrote.wait(60)
            try:
                results.append(writer.keep("a", "batch").bytes)
            except ServingError as error:
                results.append(error.reason)

    gateways = (store, other_gateway, store)
    threads = [threading.Thread(target=upload, args=(gateway,)) for gateway in gateways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other_gateway.close()
    assert sorted(map(str, results)) == ["9000", "QUOTA_EXCEEDED", "QUOTA_EXCEEDED"]
    assert kept_bytes(store) == 9000


def test_what_is_announced_counts_before_it_comes(store: BatchStore) -> None:
    with store.files.begin("t", 9000) as first:
        with pytest.raises(ServingError, match="11000 bytes"):
            store.files.begin("t", 2000)
        store.files.begin("other", 2000).end()
        first.write(b"x")
        assert first.keep("a", "batch").bytes == 1
    assert kept_bytes(store) == 1


def test_what_is_not_announced_counts_while_it_comes(store: BatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_store, "_UNRESERVED_BYTES", 1000)
    with store.files.begin("t", 0) as writer:
        for _ in range(9):
            writer.write(b"x" * 1001)
            assert writer.size - kept_bytes(store) <= 1000
        with pytest.raises(ServingError, match="delete some"):
            writer.write(b"x" * 1001)
    assert kept_bytes(store) == 0


def test_what_is_not_kept_leaves_nothing(store: BatchStore, tmp_path: Path) -> None:
    with store.files.begin("t", 50) as writer:
        writer.write(b"x")
        assert not store.files.list("t", 100)
        with pytest.raises(ServingError):
            store.files.get("t", writer.id)
    assert contents_of(tmp_path) == set()
    assert kept_bytes(store) == 0


def test_what_a_killed_gateway_was_writing_is_removed(store: BatchStore, tmp_path: Path) -> None:
    store.files.begin("t", 9000)  # and killed
    store.remove_expired()
    assert kept_bytes(store) == 9000
    with later(2 * 3600):
        store.remove_expired()
    assert kept_bytes(store) == 0
    assert contents_of(tmp_path) == set()


async def test_what_a_tenant_made_too_much_of_holds_its_next_batch(store: BatchStore) -> None:
    file = add_file(store)
    with store.files.begin_result("file_" + "0" * 32, "t", "much") as results:
        results.write(b"x" * 20_000)
        with store._index.change() as db:
            store.files.show(db, results, None)
        results.leave()
    with pytest.raises(ServingError, match="delete some"):
        store.add_batch("t", "/v1/completions", file, 3600, None)
    store.files.delete("t", results.id)
    store.add_batch("t", "/v1/completions", file, 3600, None)


# Expiry


@contextlib.contextmanager
def later(seconds: float) -> Iterator[None]:
    now = time.time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: now + seconds)
        yield


@pytest.fixture
def forgetful(tmp_path: Path) -> Iterator[BatchStore]:
    store = BatchStore(tmp_path / "forgetful", replace(LIMITS, retention_s=1000))
    yield store
    store.close()


async def test_ended_batches_and_files_expire(forgetful: BatchStore, tmp_path: Path) -> None:
    batch = add_batch(forgetful)
    with later(900):
        await job(forgetful, batch).run()
    with later(1500):
        assert [each.purpose for each in forgetful.files.list("t", 100)] == ["batch_output", "batch_output"]
        assert forgetful.batch("t", batch.id).status == "completed"
    with later(1901):
        assert not forgetful.files.list("t", 100)
        assert not forgetful.batches("t", 100)
        forgetful.remove_expired()
    assert contents_of(tmp_path) == set()
    assert forgetful._index.rows("SELECT * FROM usage") == []


async def test_a_batch_that_waits_does_not_expire_nor_does_its_input(forgetful: BatchStore) -> None:
    batch = add_batch(forgetful)
    with later(5000):
        forgetful.remove_expired()
        batch.expires_at += 5000
        await job(forgetful, batch).run()
        assert forgetful.batch("t", batch.id).completed == 4
        forgetful.remove_expired()
    assert not forgetful.files.data_path(batch.input_file_id).exists()


async def test_files_expire_earlier_if_that_is_asked_for(forgetful: BatchStore) -> None:
    file = add_file(forgetful, expires_after_s=100)
    batch = forgetful.add_batch("t", "/v1/completions", file, 3600, None, output_expires_after_s=200)
    await job(forgetful, batch).run()
    with later(150):
        assert len(forgetful.files.list("t", 100)) == 2
    with later(250):
        assert not forgetful.files.list("t", 100)
        assert forgetful.batch("t", batch.id).status == "completed"


def test_of_ended_batches_the_newest_are_kept(tmp_path: Path) -> None:
    store = BatchStore(tmp_path, replace(LIMITS, max_ended_batches=3))
    file = add_file(store)
    made = []
    for _ in range(6):
        batch = store.add_batch("t", "/v1/completions", file, 3600, None)
        batch.enter("failed")
        store.end(batch)
        made.append(batch.id)
    assert [batch.id for batch in store.batches("t", 100)] == made[:1:-1]
    store.close()


# What goes wrong


async def test_an_input_that_is_deleted_is_kept_until_its_batch_has_ended(store: BatchStore) -> None:
    batch = add_batch(store)
    data = store.files.data_path(batch.input_file_id)
    store.files.delete("t", batch.input_file_id)
    assert not store.files.list("t", 100)
    assert kept_bytes(store) == len(lines())
    store.remove_expired()
    await job(store, batch).run()
    assert store.batch("t", batch.id).status == "completed"
    store.remove_expired()
    assert not data.exists()


@pytest.mark.parametrize("status", ["validating", "in_progress", "finalizing"])
async def test_a_batch_without_its_input_ends(store: BatchStore, status: str) -> None:
    batch = add_batch(store)
    if status != "validating":
        batch.enter(status)
        batch.expired_at = 1 if status == "finalizing" else None
        store.results_path(batch).touch()
        store.save(batch)
    store.files.data_path(batch.input_file_id).unlink()
    await job(store, batch).run()
    kept = store.batch("t", batch.id)
    assert kept.status in ("failed", "expired")
    assert status == "finalizing" or [error["code"] for error in kept.errors] == ["file_deleted"]


async def ended(store: BatchStore, batch: StoredBatch) -> str:
    async with asyncio.timeout(60):
        while (kept := store.batch("t", batch.id)).running:  # noqa: ASYNC110 - it is in a database
            await asyncio.sleep(0)
    return kept.status


async def test_a_batch_that_cannot_be_run_lets_others_go_first(store: BatchStore) -> None:
    broken, sound = add_batch(store), add_batch(store)

    def make_sender(batch: StoredBatch) -> Callable[..., Any]:
        if batch.id == broken.id:
            raise RuntimeError("broken")
        return answer

    gateway = BatchJobs(store, make_sender, JobLimits(1, 2, 100))
    gateway.start()
    assert await ended(store, sound) == "completed"
    await gateway.stop()
    assert store.batch("t", broken.id).status == "validating"


async def test_a_batch_that_can_never_be_run_is_given_up(store: BatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_PUT_OFF_S", (0.0, 0.0))
    monkeypatch.setattr(jobs, "_SCAN_S", 0.0)
    count = 0

    class Broken(BatchJob):
        async def run(self) -> None:
            nonlocal count
            count += 1
            raise RuntimeError("broken")

    monkeypatch.setattr(jobs, "BatchJob", Broken)
    batch = add_batch(store, window_s=0)
    gateway = BatchJobs(store, lambda batch: answer, JobLimits(1, 2, 100))
    gateway.start()
    assert await ended(store, batch) == "failed"
    await gateway.stop()
    assert count == 10
    assert store.batch("t", batch.id).errors[0]["code"] == "run_failed"


async def test_a_second_gateway_runs_what_the_first_has_no_room_for(store: BatchStore) -> None:
    stuck, free = add_batch(store), add_batch(store)
    blocked = asyncio.Event()

    async def block(line: Line) -> Answer:
        blocked.set()
        await asyncio.Event().wait()
        raise AssertionError(line)

    first = BatchJobs(store, lambda batch: block, JobLimits(1, 2, 100))
    first.start()
    await blocked.wait()
    second = BatchJobs(store, lambda batch: answer, JobLimits(1, 2, 100))
    second.start()
    assert await ended(store, free) == "completed"
    assert store.batch("t", stuck.id).running
    looked = 0
    waiting = store.waiting

    def count() -> list[tuple[str, str]]:
        nonlocal looked
        looked += 1
        return waiting()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "waiting", count)
        for _ in range(100):
            await asyncio.to_thread(time.time)
    assert looked <= 2, "it looks again and again for what another one runs"
    await second.stop()
    await first.stop()


def test_tenants_take_turns(tmp_path: Path) -> None:
    store = BatchStore(tmp_path, replace(LIMITS, max_batches=10))
    files = {tenant: add_file(store, tenant=tenant) for tenant in ("many", "few")}
    made = [store.add_batch(tenant, "/v1/completions", files[tenant], 1, None) for tenant in ["many"] * 3 + ["few"] * 2]
    assert [batch_id for _, batch_id in store.waiting()] == [made[number].id for number in (0, 3, 1, 4, 2)]
    store.close()


async def test_a_batch_that_is_cancelled_before_it_begins_sends_nothing(store: BatchStore) -> None:
    batch = add_batch(store)
    store.ask_to_cancel(batch)

    async def never(line: Line) -> Answer:
        raise AssertionError(line)

    await BatchJob(store, batch, lambda batch: never, 2, 100).run()
    assert store.batch("t", batch.id).status == "cancelled"


async def test_results_are_on_the_disk_before_their_journal_goes(
    store: BatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = add_batch(store)
    journal = store.results_path(batch)
    synced: set[str] = set()
    fsync = os.fsync

    def note(descriptor: int) -> None:
        assert journal.exists()
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    await job(store, batch).run()
    kept = store.batch("t", batch.id)
    assert kept.output_file_id is not None
    assert kept.error_file_id is not None
    data = [store.files.data_path(file_id) for file_id in (kept.output_file_id, kept.error_file_id)]
    assert synced >= {str(path) for path in (*data, data[0].parent)}
    assert not journal.exists()


async def test_results_are_on_the_disk_before_their_batch_says_that_all_are_there(
    store: BatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = add_batch(store)
    journal = store.results_path(batch)
    on_disk, seen = 0, []
    save = store.save

    def fsync(descriptor: int) -> None:
        nonlocal on_disk
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(journal):
            on_disk = os.fstat(descriptor).st_size

    def check(saved: StoredBatch) -> None:
        if saved.status == "finalizing":
            seen.append((on_disk, journal.stat().st_size))
        save(saved)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(store, "save", check)
    await job(store, batch).run()
    assert seen == [(seen[0][1], seen[0][1])]
    assert seen[0][0] > 0


def test_one_that_cannot_be_read_stops_no_other(store: BatchStore) -> None:
    odd, newer, sound = add_batch(store), add_batch(store, 1), add_file(store, 1)
    with store._index.change() as db:
        db.execute("UPDATE batches SET object = '{' WHERE id = ?", (odd.id,))
        db.execute("UPDATE batches SET object = json_set(object, '$.added_later', 1) WHERE id = ?", (newer.id,))
    assert [batch.id for batch in store.batches("t", 100)] == [newer.id]
    assert store.batch("t", newer.id) == newer
    store.files.get("t", sound)


def test_a_database_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    store = BatchStore(tmp_path, LIMITS)
    with store._index.change() as db:
        db.execute("PRAGMA user_version = 1000")
    store.close()
    with pytest.raises(OSError, match="newer version"):
        BatchStore(tmp_path, LIMITS)


# What earlier versions kept


OLD = dict[str, Any]


def old_objects(folder: Path, count: int, **fields: Any) -> list[OLD]:
    """Write batches, each with its input, as earlier versions did."""
    made = []
    for number in range(count):
        file = {"id": f"file_{number:032x}", "tenant": "t", "filename": "in", "purpose": "batch", "bytes": 3}
        batch = {"id": f"batch_{number:032x}", "tenant": "t", "endpoint": "/v1/completions", "status": "completed"}
        batch |= {"input_file_id": file["id"], "created_at": 100 + number, "expires_at": 2**33, "total": 5} | fields
        for kind, value in (("files", file | {"created_at": 100 + number}), ("batches", batch)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            (folder / kind / f"{value['id']}.json").write_text(json.dumps(value))
        (folder / "files" / f"{file['id']}.data").write_bytes(lines())
        made.append(batch)
    return made


def test_what_earlier_versions_kept_is_taken_over(tmp_path: Path) -> None:
    made = old_objects(tmp_path, 700)
    (tmp_path / "batches" / f"{made[3]['id']}.json").write_text("")
    (tmp_path / "files" / ".0.tmp").touch()
    os.utime(tmp_path / "files" / ".0.tmp", (0, 0))
    store = BatchStore(tmp_path, replace(LIMITS, retention_s=1000))
    newest_first = [batch["id"] for batch in reversed(made) if batch is not made[3]]
    assert [batch.id for batch in store.batches("t", 1000)] == newest_first
    assert [batch.id for batch in store.batches("t", 2, after=newest_first[500])] == newest_first[501:503]
    assert [file.bytes for file in store.files.list("t", 1000)] == [len(lines())] * 700
    with later(900):
        assert not store.remove_expired()  # they are kept as long as new ones
        assert len(store.batches("t", 1000)) == 699
    left = {name for name in contents_of(tmp_path) if not name.endswith((".data", ".lock"))}
    assert left == {f"{made[3]['id']}.unreadable"}
    store.close()
    again = BatchStore(tmp_path, LIMITS)
    assert len(again.batches("t", 1000)) == 699
    again.close()


async def test_a_batch_that_an_earlier_version_runs_is_taken_over_when_it_stops(tmp_path: Path) -> None:
    (batch,) = old_objects(tmp_path, 1, status="in_progress")
    journal = tmp_path / "batches" / f"{batch['id']}.results"
    done = {"id": "batch_req_0", "custom_id": "c0", "response": {"status_code": 200, "body": {}}, "error": None}
    journal.write_text(json.dumps(done) + "\n")
    with (tmp_path / "batches" / f"{batch['id']}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        store = BatchStore(tmp_path, LIMITS)
        store.remove_expired()
        assert not store.waiting()
    store.remove_expired()
    assert store.waiting() == [("t", batch["id"])]
    asked = []

    async def note(line: Line) -> Answer:
        asked.append(line.index)
        return await answer(line)

    await BatchJob(store, store.batch("t", batch["id"]), lambda batch: note, 1, 100).run()
    assert asked == [1, 2, 3, 4]
    assert store.batch("t", batch["id"]).completed == 4
    store.close()


# Cost


def test_no_call_costs_more_with_many_ended_batches(tmp_path: Path) -> None:
    """Count the instructions of the database's machine, which are the same on every computer."""
    limits = StoreLimits(1 << 20, 1 << 30, max_files=10**6, max_ended_batches=10**6, retention_s=10**6)
    store = BatchStore(tmp_path, limits)
    *_, file = [add_file(store) for _ in range(25)]
    count = 0

    def tick() -> int:
        nonlocal count
        count += 1
        return 0

    def cost() -> int:
        nonlocal count
        store._index._db.set_progress_handler(tick, 1)
        count = 0
        batch = store.add_batch("t", "/v1/completions", file, 3600, None)
        store.batches("t", 20)
        store.batches("t", 20, after=batch.id)
        store.files.list("t", 20)
        store.batch("t", batch.id)
        store.save(batch)
        store.waiting()
        batch.enter("failed")
        store.end(batch)
        store.files.delete("t", add_file(store))
        store.remove_expired()
        store._index._db.set_progress_handler(None, 0)
        return count

    few = max(cost() for _ in range(25))
    with store._index.change() as db:
        for number in range(20_000):
            tenant = "t" if number < 10_000 else "other"
            batch = StoredBatch(f"batch_{number:032x}", tenant, "/v1/completions", file, 1, 1, status="failed")
            insert_batch(db, batch, 2**33)
            db.execute(
                "INSERT INTO files (id, tenant, filename, purpose, bytes, created_at, expires_at, kept) "
                "VALUES (?, ?, 'a', 'batch', 1, 1, 8589934592, 1)",
                (f"file_{number:032x}", tenant),
            )
    assert cost() < 1.2 * few
    store.close()
