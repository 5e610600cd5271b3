"""Loading takes little more memory than what stays, whatever the type of the weights and however they are kept."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from octavo.gpu_worker.loading.loading import LoadedModel

_NUM_SHARDS = 5
# Source type, --dtype, --quantization, --device.
_CASES = [
    ("bfloat16", "auto", "none", "cpu"),
    ("bfloat16", "float32", "none", "cpu"),
    ("bfloat16", "float32", "int8", "cpu"),
    ("float16", "auto", "none", "cpu"),
    ("float16", "bfloat16", "none", "cpu"),
    ("float32", "auto", "none", "cpu"),
    ("float32", "bfloat16", "int8", "cpu"),
    ("float32", "auto", "int4", "cpu"),
    ("gguf", "auto", "none", "cpu"),
    ("gguf", "float32", "none", "cpu"),
    ("gguf", "auto", "int8", "cpu"),
    ("bfloat16", "float32", "none", "reference"),
    ("float32", "bfloat16", "none", "reference"),
]


def memory(name: str) -> int:
    """Return a figure of this process's memory, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(name)


def _tensors(dtype: str) -> dict[str, Any]:
    """Return the tensors of a model of 10 layers."""
    import torch

    hidden, inner, vocab = 512, 1536, 6000
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(10):
        for name, shape in {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden // 4, hidden),
            "self_attn.v_proj": (hidden // 4, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(shape, generator=generator) * 0.05).to(getattr(torch, dtype))
        for name, shape in shapes.items()
    }


def write_shards(folder: Path, dtype: str) -> None:
    """Write a checkpoint in shards of about the same size."""
    from safetensors.torch import save_file

    tensors = _tensors(dtype)
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, Any]] = [{} for _ in range(_NUM_SHARDS)]
    done = 0
    for name, tensor in tensors.items():
        shards[min(done * _NUM_SHARDS // total, _NUM_SHARDS - 1)][name] = tensor
        done += tensor.nbytes
    folder.mkdir()
    for index, shard in enumerate(shards):
        save_file(shard, folder / f"{index}.safetensors")
    places = {name: f"{index}.safetensors" for index, shard in enumerate(shards) for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_hidden_layers": 10,
        "vocab_size": 6000,
        "max_position_embeddings": 2048,
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_gguf(folder: Path, _: str) -> None:
    """Write the same model with codes of eight bits for the linear layers, and 16-bit numbers for the rest."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    from octavo.gpu_worker.loading.gguf_architectures import LAYER_NAMES, TOP_NAMES

    names = {hub: name for name, hub in TOP_NAMES.items()}
    names |= {hub[0]: name for name, hub in LAYER_NAMES.items() if len(hub) == 1}
    folder.mkdir()
    writer = GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(10)
    writer.add_context_length(2048)
    writer.add_embedding_length(512)
    writer.add_feed_forward_length(1536)
    writer.add_head_count(8)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    for name, tensor in _tensors("float32").items():
        stem, _, kind = name.rpartition(".")
        if stem.startswith("model.layers."):
            layer, _, part = stem.removeprefix("model.layers.").partition(".")
            target = f"blk.{layer}.{names[part]}.{kind}"
        else:
            target = f"{names[stem]}.{kind}"
        values = tensor.numpy()
        if values.ndim == 1:
            writer.add_tensor(target, values)
        elif stem.startswith("model.layers."):
            codes = quantize(values, GGMLQuantizationType.Q8_0)
            writer.add_tensor(target, codes, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(target, values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(folder: Path, source: str, dtype: str, quantization: str, device: str) -> LoadedModel:
    """Load one of the models as a worker does."""
    from octavo.gpu_worker.config import WorkerConfig
    from octavo.gpu_worker.loading.loading import load_for_device

    model = folder / source / "model.gguf" if source == "gguf" else folder / source
    config = WorkerConfig(str(model), device, dtype=dtype, quantization=quantization, packed_cache=False, num_threads=2)
    return load_for_device(config, lambda *_: None)


def stored_peak(folder: Path, loaded: LoadedModel) -> int:
    """Return how much memory it takes at most to keep packed weights for the next start."""
    from octavo.gpu_worker.loading.packed_cache import PackedCache

    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    assert PackedCache(folder / "packed", 1 << 30).store("key", loaded)
    return memory("VmHWM") - before


def main(folder: Path) -> None:
    """Write the models, load each, and write a JSON line for each: peak, what stays, and the largest shard."""
    for source in sorted({case[0] for case in _CASES}):
        (write_gguf if source == "gguf" else write_shards)(folder / source, source)
    for case in (_CASES[0], ("gguf", "auto", "int8", "cpu")):  # libraries, and what their threads take
        load(folder, *case)
    for case in _CASES:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
        before = memory("VmRSS")
        loaded = load(folder, *case)
        gc.collect()
        peak, stays = memory("VmHWM") - before, memory("VmRSS") - before
        if case is _CASES[0]:
            print(json.dumps([["kept"], stored_peak(folder, loaded), stays, 0]), flush=True)
        shard = max(path.stat().st_size for path in (folder / case[0]).iterdir())
        print(json.dumps([case, peak, stays, shard]), flush=True)
        del loaded


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], tuple[int, int, int]]:
    """Peak, what stays and the largest shard of each case, in bytes, in a process of their own."""
    command = [sys.executable, "-m", "tests.gpu_worker.test_loading_memory", str(tmp_path_factory.mktemp("models"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {tuple(case): (peak, stays, shard) for case, peak, stays, shard in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("case", _CASES, ids="-".join)
def test_loading_peaks_at_what_stays_and_one_shard(
    case: tuple[str, ...], found: dict[tuple[str, ...], tuple[int, int, int]]
) -> None:
    peak, stays, shard = found[case]
    assert peak <= 1.15 * stays + shard, f"{peak >> 20} MiB at most, {stays >> 20} stay, a shard has {shard >> 20}"


def test_weights_are_kept_for_the_next_start_in_little_memory(
    found: dict[tuple[str, ...], tuple[int, int, int]],
) -> None:
    peak, stays, _ = found["kept",]
    assert peak <= 0.4 * stays, f"{peak >> 20} MiB at most, {stays >> 20} stay"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
