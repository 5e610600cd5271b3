"""The layers behind the pooling are those of torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo.gpu_worker.steps.pooler import ACTIVATIONS, Dense, VectorNorm

X = np.random.default_rng(0).standard_normal(48).astype(np.float32)
WEIGHT = np.random.default_rng(1).standard_normal((32, 48)).astype(np.float32)
BIAS = np.random.default_rng(2).standard_normal(48).astype(np.float32)
OF_TORCH = {
    "identity": torch.nn.Identity(),
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: torch.softmax(x, -1),
}


@pytest.mark.parametrize("bias", [None, BIAS], ids=["no bias", "bias"])
def test_the_norm_is_that_of_torch(bias: np.ndarray | None) -> None:
    weight, eps = np.abs(BIAS), 0.1
    tensors = [None if each is None else torch.from_numpy(each) for each in (weight, bias)]

    found = VectorNorm(weight, bias, eps)(X)

    expected = torch.nn.functional.layer_norm(torch.from_numpy(X), (48,), *tensors, eps)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [None, BIAS[:32]], ids=["no bias", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_dense_layer_is_that_of_torch(activation: str, bias: np.ndarray | None) -> None:
    found = Dense(WEIGHT, bias, activation)(X)

    tensors = torch.from_numpy(WEIGHT), None if bias is None else torch.from_numpy(bias)
    expected = OF_TORCH[activation](torch.nn.functional.linear(torch.from_numpy(X), *tensors))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
