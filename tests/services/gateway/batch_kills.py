"""One stored batch whose gateway is killed again and again, at a busy server: every request must have one result.

    python -m tests.services.gateway.batch_kills --requests 10000 --kills 50

Every gateway is a process of its own that kills itself at a chance call of a function of the batches' code: while
requests are answered, while the files of results are made, while the batch ends, and afterwards. Half of the kills are
of the machine: of each file then only that is there which was brought to the disk (fsync), of the database what was
committed, and names are there, or gone, only if their folder was brought to the disk as well.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from octavo.services.batch import runner
from octavo.services.batch.lines import Line
from octavo.services.batch.results import Answer
from octavo.services.gateway.batches import index
from octavo.services.gateway.batches.jobs import BatchJobs, JobLimits
from octavo.services.gateway.batches.objects import StoreLimits
from octavo.services.gateway.batches.store import BatchStore

LIMITS = StoreLimits(1 << 30, 1 << 31)
# The call from which on a gateway counts those until its death, and up to which share of the kills; "": its start.
PHASES = {"add": 0.5, "enter": 0.7, "_finish": 0.85, "end": 1.0}
WINDOW, ROOM = 64, 16  # the server takes less than the gateway sends


@dataclass(frozen=True)
class Death:
    """When a gateway dies: at a number of calls after `phase` was called for the `times`-th time."""

    phase: str
    times: int
    calls: int


class Disk:
    """What would be left of a folder if the machine lost power now, kept in another folder."""

    def __init__(self, live: Path, durable: Path) -> None:
        self._live = live
        self._durable = durable
        durable.mkdir(exist_ok=True)

    def watch(self) -> None:
        """Follow what this process brings to the disk."""
        real_change = index.Index.change

        def fsync(descriptor: int) -> None:
            self._sync(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

        @contextlib.contextmanager
        def change(self_: index.Index) -> Iterator[Any]:
            with real_change(self_) as db:
                yield db
            with self_._lock:  # nobody else writes it meanwhile
                self._sync(self._live / "index.db")

        os.fsync = fsync
        index.Index.change = change  # type: ignore[method-assign]

    def _sync(self, path: Path) -> None:
        kept = self._durable / path.relative_to(self._live)
        hidden = self._durable / "hidden" / path.relative_to(self._live)  # files whose names are not on the disk yet
        if path.is_dir():
            kept.mkdir(parents=True, exist_ok=True)
            names, kept_names = ({each.name for each in folder.iterdir() if each.is_file()} for folder in (path, kept))
            for name in kept_names - names:
                (kept / name).unlink()
            for name in names - kept_names:
                if (hidden / name).exists():
                    (hidden / name).replace(kept / name)
                else:
                    (kept / name).touch()
        elif path.exists():
            target = kept if kept.exists() or path.suffix == ".db" else hidden  # SQLite looks after its own name
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = self._durable / f"partial-{threading.get_ident()}"
            shutil.copyfile(path, partial)
            partial.replace(target)  # whole, whenever this process dies

    def lose_power(self) -> None:
        """Leave in the folder what was brought to the disk."""
        shutil.rmtree(self._live)
        shutil.rmtree(self._durable / "hidden", ignore_errors=True)
        shutil.copytree(self._durable, self._live, ignore=shutil.ignore_patterns("partial-*", "hidden"))


class BusyServer:
    """Answers requests with what they ask, has room for a few, and fails each now and then."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._running = 0
        self._failed: set[int] = set()

    async def __call__(self, line: Line) -> Answer:
        if self._running >= ROOM:
            raise runner.TryAgain(Answer(429, "r", {"error": "full"}), blameless=True)
        self._running += 1
        try:
            await asyncio.sleep(self._rng.uniform(0, 0.003))
        finally:
            self._running -= 1
        if line.index not in self._failed and self._rng.random() < 0.05:
            self._failed.add(line.index)
            raise runner.TryAgain(Answer(500, "r", {"error": "broken"}), blameless=False)
        return Answer(200, "r", {"text": line.body["prompt"]})


def die_at(death: Death) -> None:
    """Have this process kill itself then."""
    left, times = death.calls, death.times
    is_counting = not death.phase

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal left, times, is_counting
        if event != "call" or not any(part in frame.f_code.co_filename for part in ("/batches/", "services/batch/")):
            return
        if not is_counting:
            times -= frame.f_code.co_name == death.phase
            is_counting = times <= 0
        elif left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            left -= 1

    threading.setprofile(profile)
    sys.setprofile(profile)


async def gateway(folder: Path, batch_id: str, seed: str, death: Death | None) -> None:
    """Run batches until this one has ended, or until death."""
    runner._SYNC_S, runner._PAUSE_S = 0.01, (0.001, 0.02)
    Disk(folder / "live", folder / "durable").watch()
    if death is not None:
        die_at(death)
    store = BatchStore(folder / "live", LIMITS)
    server = BusyServer(random.Random(seed))
    jobs = BatchJobs(store, lambda _: server, JobLimits(1, WINDOW, 1 << 20))
    jobs.start()
    while (await asyncio.to_thread(store.batch, "t", batch_id)).running:  # noqa: ASYNC110 - as a client asks
        await asyncio.sleep(0.02)
    await jobs.stop()
    store.close()


def create(folder: Path, requests: int) -> None:
    """Upload a file, make a batch of it, say its name, and die."""
    Disk(folder / "live", folder / "durable").watch()
    store = BatchStore(folder / "live", LIMITS)
    with store.files.begin("t", 0) as writer:
        for number in range(requests):
            writer.write(b'{"custom_id": "c%d", "prompt": "p%d"}\n' % (number, number))
        file_id = writer.keep("in.jsonl", "batch").id
    print(store.add_batch("t", "/v1/completions", file_id, 24 * 3600, None).id, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, requests: int, kills: int, seed: int) -> dict[str, int]:
    """Return how often gateways were killed, by where. Raises AssertionError if a result is missing, or there twice."""
    rng = random.Random(seed)
    disk = Disk(folder / "live", folder / "durable")
    batch_id = _process(folder, "--create", str(requests)).stdout.strip()
    disk.lose_power()
    killed: dict[str, int] = collections.Counter()
    for number in range(kills):
        phase = next(name for name, until in PHASES.items() if (number + 0.5) / kills < until)
        if not _running(folder, batch_id):
            phase = ""
        times = rng.randint(1, max(2 * requests // kills, 1)) if phase == "add" else 1
        calls = int(2 * requests ** rng.random()) if phase == "_finish" else rng.randrange(12 if phase else 40)
        death = Death(phase, times, calls)
        done = _process(folder, "--gateway", batch_id, str(rng.random()), json.dumps(vars(death)))
        is_power = rng.random() < 0.5
        if is_power:
            disk.lose_power()
        if done.returncode == -signal.SIGKILL:
            killed[f"{phase or 'start'}, {'machine' if is_power else 'process'}"] += 1
        else:
            assert done.returncode == 0, done.stderr
    done = _process(folder, "--gateway", batch_id, "0", "null")
    assert done.returncode == 0, done.stderr
    disk.lose_power()
    check(folder, batch_id, requests)
    return dict(killed)


def _running(folder: Path, batch_id: str) -> bool:
    store = BatchStore(folder / "live", LIMITS)
    try:
        return store.batch("t", batch_id).running
    finally:
        store.close()


def check(folder: Path, batch_id: str, requests: int) -> None:
    """Raise AssertionError unless each request has one result, its own."""
    store = BatchStore(folder / "live", LIMITS)
    batch = store.batch("t", batch_id)
    counts = (batch.status, batch.total, batch.completed, batch.failed)
    assert counts == ("completed", requests, requests, 0), (counts, batch.errors)
    assert batch.output_file_id
    results = [json.loads(line) for line in store.files.data_path(batch.output_file_id).read_text().splitlines()]
    found = {each["custom_id"]: each["response"]["body"]["text"] for each in results}
    assert len(results) == requests, f"{len(results)} results, {len(found)} different ones"
    assert found == {f"c{number}": f"p{number}" for number in range(requests)}
    store.close()


def _process(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.services.gateway.batch_kills", "--folder", str(folder), *arguments]
    root = Path(__file__).resolve().parents[3]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, timeout=600)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 100_000)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--create", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--gateway", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.create is not None:
        create(arguments.folder, arguments.create)
    elif arguments.gateway:
        batch_id, seed, death = arguments.gateway
        fields = json.loads(death)
        asyncio.run(gateway(arguments.folder, batch_id, seed, Death(**fields) if fields else None))
    else:
        print(f"seed {arguments.seed}", flush=True)
        with tempfile.TemporaryDirectory(prefix="octavo-batch-kills-") as folder:
            killed = run(Path(folder), arguments.requests, arguments.kills, arguments.seed)
        print(f"{sum(killed.values())} kills ({killed}); {arguments.requests} results, each once")


if __name__ == "__main__":
    main()
