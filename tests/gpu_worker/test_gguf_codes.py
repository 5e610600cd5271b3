"""A GGUF file's own codes are what the cpu device computes with, where it has as many bits for them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

from octavo.gpu_worker import quantization
from octavo.gpu_worker.devices.cpu.device import CpuDevice
from octavo.gpu_worker.devices.reference.device import ReferenceDevice
from octavo.gpu_worker.formats.gguf_kinds import KINDS as ALL_KINDS
from octavo.gpu_worker.loading.gguf_model import load_gguf
from octavo.gpu_worker.loading.loading import load_model
from octavo.gpu_worker.loading.weights import load_folder
from octavo.gpu_worker.ops import Linear, Ops, Value
from octavo.gpu_worker.quantization import Quantization
from octavo.kernels.cpu import library
from octavo.kernels.cpu.coded_rows import Coded, CodedRows

from .paged import MAX_BLOCKS, Paged
from .test_cpu_device import Shape, TinyModel, make_sequence, run_in_chunks, shuffled_blocks
from .test_cpu_quantization import QuantizedOps, make_device
from .test_gguf import make, write_gguf
from .test_gguf_kinds import random_rows
from .test_models import random_tokens
from .tiny import make_checkpoint

Kind = gguf.GGMLQuantizationType
NUMBERS = {kind.name: number for number, kind in ALL_KINDS.items()}
SCHEMES = {"Q8_0": Quantization.INT8, "Q4_0": Quantization.INT4, "Q4_1": Quantization.INT4, "Q4_K": Quantization.INT4}
CASES = [(name, Quantization.NONE) for name in NUMBERS] + list(SCHEMES.items())


class HeadModel(TinyModel):
    """A gated layer between an embedding and a head."""

    def forward(self, ops: Ops) -> Value:
        x = ops.embed(self.embedding)
        gate, up = self.layers[0]["gate"], self.layers[0]["up"]
        gated = ops.gated_linear(ops.norm(x, self.norm), gate, up, "silu")
        x = ops.add(x, ops.linear(gated, self.layers[0]["down"]))
        return ops.logits(ops.norm(x, self.norm), self.head)


def coded(name: str, rows: npt.NDArray[np.uint8]) -> Coded:
    """Return rows of a kind as the loader does."""
    kind = ALL_KINDS[NUMBERS[name]]
    return Coded(len(rows), kind.shape, lambda some: kind.codes(rows[some]))


@pytest.fixture(params=library.runnable_variants())
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_codes_are_packed_as_they_are(name: str, scheme: Quantization, variant: str) -> None:
    kind = ALL_KINDS[NUMBERS[name]]
    model = HeadModel(Shape(hidden=256, intermediate=512, layers=1))
    true = HeadModel(Shape(hidden=256, intermediate=512, layers=1))
    for seed, layer in enumerate(("gate", "up", "down")):
        rows, columns = model.layers[0][layer].weight.shape
        codes = random_rows(kind, rows, columns, seed)
        parts = [codes[:9], codes[9:]] if layer == "down" else [codes]  # as queries, keys and values are joined
        model.layers[0][layer] = Linear(CodedRows([coded(name, part) for part in parts], columns))
        true.layers[0][layer] = Linear(torch.from_numpy(gguf.dequantize(codes, Kind(NUMBERS[name]))))
    for one in (model, true):  # tokens and head that eight bits tell exactly
        one.embedding = torch.sign(one.embedding.float()) * 127 / 128
        one.head = Linear(torch.sign(one.head.weight.float()) * 127 / 128)
    head = ALL_KINDS[NUMBERS["Q8_0"]]
    rows = np.ascontiguousarray(gguf.quantize(true.head.weight.numpy(), Kind.Q8_0))
    if scheme is Quantization.NONE:
        model.head = Linear(CodedRows([coded(head.name, rows)], 256))
        true.head = Linear(torch.from_numpy(gguf.dequantize(rows, Kind.Q8_0)))

    logits = run_in_chunks(make_device(model, scheme, variant), make_sequence(1, 50, shuffled_blocks(1)), 50)

    expected = true.forward(QuantizedOps(make_sequence(1, 50, [1]).token_ids))
    assert true.layers[0]["down"].weight.std() > 0.01
    # Scales that a block's factor is multiplied with have more digits than half precision.
    tolerance = 4e-3 if name.endswith(("_K", "XS")) else 1e-6
    assert (logits - expected).abs().median() < tolerance * expected.std()
    assert (logits - expected).square().mean().sqrt() < 0.01 * expected.std()


def test_matrices_in_different_kinds_are_joined() -> None:
    numbers = torch.randn(40, 64)
    codes = random_rows(ALL_KINDS[NUMBERS["Q4_1"]], 50, 64)

    joined = torch.cat([CodedRows([coded("Q4_1", codes)], 64), numbers])

    assert isinstance(joined, CodedRows)
    assert joined.shape == (90, 64)
    assert joined.parts[1] is numbers
    with pytest.raises(NotImplementedError, match="of a matrix in codes"):
        joined + 1


@pytest.mark.parametrize(("kind", "scheme"), [(Kind.Q8_0, Quantization.INT8), (Kind.Q4_0, Quantization.INT4)])
def test_a_file_gives_the_logits_of_its_values(tmp_path: Path, kind: Kind, scheme: Quantization) -> None:
    write_gguf(tmp_path / "model.gguf", make(tmp_path, "llama"), "llama", kind)
    token_ids = random_tokens(60)

    def logits(packed_as: Quantization, dtype: str, quantization: Quantization) -> torch.Tensor:
        model = load_model(tmp_path / "model.gguf", dtype, 0, lambda *_: None, packed_as=packed_as).model
        paged = Paged(CpuDevice(model, 128, 8, MAX_BLOCKS, num_threads=1, quantization=quantization))
        return paged.compute(paged.new(token_ids), chunk=60)

    by_codes = logits(scheme, "auto", scheme)

    true = logits(Quantization.NONE, "float32", Quantization.NONE)
    assert (by_codes - true).square().mean().sqrt() < 0.1 * true.std()
    if scheme is Quantization.INT4:  # its values quantised once more are not the same
        again = logits(Quantization.NONE, "float32", scheme)
        assert (by_codes - true).square().mean() < 0.25 * (again - true).square().mean()


@pytest.mark.parametrize(
    ("name", "family"), [("mixtral", "llama"), ("qwen3_moe", "qwen3moe"), ("qwen2_moe", "qwen2moe")]
)
def test_experts_in_codes_give_the_logits_of_their_values(tmp_path: Path, name: str, family: str) -> None:
    sizes = {"moe_intermediate_size": 64} if name != "mixtral" else {}
    shared = {"shared_expert_intermediate_size": 96} if name == "qwen2_moe" else {}
    make_checkpoint(tmp_path / "folder", name, **sizes, **shared)
    source = load_folder(tmp_path / "folder", "auto", lambda *_: None)
    write_gguf(tmp_path / "model.gguf", source, family, Kind.Q5_1)

    def logits(dtype: str, device: type[CpuDevice] | type[ReferenceDevice]) -> torch.Tensor:
        packed_as = Quantization.NONE if device is CpuDevice else None
        model = load_model(tmp_path / "model.gguf", dtype, 0, lambda *_: None, packed_as=packed_as).model
        paged = Paged(device(model, 128, 8, MAX_BLOCKS))
        return paged.compute(paged.new(random_tokens(60)), chunk=60)

    true = logits("float32", ReferenceDevice)
    # Activations in eight bits make some tokens choose other experts.
    assert (logits("auto", CpuDevice) - true).abs().median() < 0.15 * true.std()


@pytest.mark.parametrize(("at_least", "in_codes"), [(0, True), (1 << 20, False)])
def test_a_small_file_is_computed_from_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_least: int, in_codes: bool
) -> None:
    monkeypatch.setattr(quantization, "MIN_BYTES_OF_CODES", at_least)
    make_checkpoint(tmp_path / "folder", "llama")
    write_gguf(tmp_path / "m.gguf", load_folder(tmp_path / "folder", "auto", lambda *_: None), "llama", Kind.Q5_1)
    tensors = load_gguf(tmp_path / "m.gguf", "auto", lambda *_: None, Quantization.NONE).tensors
    matrix = tensors["model.layers.0.mlp.down_proj.weight"]
    assert isinstance(matrix, CodedRows)
    assert [isinstance(part, Coded) for part in matrix.parts] == [in_codes]
