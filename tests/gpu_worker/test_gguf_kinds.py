"""Each kind of a GGUF file, in the common form, has the values of the gguf package, and keeps them in wider forms."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from octavo.gpu_worker.formats.gguf_kinds import KINDS, Kind
from octavo.kernels.group_codes import CodeShape, holds

COLUMNS = 512
FACTORS = {  # where a block has numbers of half precision
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "MXFP4": (),
}  # fmt: skip


def random_rows(kind: Kind, rows: int, columns: int = COLUMNS, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Return rows whose every bit is random, but for the factors, which are like those of trained weights."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (rows * columns // kind.block_values, kind.block_bytes)).astype(np.uint8)
    for at in FACTORS[kind.name]:
        factors = random.normal(size=(len(blocks), 1)) * 0.3 / columns**0.5
        factors = factors.astype(np.float16)
        blocks[:, at : at + 2] = factors.view(np.uint8)
    if kind.name == "MXFP4":
        blocks[:, 0] = random.integers(114, 122, len(blocks))
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("number", KINDS)
def test_a_kind_has_the_values_that_its_definition_says(number: int) -> None:
    kind, rows = KINDS[number], random_rows(KINDS[number], 40)
    assert (kind.block_values, kind.block_bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]

    codes = kind.codes(rows)

    true = gguf.dequantize(rows, gguf.GGMLQuantizationType(number))
    assert codes.codes.max() < 1 << kind.shape.bits
    assert np.array_equal(codes.values(), true)
    assert true.std() > 0


@pytest.mark.parametrize("number", KINDS)
def test_a_form_with_more_bits_and_smaller_groups_tells_the_same_values(number: int) -> None:
    kind = KINDS[number]
    codes = kind.codes(random_rows(kind, 8))
    wide = CodeShape(8, 16, offset=128, has_minimum=True)

    moved = codes.as_shape(wide)

    assert np.allclose(moved.values(), codes.values(), rtol=1e-5, atol=1e-5 * np.abs(codes.values()).max())


def test_only_a_form_with_room_holds_another() -> None:
    q4_0, q4_1, q6_k, q8_0, mxfp4 = (KINDS[number].shape for number in (2, 3, 14, 8, 39))
    assert holds(q8_0, q4_0)
    assert holds(q4_1, q4_0)
    assert holds(q8_0, mxfp4)
    assert not holds(q4_0, q4_1)
    assert not holds(q8_0, q6_k)  # its groups are smaller
    assert not holds(q4_0, q8_0)
    assert not holds(mxfp4, q4_0)
    assert not holds(CodeShape(4, 32, offset=4), mxfp4)
