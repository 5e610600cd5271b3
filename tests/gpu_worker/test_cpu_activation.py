"""Activations of the native CPU device where they are small, and an error does not hide behind larger numbers."""

from __future__ import annotations

import pytest
import torch

from octavo.gpu_worker.ops import Linear
from octavo.kernels.cpu import library

from .test_cpu_device import Sequence, Shape, WholeSequenceOps, make_device, run_in_chunks, shuffled_blocks
from .test_cpu_quantization import FeedForwardModel

TOKEN = 5


@pytest.mark.parametrize("variant", library.runnable_variants())
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_the_activation_of_negative_numbers_is_that_of_torch(activation: str, variant: str) -> None:
    """All gates of the one token are from -3.5 to -1.5; what comes of them is as large as the residual stream."""
    model = FeedForwardModel(Shape(layers=1, activation=activation))  # type: ignore[arg-type]
    (layer,) = model.layers
    x = model.embedding[TOKEN].float()
    normed = x / (x.square().mean() + layer["norm"].eps).sqrt() * layer["norm"].weight.float()
    gates = torch.linspace(-3.5, -1.5, model.shape.intermediate)
    layer["gate"] = Linear(torch.outer(gates, normed / normed.square().sum()).bfloat16())
    inner = WholeSequenceOps([TOKEN])
    h = inner.norm(x[None], layer["norm"])
    out = inner.linear(inner.gated_linear(h, layer["gate"], layer["up"], activation), layer["down"])  # type: ignore[arg-type]
    layer["down"] = Linear((layer["down"].weight.float() * (x.norm() / out.norm())).bfloat16())
    token_ids = [TOKEN] * 20

    logits = run_in_chunks(make_device(model, variant), Sequence(token_ids, shuffled_blocks(1)), 20)

    expected = model.forward(WholeSequenceOps(token_ids))
    assert (logits - expected).square().mean().sqrt() < 0.008 * expected.std()
