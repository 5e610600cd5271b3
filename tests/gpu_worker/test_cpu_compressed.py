"""bf16 weights in twelve bits: every one of them comes back, and a layer's results are the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from octavo.kernels.cpu import library
from octavo.kernels.cpu.packing import Packer
from octavo.kernels.cpu.runtime import BLOCK_COLUMNS, Runtime

from .test_cpu_device import (
    SHAPES,
    VARIANTS,
    Shape,
    TinyModel,
    make_device,
    make_sequence,
    run_in_chunks,
    shuffled_blocks,
)
from .test_cpu_experts import MIXTURES, ExpertsModel

NO_EXCEPTION = 2**32 - 1
WEIGHTS_PER_STEP = 32 * BLOCK_COLUMNS
WEIGHTS_PER_EXCEPTION = 256

READERS = [variant for variant in VARIANTS if variant != "portable"]


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime(num_threads=2)


@pytest.fixture(params=READERS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def num_steps(in_features: int) -> int:
    return -(-in_features // 32)


def packed_blocks(rows: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """Return rows [32 N, in_features] as packed blocks [N, pairs * 64]."""
    columns = rows.shape[1] + rows.shape[1] % 2
    padded = np.zeros((len(rows), columns), np.uint16)
    padded[:, : rows.shape[1]] = rows
    blocks = padded.reshape(-1, BLOCK_COLUMNS, columns // 2, 2).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(blocks).reshape(len(blocks), -1)


def compressed(runtime: Runtime, blocks: npt.NDArray[np.uint16], in_features: int) -> npt.NDArray[np.uint8] | None:
    """Return the compressed blocks [N, bytes]; None if they cannot be compressed."""
    size = runtime.library.octavo_packed_weight_size(
        library.WEIGHT_COMPRESSED, len(blocks) * BLOCK_COLUMNS, in_features
    )
    output = np.full((len(blocks), size // len(blocks)), 0xAA, np.uint8)
    fits = runtime.library.octavo_compress(
        runtime.pool, blocks.ctypes.data, len(blocks), in_features, output.ctypes.data
    )
    return output if fits else None


def decompressed(block: npt.NDArray[np.uint8], in_features: int) -> npt.NDArray[np.uint16]:
    """Read a block as `compressed.h` describes it; return its weights, inputs padded to whole steps."""
    groups = block[-num_steps(in_features) * WEIGHTS_PER_STEP // 128 * 192 :].reshape(-1, 192)
    weights = np.empty((len(groups), 2, 2, 4, 8), np.uint16)  # group, half, odd, j, i
    for half in range(2):
        codes = (groups[:, :64] >> 4 * half & 15).reshape(-1, 4, 2, 8)
        lower = groups[:, 64 + 64 * half :][:, :64].astype(np.uint16).reshape(-1, 4, 2, 8)
        for odd in range(2):
            weights[:, half, odd] = block[:16][codes[:, :, odd]].astype(np.uint16) << 8 | lower[:, :, odd]
    flat = weights.reshape(-1)
    for exception in block[16:].view(np.uint32):
        if exception == NO_EXCEPTION:
            break
        place = exception >> 8
        flat[place] = (exception & 255) << 8 | flat[place] & 255
    return flat


def like_trained(rows: int, columns: int, seed: int = 0) -> npt.NDArray[np.uint16]:
    """Return bits of bf16 numbers [rows, columns] that are distributed as weights are."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05
    return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("in_features", [1, 2, 31, 32, 33, 576, 1301])
@pytest.mark.parametrize("exceptions", [0, 1, WEIGHTS_PER_STEP // WEIGHTS_PER_EXCEPTION])
def test_every_weight_comes_back(runtime: Runtime, in_features: int, exceptions: int) -> None:
    rows = like_trained(96, in_features) & 0x07FF | 0x3800  # eight upper bytes, and that of zeros behind the last input
    random = np.random.default_rng(in_features)
    for block in rows.reshape(3, -1):
        places = random.permutation(len(block))[: exceptions * num_steps(in_features)]
        block[places] = random.integers(2**14, 2**16, len(places))
    blocks = packed_blocks(rows)

    output = compressed(runtime, blocks, in_features)

    assert output is not None
    for block, result in zip(blocks, output, strict=True):
        weights = decompressed(result, in_features)
        assert np.array_equal(weights[: len(block)], block)
        assert not weights[len(block) :].any()
    assert output.nbytes < 0.77 * blocks.nbytes or in_features < 500


def test_there_is_room_for_one_exception_in_256_weights(runtime: Runtime) -> None:
    rows = np.arange(16, dtype=np.uint16).repeat(2).reshape(32, 1).repeat(96, axis=1) << 8
    room = 3 * WEIGHTS_PER_STEP // WEIGHTS_PER_EXCEPTION
    rows.reshape(-1)[:room] = 0xFF00

    output = compressed(runtime, packed_blocks(rows), 96)
    assert output is not None
    assert np.array_equal(decompressed(output[0], 96), packed_blocks(rows)[0])

    rows.reshape(-1)[room] = 0xFF00
    assert compressed(runtime, packed_blocks(rows), 96) is None


def test_one_block_of_a_layer_that_cannot_be_compressed_is_found(runtime: Runtime) -> None:
    rows = like_trained(320, 64)
    assert compressed(runtime, packed_blocks(rows), 64) is not None

    rows[77] = np.arange(64) << 9

    assert compressed(runtime, packed_blocks(rows), 64) is None


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The formats of all layers that are packed."""
    noted: list[int] = []
    pack = Packer._pack

    def pack_and_note(self: Packer, *arguments: Any) -> tuple[int, int]:
        packed = pack(self, *arguments)
        noted.append(packed[1])
        return packed

    monkeypatch.setattr(Packer, "_pack", pack_and_note)
    return noted


def test_layers_like_trained_ones_are_compressed_and_others_are_not(
    variant: str, formats: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TinyModel(Shape(layers=1))
    model.head.weight[5] *= 2.0 ** torch.arange(-32, 32)
    sequence = make_sequence(1, 40, shuffled_blocks(1))

    logits = run_in_chunks(make_device(model, variant), sequence, 40)

    assert formats == [library.WEIGHT_COMPRESSED] * 4 + [library.WEIGHT_BF16]
    monkeypatch.setattr(Runtime, "reads_compressed", False)
    sequence.computed = 0
    assert torch.equal(run_in_chunks(make_device(model, variant), sequence, 40), logits)


@pytest.mark.parametrize("name", [*SHAPES, "one layer of many inputs"])
def test_compressed_layers_give_the_same_bits(
    name: str, variant: str, formats: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TinyModel(SHAPES.get(name, Shape(intermediate=2600)))
    model.head.weight[::7, 3] *= 2.0**-60  # exceptions
    model.layers[0]["down"].weight[3, ::11] *= 2.0**-40
    devices = [make_device(model, variant)]
    assert set(formats) == {library.WEIGHT_COMPRESSED}
    monkeypatch.setattr(Runtime, "reads_compressed", False)
    devices.append(make_device(model, variant))

    # Of tiles of 32 rows: a part, one and a part, several, several and a part. Vectors take 4, 6 or 12 rows at once.
    for num_tokens in (1, 2, 3, 4, 7, 12, 20, 33, 64, 111):
        sequences = [make_sequence(1, num_tokens, [2, 9, 4, 1, 3, 7, 8]) for _ in devices]
        one, other = (
            run_in_chunks(device, sequence, num_tokens) for device, sequence in zip(devices, sequences, strict=True)
        )
        assert torch.equal(one, other)
        assert one.isfinite().all()


@pytest.mark.parametrize("name", MIXTURES)
def test_compressed_experts_give_the_same_bits(
    name: str, variant: str, formats: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ExpertsModel(MIXTURES[name])
    one = run_in_chunks(make_device(model, variant), make_sequence(1, 90, shuffled_blocks(1)), 90)
    assert set(formats) == {library.WEIGHT_COMPRESSED}
    monkeypatch.setattr(Runtime, "reads_compressed", False)

    assert torch.equal(run_in_chunks(make_device(model, variant), make_sequence(1, 90, shuffled_blocks(1)), 90), one)


def test_a_tied_embedding_is_read_from_a_compressed_head(
    variant: str, formats: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TinyModel(SHAPES["odd sizes"])
    model.embedding[::5, 5] *= 2.0**-70  # exceptions, in every block
    model.head = type(model.head)(model.embedding)
    one = run_in_chunks(make_device(model, variant), make_sequence(1, 40, [3, 1, 2]), 40)
    assert set(formats) == {library.WEIGHT_COMPRESSED}
    monkeypatch.setattr(Runtime, "reads_compressed", False)

    assert torch.equal(run_in_chunks(make_device(model, variant), make_sequence(1, 40, [3, 1, 2]), 40), one)
