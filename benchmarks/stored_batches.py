"""What a call of /v1/batches costs the gateway with many ended batches in the folder: CPU time, the disk's apart.

PYTHONPATH=src python benchmarks/stored_batches.py --ended 10 1000 10000
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from octavo.services.gateway.batches.index import insert_batch
from octavo.services.gateway.batches.objects import StoredBatch, StoreLimits
from octavo.services.gateway.batches.store import BatchStore

_TIMES = 200
_LATER = 2**33


def fill(store: BatchStore, file_id: str, first: int, count: int) -> None:
    """Add ended batches, each with a file of results."""
    with store._index.change() as db:
        for number in range(first, count):
            batch = StoredBatch(f"batch_{number:032x}", "t", "/v1/completions", file_id, 1, 1, status="completed")
            insert_batch(db, batch, _LATER)
            db.execute(
                "INSERT INTO files (id, tenant, filename, purpose, bytes, created_at, expires_at, kept) "
                "VALUES (?, 't', 'results', 'batch_output', 1, 1, ?, 1)",
                (f"file_{number:032x}", _LATER),
            )


def cpu_us(call: Callable[[], object]) -> float:
    """Return the mean CPU time of a call in microseconds."""
    begun = time.process_time()
    for _ in range(_TIMES):
        call()
    return (time.process_time() - begun) / _TIMES * 1e6


def measure(store: BatchStore, file_id: str) -> dict[str, float]:
    """Return what calls cost, in microseconds."""
    made: list[StoredBatch] = []

    def create() -> None:
        made.append(store.add_batch("t", "/v1/completions", file_id, 3600, None))

    def end() -> None:
        batch = made.pop()
        batch.enter("failed")
        store.end(batch)

    return {
        "create": cpu_us(create),
        "look for work (every 5 s)": cpu_us(store.waiting),
        "save progress": cpu_us(lambda: store.save(made[0])),
        "end": cpu_us(end),
        "list 20": cpu_us(lambda: store.batches("t", 20)),
        "get": cpu_us(lambda: store.batch("t", f"batch_{0:032x}")),
        "look for expired (every 60 s)": cpu_us(store.remove_expired),
    }


def main() -> None:
    """Print a table: a row for each call, a column for each number of ended batches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ended", type=int, nargs="+", default=[10, 1000, 10_000])
    counts = parser.parse_args().ended
    columns = []
    with tempfile.TemporaryDirectory() as folder:
        limits = StoreLimits(1 << 30, 1 << 40, max_files=10**9, max_ended_batches=10**9, retention_s=30 * 24 * 3600)
        store = BatchStore(Path(folder), limits)
        with store.files.begin("t", 0) as writer:
            file_id = writer.keep("in.jsonl", "batch").id
        for before, count in zip([0, *counts], counts, strict=False):
            fill(store, file_id, before, count)
            columns.append(measure(store, file_id))
        store.close()
    print(f"{'CPU of a call, us':32}" + "".join(f"{count:>10,}" for count in counts) + "  ended batches")
    for name in columns[0]:
        print(f"{name:32}" + "".join(f"{column[name]:10.0f}" for column in columns))


if __name__ == "__main__":
    main()
