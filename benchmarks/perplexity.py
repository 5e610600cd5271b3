"""Measure what quantised weights cost in perplexity, on the cpu device.

    python benchmarks/perplexity.py [MODEL ...] [--quantization none int8 int4] [--tokens N] [--float32]

MODEL is a folder or a .gguf file; without one, the demo model. The text is the reference of Python's
language and standard library as the interpreter carries it for `help()` (`pydoc_data.topics`): each
version of Python has its own. It is cut into windows of 512 tokens, each computed alone, and every
token but a window's first counts. Beside the perplexity: how it compares with the first scheme's, with
the standard error of the mean difference (token by token, so that the text's own spread cancels out),
how often the likeliest token is the first scheme's, and what the weights take in memory. With --float32 the first is
the model in float32, dequantised if its file is quantised, on device reference.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from pydoc_data import topics
from typing import cast

import numpy as np
import numpy.typing as npt

from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.devices.cpu.device import CpuDevice
from octavo.gpu_worker.devices.cpu.packed_model import PackedModel
from octavo.gpu_worker.devices.reference.device import ReferenceDevice
from octavo.gpu_worker.loading.loading import load_for_device
from octavo.gpu_worker.ops import Model, StepInput
from octavo.gpu_worker.quantization import Quantization
from octavo.services.cli import demo_model
from octavo.services.gateway.tokenization.model_files import read_model

WINDOW = 512
BLOCK_TOKENS = 16
SCHEMES = (Quantization.NONE, Quantization.INT8, Quantization.INT4)
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def text() -> str:
    """Return the documentation in one piece, topics in alphabetical order."""
    return "\n\n".join(str(topics.topics[name]).strip() for name in sorted(topics.topics))


def whole_window() -> StepInput:
    """Return a step of one window without its tokens: a prompt, of which all logits are wanted."""
    places = np.arange(WINDOW, dtype=np.int32)
    blocks = np.arange(1, WINDOW // BLOCK_TOKENS + 1, dtype=np.int32)
    return StepInput(
        token_ids=places.copy(),
        positions=places,
        slot_mapping=places + BLOCK_TOKENS,
        query_start_loc=np.array([0, WINDOW], np.int32),
        seq_lens=np.array([WINDOW], np.int32),
        block_tables=blocks[None],
        logits_rows=places,
    )


def surprises(device: CpuDevice | ReferenceDevice, windows: npt.NDArray[np.int32]) -> tuple[Floats, Ints]:
    """Return -log p of each token but the first of each window, and which token was likeliest instead."""
    step = whole_window()
    values, likeliest = [], []
    for window in windows:
        step.token_ids[:] = window
        logits = np.asarray(device.forward(step))[:-1]
        best = logits.max(axis=1)
        total = best + np.log(np.exp(logits - best[:, None]).sum(axis=1, dtype=np.float64))
        values.append(total - logits[np.arange(WINDOW - 1), window[1:]])
        likeliest.append(logits.argmax(axis=1))
    return np.concatenate(values), np.concatenate(likeliest)


def in_float32(model: Path) -> ReferenceDevice:
    """Return a device that computes in float32."""
    config = WorkerConfig(str(model), "reference", max_model_len=WINDOW, dtype="float32")
    device = ReferenceDevice(cast(Model, load_for_device(config, lambda *_: None).model), WINDOW, 1, WINDOW)
    device.allocate_kv(WINDOW // BLOCK_TOKENS + 1)
    return device


def measure(model: Path, schemes: list[Quantization], num_tokens: int, *, has_float32: bool = False) -> None:
    """Print a line for each scheme."""
    token_ids = read_model(model).tokenizer.encode(text(), add_special_tokens=False).ids[:num_tokens]
    windows = np.array(token_ids[: len(token_ids) // WINDOW * WINDOW], np.int32).reshape(-1, WINDOW)
    version = ".".join(map(str, sys.version_info[:3]))
    print(f"{model.name}: {windows.size} tokens of Python {version}'s documentation", flush=True)
    first: tuple[Floats, Ints] | None = None
    if has_float32:
        first = surprises(in_float32(model), windows)
        print(f"  float32 perplexity {math.exp(first[0].mean()):7.3f}", flush=True)
    for scheme in schemes:
        config = WorkerConfig(str(model), "cpu", max_model_len=WINDOW, quantization=scheme, packed_cache=False)
        packed = load_for_device(config, lambda *_: None).model
        assert isinstance(packed, PackedModel)
        device = CpuDevice(packed, WINDOW, 1, WINDOW // BLOCK_TOKENS)
        device.allocate_kv(WINDOW // BLOCK_TOKENS + 1)
        values, likeliest = surprises(device, windows)
        weights = sum(size for _, size in packed.memory.pieces) / 2**20
        line = f"  {scheme:5} perplexity {math.exp(values.mean()):7.3f}  weights {weights:6.1f} MiB"
        if first is None:
            first = values, likeliest
        else:
            difference = values - first[0]
            error = difference.std() / math.sqrt(len(difference))
            line += (
                f"  {math.expm1(difference.mean()):+.2%} (standard error {error:.2%})"
                f"  same likeliest token {(likeliest == first[1]).mean():.1%}"
            )
        print(line, flush=True)


def main() -> None:
    """Measure each model under each scheme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL")
    parser.add_argument("--quantization", nargs="+", default=list(SCHEMES), type=Quantization, choices=SCHEMES)
    parser.add_argument("--tokens", type=int, default=16384, help="most tokens of the text")
    parser.add_argument("--float32", action="store_true", help="compare with the model in float32")
    options = parser.parse_args()
    for model in options.models or [demo_model.fetch(demo_model.cache_dir(), lambda *_: None)]:
        measure(model, options.quantization, options.tokens, has_float32=options.float32)


if __name__ == "__main__":
    main()
