"""Between requests the memory of the KV cache is taken, so that no step waits for it."""

from __future__ import annotations

import ctypes
import itertools
import logging
import math
import mmap
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.devices.cpu.device import CpuDevice
from octavo.gpu_worker.lifetime import Progress
from octavo.gpu_worker.loading.loading import load_model
from octavo.gpu_worker.memory import free_memory_bytes, resident_bytes
from octavo.gpu_worker.steps.host_runner import HostMemory
from octavo.gpu_worker.worker import Worker

from .test_cpu_device import MAX_BLOCKS, MAX_SEQUENCES, MAX_TOKENS, Shape, TinyModel, make_sequence, run
from .test_encoders import ENCODERS, engine_of, make_encoder, modules
from .test_worker import Running, Scheduler, generate
from .tiny import make_checkpoint

HUGE_PAGE = 2 << 20
NUM_BLOCKS = 16_000  # of 4 KiB: some 63 MiB, and a piece that is smaller than the others


def make_device() -> CpuDevice:
    device = CpuDevice(TinyModel(Shape()), MAX_TOKENS, MAX_SEQUENCES, MAX_BLOCKS, num_threads=2)
    device.allocate_kv(NUM_BLOCKS)
    return device


def resident_pages(device: CpuDevice) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Tell of each page of the cache whether it has memory."""
    start = device._blocks.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    size = device._blocks.ctypes.data + device._blocks.nbytes - start
    pages = np.empty(-(-size // mmap.PAGESIZE), np.uint8)
    system = ctypes.CDLL(None, use_errno=True)
    assert system.mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data)) == 0
    return pages % 2 == 1


def faults_of_first_use(device: CpuDevice) -> int:
    """Write to all blocks; return how often that waited for the system to give a page."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    device._blocks[1:] = 1
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def use_all_idle_time(use_idle_time: Callable[[], bool]) -> int:
    """Return how many pieces there were."""
    count = 1
    while use_idle_time():
        count += 1
    return count


def test_idle_time_gives_the_whole_cache_its_memory_piece_by_piece() -> None:
    device = make_device()
    memory = HostMemory(device)
    before = resident_pages(device)
    assert before.mean() < 0.3, "nothing was written"

    assert memory.use_idle_time()

    first = resident_pages(device)
    assert 0 < (first & ~before).sum() * mmap.PAGESIZE <= 2 * HUGE_PAGE, "one for each thread"
    use_all_idle_time(memory.use_idle_time)
    assert resident_pages(device)[:-1].all(), "the last one may be shared with what follows"


def test_the_first_use_of_a_block_that_idle_time_touched_costs_no_page_fault() -> None:
    fresh, touched = make_device(), make_device()

    use_all_idle_time(touched.touch_kv)

    assert 2 * faults_of_first_use(touched) < faults_of_first_use(fresh)


def test_idle_time_changes_nothing_that_sequences_need() -> None:
    sequence, again = (make_sequence(3, 200, list(range(1, 20))) for _ in range(2))
    device, never_idle = make_device(), make_device()
    for one, on in ((sequence, device), (again, never_idle)):
        run(on, [(one, 190)])
    written = device._blocks.copy()

    use_all_idle_time(device.touch_kv)

    assert np.array_equal(device._blocks, written)
    assert torch.equal(run(device, [(sequence, 10)])[0], run(never_idle, [(again, 10)])[0])


def test_idle_time_takes_no_memory_that_is_short(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = make_device()
    monkeypatch.setattr("octavo.gpu_worker.steps.host_runner.free_memory_bytes", lambda: 255 << 20)

    with caplog.at_level(logging.INFO, "octavo.worker"):
        assert use_all_idle_time(HostMemory(device).use_idle_time) == 1

    assert resident_pages(device).mean() < 0.5
    assert "memory is short" in caplog.text
    run(device, [(make_sequence(3, 20, [NUM_BLOCKS - 1, NUM_BLOCKS - 2]), 20)])  # takes its own


def test_a_model_without_a_cache_has_nothing_to_take(tmp_path: Path) -> None:
    make_encoder(tmp_path, ENCODERS["bert"])
    modules(tmp_path, "Pooling", pooling_mode_mean_tokens=True)

    assert not engine_of(tmp_path, "cpu").use_idle_time()


@contextmanager
def serving(tmp_path: Path, kv_cache_memory: int) -> Iterator[Scheduler]:
    """Run a worker of a tiny model on the CPU."""
    make_checkpoint(tmp_path, "llama")
    scheduler = Scheduler(tmp_path / "worker.sock")
    config = WorkerConfig(
        model="unused",
        device="cpu",
        num_threads=2,
        worker_endpoint=scheduler.endpoint,
        kv_cache_memory=kv_cache_memory,
    )
    stop = threading.Event()
    loaded = load_model(tmp_path, "auto", 0, lambda *_: None)
    running = Running(scheduler, Worker(config, "worker-1", loaded, Progress(-1), stop), stop)
    try:
        yield scheduler
    finally:
        stop.set()
        running.end()
        scheduler.close()


def test_an_idle_worker_takes_the_memory_of_its_cache(tmp_path: Path) -> None:
    size = 192 << 20
    before = resident_bytes()
    with serving(tmp_path, size) as scheduler:
        scheduler.join(kv_blocks=0)
        scheduler.expect("heartbeat", lambda frame: frame.heartbeat.device_memory_used_bytes > before + size * 3 // 4)


def test_steps_and_signs_of_life_do_not_wait_until_idle_work_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = itertools.count(1)
    monkeypatch.setattr(HostMemory, "use_idle_time", lambda _: next(pieces) > 0)
    with serving(tmp_path, 4 << 20) as scheduler:
        scheduler.join(kv_blocks=0)
        scheduler.expect("heartbeat", lambda _: next(pieces) > 2)

        assert len(generate(scheduler, 1)) == 4

        assert scheduler.expect("heartbeat", lambda frame: frame.heartbeat.last_step_id == 4)


def test_idle_work_begins_when_no_plan_has_followed_a_step_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    def use_idle_time(worker: Worker) -> bool:
        if worker._last_done_id:
            waited.append(time.monotonic() - worker._answered_at)
        return True

    monkeypatch.setattr(Worker, "_use_idle_time", use_idle_time)
    with serving(tmp_path, 4 << 20) as scheduler:
        scheduler.join(kv_blocks=0)
        generate(scheduler, 1)
        scheduler.expect("heartbeat", lambda _: len(waited) > 2)

    assert min(waited) > 0.015, "the next plan of a stream may be on its way"


def test_the_free_memory_of_a_container_is_what_its_limit_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.gpu_worker.memory.memory_room", lambda: 60_000)
    assert free_memory_bytes() == 60_000
    monkeypatch.setattr("octavo.gpu_worker.memory.memory_room", lambda: math.inf)
    assert free_memory_bytes() > 1 << 20
