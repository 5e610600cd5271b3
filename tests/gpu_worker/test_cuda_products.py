"""Products whose bits depend on a row's place are found at start-up."""

from __future__ import annotations

import pytest
import torch

from octavo.gpu_worker.devices.cuda import products as cuda_products
from octavo.gpu_worker.devices.cuda.products import GEMM_ROWS, find_unstable_products

PLAIN, BIASED = torch.ones(8, 16), torch.ones(24, 16)
LAYERS = [(PLAIN, None), (BIASED, torch.ones(24))]


def test_a_stable_product_is_not_reported() -> None:
    assert find_unstable_products(LAYERS) == []


@pytest.mark.parametrize(("with_bias", "shape"), [(False, (8, 16)), (True, (24, 16))])
def test_a_product_is_tried_as_a_step_makes_it_with_its_bias_if_it_has_one(
    with_bias: bool, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    multiply = cuda_products.multiply

    def place_matters(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor) -> None:
        multiply(x, weight, bias, output)
        if (bias is not None) == with_bias:
            output += torch.arange(GEMM_ROWS)[:, None] / GEMM_ROWS

    monkeypatch.setattr(cuda_products, "multiply", place_matters)
    assert find_unstable_products(LAYERS) == [shape]
