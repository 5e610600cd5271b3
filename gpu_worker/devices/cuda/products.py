"""Matrix products of the `cuda` device: torch's, always with as many rows, and those of quantised weights."""

from __future__ import annotations

import torch

GEMM_ROWS = 128
"""Rows of every matrix product. The library (cuBLAS, hipBLAS) chooses a kernel, and with it the order of sums, by
the shapes: with one number of rows for all steps there is one choice for each weight. More would cost small
steps, fewer would read the weights more often for prompts."""


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor) -> None:
    """Write x @ weight.T + bias to `output`, in products of GEMM_ROWS rows each.

    x [T, K], weight [N, K], bias [N] or None, output [T, N], all of one type; T is a multiple of GEMM_ROWS.
    """
    assert len(x) % GEMM_ROWS == 0, len(x)
    for start in range(0, len(x), GEMM_ROWS):
        rows = slice(start, start + GEMM_ROWS)
        if bias is None:
            torch.mm(x[rows], weight.t(), out=output[rows])
        else:
            torch.addmm(bias, x[rows], weight.t(), out=output[rows])


def padded_rows(num_rows: int) -> int:
    """Return the rows of a product that has at least `num_rows`."""
    return -(-num_rows // GEMM_ROWS) * GEMM_ROWS


def find_unstable_products(layers: list[tuple[torch.Tensor, torch.Tensor | None]]) -> list[tuple[int, ...]]:
    """Return the shapes of weights for which the bits of a row depend on its place among the GEMM_ROWS.

    layers  weights, and the bias of each that has one: a library adds it in a kernel of its own choice

    Libraries promise nothing about it, so it is tried: the same random rows, turned by some places, must
    give the same bits. Allocates, and waits for the device: for start-up only.
    """
    unstable = []
    for weight, bias in {(tuple(layer[0].shape), layer[1] is None): layer for layer in layers}.values():
        generator = torch.Generator(weight.device).manual_seed(1)
        x = torch.randn(GEMM_ROWS, weight.shape[1], generator=generator, device=weight.device).to(weight.dtype)
        outputs = []
        for turn in (0, 1, 37):
            output = weight.new_empty(GEMM_ROWS, len(weight))
            multiply(x.roll(turn, 0), weight, bias, output)
            outputs.append(output.roll(-turn, 0))
        if any(not torch.equal(output, outputs[0]) for output in outputs):
            unstable.append(tuple(weight.shape))
    return unstable
