"""Packed weights on disk: the same model comes back, and a file that is not whole never does."""

from __future__ import annotations

import base64
import ctypes
import hashlib
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.devices.cpu import packed_file
from octavo.gpu_worker.devices.cpu.device import CpuDevice
from octavo.gpu_worker.devices.cpu.packed_checks import ProgramError, check_program
from octavo.gpu_worker.devices.cpu.packed_model import PackedModel
from octavo.gpu_worker.devices.cpu.recorder import record
from octavo.gpu_worker.loading import packed_cache
from octavo.gpu_worker.loading.loading import LoadedModel, load_for_device, load_model
from octavo.gpu_worker.loading.packed_cache import PackedCache, cache_key, sources_digest
from octavo.gpu_worker.quantization import Quantization
from octavo.kernels.cpu import library
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


@pytest.mark.parametrize("scheme", [Quantization.NONE, Quantization.INT8])
def test_a_model_with_a_latent_cache_comes_back(scheme: Quantization, cache: PackedCache, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v3", dtype="bfloat16")
    runtime = Runtime(num_threads=1)
    model = load_model(tmp_path, "auto", 128, lambda *_: None, packed_as=scheme).model
    loaded = LoadedModel(record(model, runtime, scheme), "DeepseekV3ForCausalLM", 128, "1")
    assert cache.store(KEY, loaded)

    found = cache.load(KEY, runtime)

    assert found is not None
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


def test_the_code_that_packs_is_part_of_the_key(
    folder: Path, tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a mended release would compute otherwise is packed anew by it."""
    package = tmp_path / "gpu_worker"
    shutil.copytree(packed_cache._PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    keys = {cache_key(folder, [], runtime)}
    for source in ("loading/loading.py", "models/rope.py", "devices/cpu/recorder.py"):
        (package / source).write_text((package / source).read_text() + "# mended\n")
        monkeypatch.setattr(packed_cache, "_PACKAGE", package)
        sources_digest.cache_clear()
        keys.add(cache_key(folder, [], runtime))
    sources_digest.cache_clear()

    assert len(keys) == 4


def test_two_models_with_one_path_size_and_time_have_two_keys(tmp_path: Path, runtime: Runtime) -> None:
    """Images and reproducible builds have one time of change for all, and a fine-tune leaves both ends of a file."""
    make_checkpoint(tmp_path, "qwen2")
    weights = tmp_path / "model.safetensors"
    stored = load_file(weights)
    keys = set()
    for name in (None, "model.layers.1.self_attn.q_proj.weight"):
        save_file({key: tensor + 1 if key == name else tensor for key, tensor in stored.items()}, weights)
        os.utime(weights, ns=(0, 0))
        keys.add(cache_key(tmp_path, [], runtime))

    assert len(keys) == 2


def test_what_is_no_weight_file_does_not_stop_a_start(folder: Path, tmp_path: Path, runtime: Runtime) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "x.json").mkdir()
    (copy / "y.json").symlink_to("/nowhere")
    os.mkfifo(copy / "z.json")
    os.mkfifo(copy / "z.safetensors")

    assert cache_key(copy, [], runtime)


Description = dict[str, Any]


def rewrite(path: Path, edit: Callable[[Description], object]) -> None:
    """Change a packed file's description; its checksum is right."""
    data = path.read_bytes()
    magic, offset, length, _ = packed_file._PREAMBLE.unpack(data[: packed_file._PREAMBLE.size])
    description = json.loads(data[offset : offset + length])
    changed = edit(description)
    text = json.dumps(description).encode() if changed is None else str(changed).encode()
    preamble = packed_file._PREAMBLE.pack(magic, offset, len(text), hashlib.sha256(text).digest())
    path.write_bytes(preamble + data[len(preamble) : offset] + text)


def on_ops(edit: Callable[[Any], object]) -> Callable[[Description], None]:
    def change(description: Description) -> None:
        ops = packed_file._ops_of(base64.b64decode(description["ops"]))
        edit(ops)
        description["ops"] = base64.b64encode(bytes(ops)).decode()

    return change


HOSTILE: dict[str, Callable[[Description], object]] = {
    "no JSON": lambda _: "{",
    "nested deep": lambda _: "[" * 100_000,
    "a list": lambda _: "[1]",
    "bytes below 0": lambda d: d.update(num_bytes=-1, checksums=[]),
    "2^60 bytes": lambda d: d.update(num_bytes=1 << 60),
    "bytes a text": lambda d: d.update(num_bytes="1"),
    "another fact": lambda d: d["facts"].update(pooling=None),
    "a fact of another type": lambda d: d["facts"].update(max_model_len="9"),
    "no facts": lambda d: d.update(facts=None),
    "no layers": lambda d: d.pop("num_layers") and None,
    "layers a text": lambda d: d.update(num_layers="3"),
    "values of three": lambda d: d.update(values=[[1, 2, 3]]),
    "heads of 4,096": lambda d: d.update(heads=[4, 2, 4096]),
    "half an operation": lambda d: d.update(ops="QUJD"),
    "a pointer out of the file": on_ops(lambda ops: setattr(ops[1].linear, "weight", 1 << 40)),
    "a pointer before the file": on_ops(lambda ops: setattr(ops[1].linear, "weight", (1 << 64) - 64)),
    "a pointer to the last bytes": lambda d: on_ops(
        lambda ops: setattr(ops[1].linear, "weight", d["num_bytes"] - 64 + 1)
    )(d),
    "a layer that is not there": on_ops(lambda ops: setattr(ops[2], "layer", 100_000)),
    "a value that is not there": on_ops(lambda ops: setattr(ops[1], "output", 4000)),
    "no operations": lambda d: d.update(ops="", values=[]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_program_that_cannot_run_is_packed_again(
    name: str, cache: PackedCache, loaded: LoadedModel, runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    cache.store(KEY, loaded)
    rewrite(cache.path(KEY), HOSTILE[name])

    assert cache.load(KEY, runtime) is None
    assert "damaged" in caplog.text
    assert not cache.path(KEY).exists()


def fields_of(struct: Any, prefix: str = "") -> Iterator[tuple[Any, str, str]]:
    for name, _ in struct._fields_:
        value = getattr(struct, name)
        if isinstance(value, ctypes.Structure):
            yield from fields_of(value, f"{prefix}{name}.")
        else:
            yield struct, name, prefix + name


def test_no_field_of_a_program_is_believed(loaded: LoadedModel, runtime: Runtime) -> None:
    packed = loaded.model
    assert isinstance(packed, PackedModel)
    original, _, num_bytes = packed_file._laid_out(packed)
    # Other numbers come of these, and nothing worse: what is read instead is another layer, value or piece of the
    # weights, of the same shape or whole inside them.
    harmless = {
        "window", "scale", "soft_cap", "norm.eps", "q_norm.eps", "k_norm.eps", "activation", "layer", "input",
        "linear.bias", "linear.format", "max_positions", "sinks",
    }  # fmt: skip

    def is_refused(ops: Any) -> bool:
        try:
            check_program(ops, packed.values, packed.num_layers, packed.heads, packed.vocab_size, num_bytes, runtime)
        except ProgramError:
            return True
        return False

    assert not is_refused(original)
    believed, num_changed = set(), 0
    for index, op in enumerate(original):
        for field, (_, _, path) in enumerate(fields_of(op)):
            for change in (-1, 1, 1 << 30, -(1 << 30)):
                changed = type(original).from_buffer_copy(original)
                struct, name, _ = list(fields_of(changed[index]))[field]
                value = getattr(struct, name) or 0
                setattr(struct, name, value + change)
                num_changed += 1
                if not is_refused(changed):
                    believed.add((library.PROFILE_NAMES[op.kind], path))
    assert {path for _, path in believed} <= harmless, believed
    assert num_changed > 1000


def test_a_folder_that_others_may_write_to_is_not_used(
    cache: PackedCache, loaded: LoadedModel, runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    cache.store(KEY, loaded)
    folder = cache.path(KEY).parent
    folder.chmod(0o777)

    assert cache.load(KEY, runtime) is None
    assert not cache.store("other", loaded)

    assert "other users may write to it; name a folder of its own with packed_cache_dir" in caplog.text
    assert [path.name for path in folder.iterdir()] == [cache.path(KEY).name]


def test_a_file_that_others_may_write_to_is_packed_again(
    cache: PackedCache, loaded: LoadedModel, runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    cache.store(KEY, loaded)
    cache.path(KEY).chmod(0o666)

    assert cache.load(KEY, runtime) is None
    assert "other users may write to it" in caplog.text
    assert cache.store(KEY, loaded)


def test_nothing_is_written_or_read_through_a_link(
    cache: PackedCache, loaded: LoadedModel, runtime: Runtime, tmp_path: Path
) -> None:
    cache.store("first", loaded)
    (tmp_path / "other").write_text("precious")
    cache.path(KEY).with_suffix(".unfinished").symlink_to(tmp_path / "other")
    cache.path(KEY).symlink_to(cache.path("first"))

    assert cache.load(KEY, runtime) is None
    assert cache.store(KEY, loaded)

    assert (tmp_path / "other").read_text() == "precious"
    assert not cache.path(KEY).is_symlink()


def test_a_model_above_the_limit_is_not_written(
    cache: PackedCache, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.store("kept", loaded)
    monkeypatch.setattr(packed_file, "write", lambda *_: pytest.fail("written"))

    assert not PackedCache(cache.path(KEY).parent, 1 << 10).store(KEY, loaded)
    assert "packed_cache_limit is 1024" in caplog.text
    assert cache.path("kept").exists()


def test_room_is_made_before_a_model_is_written(
    cache: PackedCache, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.store("old", loaded)
    size = cache.path("old").stat().st_size
    there: list[bool] = []
    write = packed_file.write

    def watched(*arguments: Any) -> int:
        there.append(cache.path("old").exists())
        return write(*arguments)

    monkeypatch.setattr(packed_file, "write", watched)
    assert PackedCache(cache.path("old").parent, size * 3 // 2).store(KEY, loaded)

    assert there == [False]


def test_the_size_that_is_known_beforehand_is_close(cache: PackedCache, loaded: LoadedModel) -> None:
    cache.store(KEY, loaded)
    assert isinstance(loaded.model, PackedModel)
    size = cache.path(KEY).stat().st_size
    assert size <= packed_file.size_of(loaded.model) < size * 1.05


def test_a_full_disk_is_known_beforehand(
    cache: PackedCache, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packed_file, "write", lambda *_: pytest.fail("written"))
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=4096))

    assert not cache.store(KEY, loaded)
    assert "4096 are free" in caplog.text
    assert list(cache.path(KEY).parent.iterdir()) == []


def test_a_start_removes_what_a_killed_worker_left(cache: PackedCache, loaded: LoadedModel, runtime: Runtime) -> None:
    cache.store(KEY, loaded)
    left = cache.path("other").with_suffix(".unfinished")
    left.write_bytes(b"half")

    assert cache.load(KEY, runtime) is not None
    assert not left.exists()


def test_tables_are_for_what_the_cache_can_hold_and_grow_with_it(tmp_path: Path) -> None:
    """A config.json that names millions of positions does not take gigabytes."""
    model = tmp_path / "model"
    make_checkpoint(model, "qwen2", dtype="bfloat16", max_position_embeddings=1 << 22)

    def start(kv_cache_memory: int) -> tuple[int, int]:
        config = worker_config(model, tmp_path / "packed", num_threads=1, kv_cache_memory=kv_cache_memory)
        loaded = load_for_device(config, lambda *_: None)
        for thread in threading.enumerate():
            if thread.name == "store packed weights":
                thread.join()
        assert isinstance(loaded.model, PackedModel)
        return loaded.model.max_positions, loaded.max_model_len

    token_bytes = 3 * 2 * 2 * 16 * 2  # 3 layers, keys and values of 2 heads of 16 dimensions, 2 bytes each
    assert start(1 << 20) == (32768, 1 << 22)
    assert start(100_000 * token_bytes) == (100_000, 1 << 22)
    assert start(1 << 20) == (100_000, 1 << 22)  # it is enough: nothing is packed again


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
from octavo.gpu_worker import engine, worker
from octavo.gpu_worker.sampling import sampler
from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.loading.loading import load_for_device
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
