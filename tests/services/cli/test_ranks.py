"""`octavo worker --local-ranks N`: the ranks of one machine live and end together."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from octavo.gpu_worker.config import WorkerConfig
from octavo.services.cli import ranks
from octavo.services.common import config as config_loader


def configs(config: WorkerConfig) -> list[WorkerConfig]:
    lines = [ranks.command(config, local) for local in range(config.local_ranks)]
    assert {line[line.index("octavo.services.cli") + 1] for line in lines} == {"worker"}
    return [
        config_loader.parse(
            WorkerConfig, line[line.index("worker") + 1 :], prog="worker", environ={"OCTAVO_LOCAL_RANKS": "4"}
        )
        for line in lines
    ]


def test_each_process_is_a_rank_and_the_first_of_all_speaks_for_all() -> None:
    config = WorkerConfig(
        model="m", world_size=8, local_ranks=4, node_rank=1, alive_file="/a", metrics_address="127.0.0.1:1",
        num_threads=10, rendezvous="tcp://10.0.0.1:29500", drain_s=5.0, packed_cache=False,
    )  # fmt: skip
    second = configs(config)
    assert [each.rank for each in second] == [4, 5, 6, 7]
    assert [each.alive_file for each in second] == ["/a", "", "", ""]
    assert {
        (each.world_size, each.local_ranks, each.num_threads, each.packed_cache, each.drain_s) for each in second
    } == {(8, 1, 2, False, 5.0)}
    assert not any(each.metrics_address for each in second)
    first = configs(WorkerConfig(model="m", world_size=4, local_ranks=4, metrics_address="127.0.0.1:1"))
    assert [each.metrics_address for each in first] == ["127.0.0.1:1", "", "", ""]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"local_ranks": 2}, "local_ranks needs world_size"),
        ({"world_size": 4, "local_ranks": 3}, "local_ranks must divide world_size"),
        ({"world_size": 4, "local_ranks": 8}, "local_ranks must divide world_size"),
        ({"world_size": 4, "local_ranks": 2, "node_rank": 2}, "node_rank must be below world_size / local_ranks"),
    ],
)
def test_ranks_that_do_not_add_up_are_refused(options: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        WorkerConfig(model="m", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [({}, "1"), ({"CUDA_VISIBLE_DEVICES": "4,GPU-a,6"}, "GPU-a"), ({"CUDA_VISIBLE_DEVICES": "4"}, "")],
)
def test_each_sees_a_gpu_of_its_own(environ: dict[str, str], expected: str) -> None:
    assert ranks.visible_gpu(1, environ) == {"CUDA_VISIBLE_DEVICES": expected}


async def files(folder: Path, pattern: str, number: int) -> None:
    async with asyncio.timeout(30):
        while len(await asyncio.to_thread(lambda: list(folder.glob(pattern)))) < number:  # noqa: ASYNC110 - other processes
            await asyncio.sleep(0.02)


async def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *scripts: str) -> asyncio.Task[int]:
    """Run scripts in the ranks' places, and wait until each has got as far as `ready()`."""
    begin = f"""if True:
        import os, signal, sys, time
        def ready(): open(os.path.join({str(folder)!r}, "ready-" + sys.argv[1]), "w").close()
        def others(): # wait for them
            while len(os.listdir({str(folder)!r})) < {len(scripts)}: time.sleep(0.02)
    """
    lines = [(sys.executable, "-c", begin + "    " + script, str(local)) for local, script in enumerate(scripts)]
    monkeypatch.setattr(ranks, "command", lambda _config, local: lines[local])
    config = WorkerConfig(model="m", world_size=len(scripts), local_ranks=len(scripts))
    running = asyncio.create_task(ranks._run(config, os.environ))
    await files(folder, "ready-*", len(scripts))
    return running


@pytest.mark.parametrize(("ends", "status"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", 137)])
async def test_one_that_ends_takes_the_others_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str, status: int
) -> None:
    gentle = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); ready(); time.sleep(600)"
    running = await run(tmp_path, monkeypatch, gentle, f"ready(); others(); {ends}")
    assert await asyncio.wait_for(running, 30) == status


async def test_one_that_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_GRACE_S", 0.1)
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); time.sleep(600)"
    running = await run(tmp_path, monkeypatch, "ready(); others(); sys.exit(5)", stubborn)
    assert await asyncio.wait_for(running, 30) == 5


async def test_all_of_them_are_told_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gentle = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); ready(); time.sleep(600)"
    running = await run(tmp_path, monkeypatch, gentle, gentle)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(running, 30) == 0
