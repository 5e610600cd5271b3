"""A GGUF file's own codes are what the cpu device computes with, where it has as many bits for them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from octavo.gpu_worker.devices.cpu import CpuDevice
from octavo.gpu_worker.loading import load_model
from octavo.gpu_worker.ops import Linear, Ops, Value
from octavo.gpu_worker.quantization import Quantization
from octavo.kernels.cpu.coded_rows import CodedRows, Codes
from octavo.kernels.cpu.library import Q4_0, Q4_1, Q4_K, Q8_0

from .paged import MAX_BLOCKS, Paged
from .test_cpu_device import Shape, TinyModel, make_sequence, run_in_chunks, shuffled_blocks
from .test_cpu_quantization import QuantizedOps, make_device
from .test_gguf import make, write_gguf
from .test_models import random_tokens

Kind = gguf.GGMLQuantizationType
# The library's number of a kind, GGUF's, the scheme that takes it, and how exactly its scales are kept.
KINDS = {
    "Q8_0": (Q8_0, Kind.Q8_0, Quantization.INT8, 1e-6),
    "Q4_0": (Q4_0, Kind.Q4_0, Quantization.INT4, 1e-6),
    "Q4_1": (Q4_1, Kind.Q4_1, Quantization.INT4, 1e-6),
    "Q4_K": (Q4_K, Kind.Q4_K, Quantization.INT4, 4e-3),
}


class HeadModel(TinyModel):
    """A gated layer between an embedding and a head."""

    def forward(self, ops: Ops) -> Value:
        x = ops.embed(self.embedding)
        gate, up = self.layers[0]["gate"], self.layers[0]["up"]
        return ops.logits(
            ops.linear_residual(ops.norm_gated_linear(x, self.norm, gate, up, "silu"), self.layers[0]["down"], x),
            self.norm,
            self.head,
        )


def random_codes(kind: Kind, rows: int, columns: int, seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Return random rows of a kind whose values are like those of a layer's weights."""
    values = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32) / columns**0.5
    if kind is not Kind.Q4_K:
        return np.ascontiguousarray(gguf.quantize(values, kind))
    random = np.random.default_rng(seed)  # the package cannot quantise to it, but tell its values
    blocks = random.integers(0, 256, (rows * columns // 256, 144)).astype(np.uint8)
    factors = np.array([0.003, 0.02], np.float16) / np.float16(columns**0.5)
    blocks[:, :4] = factors.view(np.uint8)
    return np.ascontiguousarray(blocks.reshape(rows, -1))


@pytest.mark.parametrize("name", KINDS)
def test_codes_are_packed_as_they_are(name: str) -> None:
    number, kind, scheme, tolerance = KINDS[name]
    model = HeadModel(Shape(hidden=256, intermediate=512, layers=1))
    true = HeadModel(Shape(hidden=256, intermediate=512, layers=1))
    for seed, layer in enumerate(("gate", "up", "down")):
        rows, columns = model.layers[0][layer].weight.shape
        codes = random_codes(kind, rows, columns, seed)
        parts = [codes[:9], codes[9:]] if layer == "down" else [codes]  # as queries, keys and values are joined
        model.layers[0][layer] = Linear(CodedRows([Codes(number, part.copy()) for part in parts], columns))
        true.layers[0][layer] = Linear(torch.from_numpy(gguf.dequantize(codes, kind)))
    for one in (model, true):  # tokens and head that eight bits tell exactly
        one.embedding = torch.sign(one.embedding.float()) * 127 / 128
        one.head = Linear(torch.sign(one.head.weight.float()) * 127 / 128)

    logits = run_in_chunks(make_device(model, scheme), make_sequence(1, 50, shuffled_blocks(1)), 50)

    expected = true.forward(QuantizedOps(make_sequence(1, 50, [1]).token_ids))
    assert true.layers[0]["down"].weight.std() > 0.01
    assert (logits - expected).abs().median() < tolerance * expected.std()
    assert (logits - expected).square().mean().sqrt() < 0.01 * expected.std()


def test_matrices_in_different_kinds_are_joined() -> None:
    numbers = torch.randn(40, 64)
    codes = random_codes(Kind.Q4_1, 50, 64, 0)

    joined = torch.cat([CodedRows([Codes(Q4_1, codes)], 64), numbers])

    assert isinstance(joined, CodedRows)
    assert joined.shape == (90, 64)
    assert joined.parts[1] is numbers
    with pytest.raises(NotImplementedError, match="of a matrix in codes"):
        joined + 1


@pytest.mark.parametrize(("kind", "scheme"), [(Kind.Q8_0, Quantization.INT8), (Kind.Q4_0, Quantization.INT4)])
def test_a_file_gives_the_logits_of_its_values(tmp_path: Path, kind: Kind, scheme: Quantization) -> None:
    write_gguf(tmp_path / "model.gguf", make(tmp_path, "llama"), "llama", kind)
    token_ids = random_tokens(60)

    def logits(codes_of: Quantization, dtype: str, quantization: Quantization) -> torch.Tensor:
        model = load_model(tmp_path / "model.gguf", dtype, 0, lambda *_: None, codes_of=codes_of).model
        paged = Paged(CpuDevice(model, 128, 8, MAX_BLOCKS, num_threads=1, quantization=quantization))
        return paged.compute(paged.new(token_ids), chunk=60)

    by_codes = logits(scheme, "auto", scheme)

    true = logits(Quantization.NONE, "float32", Quantization.NONE)
    assert (by_codes - true).square().mean().sqrt() < 0.1 * true.std()
    if scheme is Quantization.INT4:  # its values quantised once more are not the same
        again = logits(Quantization.NONE, "float32", scheme)
        assert (by_codes - true).square().mean() < 0.25 * (again - true).square().mean()
