"""Packed weights on disk: the same model comes back, and a file that is not whole never does."""

from __future__ import annotations

import logging
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.devices.cpu import CpuDevice
from octavo.gpu_worker.devices.packed_model import PackedModel
from octavo.gpu_worker.devices.recorder import record
from octavo.gpu_worker.loading import LoadedModel, load_for_device, load_model
from octavo.gpu_worker.packed_cache import PackedCache, cache_key
from octavo.kernels.cpu.runtime import Runtime

from .paged import MAX_BLOCKS, Paged
from .tiny import make_checkpoint

KEY = "0123"
TOKEN_IDS = [5, 6, 7, 200, 31, 7, 7, 64]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, "qwen2", dtype="bfloat16")
    return path


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime(num_threads=2)


@pytest.fixture(scope="module")
def loaded(folder: Path, runtime: Runtime) -> LoadedModel:
    loaded = load_model(folder, "auto", 128, lambda *_: None)
    assert not isinstance(loaded.model, PackedModel)
    return LoadedModel(record(loaded.model, runtime), loaded.architecture, loaded.max_model_len, loaded.model_version)


@pytest.fixture
def cache(tmp_path: Path) -> PackedCache:
    return PackedCache(tmp_path / "packed", 1 << 30)


def logits_of(loaded: LoadedModel) -> torch.Tensor:
    device = CpuDevice(loaded.model, 64, 4, MAX_BLOCKS)
    paged = Paged(device)
    return paged.compute(paged.new(TOKEN_IDS), 8)


def test_what_comes_back_computes_the_same_bits(cache: PackedCache, loaded: LoadedModel, runtime: Runtime) -> None:
    assert cache.store(KEY, loaded)

    found = cache.load(KEY, runtime)

    assert found is not None
    assert (found.architecture, found.max_model_len, found.model_version) == (
        "Qwen2ForCausalLM", 128, loaded.model_version,
    )  # fmt: skip
    assert torch.equal(logits_of(found), logits_of(loaded))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_weights_come_back_and_are_no_others(scheme: str, folder: Path, tmp_path: Path) -> None:
    def start(quantization: str) -> tuple[LoadedModel, list[str]]:
        told: list[str] = []
        config = worker_config(folder, tmp_path, quantization=quantization, num_threads=2)
        loaded = load_for_device(config, lambda name, *_: told.append(name))
        for thread in threading.enumerate():
            if thread.name == "store packed weights":
                thread.join()
        return loaded, told

    packed, _ = start(scheme)
    found, told = start(scheme)
    whole, _ = start("none")

    assert told == [str(folder)]  # and no tensor
    assert torch.equal(logits_of(found), logits_of(packed))
    assert not torch.equal(logits_of(found), logits_of(whole))
    assert len({packed.model_version, found.model_version, whole.model_version}) == 2


def truncate(data: bytearray) -> None:
    del data[-1:]


def truncate_inside_the_weights(data: bytearray) -> None:
    del data[len(data) // 2 :]


def truncate_inside_the_preamble(data: bytearray) -> None:
    del data[10:]


def empty(data: bytearray) -> None:
    data.clear()


def flip_a_bit_of_a_weight(data: bytearray) -> None:
    data[4096 + 12345] ^= 0x10


def flip_a_bit_of_the_description(data: bytearray) -> None:
    data[-3] ^= 1


def change_the_format(data: bytearray) -> None:
    data[14] ^= 1


def append(data: bytearray) -> None:
    data.append(0)


@pytest.mark.parametrize(
    "damage",
    [
        truncate, truncate_inside_the_weights, truncate_inside_the_preamble, empty, flip_a_bit_of_a_weight,
        flip_a_bit_of_the_description, change_the_format, append,
    ],
)  # fmt: skip
def test_a_damaged_file_is_removed_with_a_warning(
    damage: Callable[[bytearray], None],
    cache: PackedCache,
    loaded: LoadedModel,
    runtime: Runtime,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache.store(KEY, loaded)
    data = bytearray(cache.path(KEY).read_bytes())
    damage(data)
    cache.path(KEY).write_bytes(data)

    with caplog.at_level(logging.WARNING):
        assert cache.load(KEY, runtime) is None

    assert "damaged" in caplog.text
    assert not cache.path(KEY).exists()
    assert cache.store(KEY, loaded)


def test_a_file_under_the_name_of_another_key_is_not_taken(
    cache: PackedCache, loaded: LoadedModel, runtime: Runtime
) -> None:
    cache.store(KEY, loaded)
    cache.path(KEY).rename(cache.path("4567"))

    assert cache.load("4567", runtime) is None


def test_the_key_changes_with_files_settings_and_kernels(folder: Path, tmp_path: Path, runtime: Runtime) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", "-p", str(folder), str(copy)], check=True)
    places = [(copy, "auto"), (copy, "float32"), (folder, "auto")]
    keys = [cache_key(path, [dtype], runtime) for path, dtype in places]
    assert cache_key(copy, ["auto"], runtime) == keys[0]
    keys.append(cache_key(copy, ["auto"], Runtime("portable", num_threads=1)))
    weights = copy / "model.safetensors"
    os.utime(weights, ns=(1, weights.stat().st_mtime_ns + 1))
    keys.append(cache_key(copy, ["auto"], runtime))
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    keys.append(cache_key(copy, ["auto"], runtime))

    assert len(set(keys)) == len(keys)


def test_a_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, loaded: LoadedModel, runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cache = PackedCache(tmp_path / "file" / "packed", 1 << 30)  # not even root can make a folder there

    assert not cache.store(KEY, loaded)
    assert "not kept" in caplog.text
    assert cache.load(KEY, runtime) is None


def test_a_full_disk_costs_a_warning_and_leaves_nothing(
    cache: PackedCache, loaded: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # every write beyond it fails
    try:
        assert not cache.store(KEY, loaded)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert "not kept" in caplog.text
    assert list(cache.path(KEY).parent.iterdir()) == []


def test_the_models_used_longest_ago_make_room(cache: PackedCache, loaded: LoadedModel, runtime: Runtime) -> None:
    cache.store("a", loaded)
    size = cache.path("a").stat().st_size
    small = PackedCache(cache.path("a").parent, 2 * size + size // 2)
    small.store("b", loaded)
    os.utime(cache.path("b"), (1, 1))
    os.utime(cache.path("a"), (0, 0))
    small.load("a", runtime)  # used just now

    assert small.store("c", loaded)

    assert sorted(path.stem for path in cache.path("a").parent.iterdir()) == ["a", "c"]
    assert not PackedCache(cache.path("a").parent, size - 1).store("d", loaded)
    assert sorted(path.name for path in cache.path("a").parent.iterdir()) == ["a.packed", "c.packed"]


def test_what_a_killed_worker_left_is_removed(cache: PackedCache, loaded: LoadedModel) -> None:
    cache.store("a", loaded)
    left = cache.path("a").with_name("b.unfinished")
    left.write_bytes(b"half")

    assert cache.store("c", loaded)

    assert not left.exists()


def worker_config(folder: Path, cache_folder: Path, **settings: object) -> WorkerConfig:
    values: dict[str, object] = {"model": str(folder), "device": "cpu", "packed_cache_dir": str(cache_folder)}
    return WorkerConfig(**{**values, **settings})  # type: ignore[arg-type]


def test_a_second_start_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    script = f"""
import sys
from octavo.gpu_worker import engine, sampler, worker
from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.loading import load_for_device
import threading
loaded = load_for_device(WorkerConfig({str(folder)!r}, "cpu", packed_cache_dir={str(tmp_path)!r}), lambda *_: None)
for thread in threading.enumerate():
    if thread is not threading.main_thread():
        thread.join()
print(loaded.model_version, "torch" in sys.modules)
"""
    runs = [
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
        for _ in range(2)
    ]

    assert [run[1] for run in runs] == ["True", "False"]
    assert runs[0][0] == runs[1][0]


def test_without_the_cache_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    loaded = load_for_device(worker_config(folder, tmp_path, packed_cache=False), lambda *_: None)

    assert isinstance(loaded.model, PackedModel)
    assert list(tmp_path.iterdir()) == []


def test_checksums_see_every_byte(runtime: Runtime) -> None:
    from octavo.kernels.cpu.runtime import checksums_of

    data = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)
    expected = checksums_of(runtime, data)
    for index in range(len(data)):
        changed = data.copy()
        changed[index] ^= 1 << index % 8
        assert checksums_of(runtime, changed) != expected
    assert checksums_of(runtime, data[:-1]) != expected
