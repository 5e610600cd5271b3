"""Weights, buffers and matrix products of the `cuda` device."""

from __future__ import annotations

import torch

from octavo.gpu_worker.ops import Experts, Linear
from octavo.kernels.configs import ExpertsConfig
from octavo.kernels.moe import ExpertsWorkspace, Mixture

GEMM_ROWS = 128
"""Rows of every matrix product. The library (cuBLAS, hipBLAS) chooses a kernel, and with it the order of sums, by
the shapes: with one number of rows for all steps there is one choice for each weight. More would cost small
steps, fewer would read the weights more often for prompts."""


class Weights:
    """The model's tensors on the device, each moved once and known by identity: the model keeps its own alive."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._moved: dict[tuple[int, ...], torch.Tensor] = {}
        self.num_bytes = 0

    def matrix(self, *parts: torch.Tensor) -> torch.Tensor:
        """Return tensors, one below the other, in the type that is computed in."""
        return self._get(parts, self._dtype)

    def table(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor in its own type."""
        return self._get((tensor,), tensor.dtype)

    def bias(self, *parts: Linear) -> torch.Tensor | None:
        """Return the biases of layers that are joined, if they have any; zeros for those that have none."""
        if all(part.bias is None for part in parts):
            return None
        key = (-1, *(id(part.weight) for part in parts))
        if key not in self._moved:
            zeros = [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts]
            self._keep(key, torch.cat([bias.to(self._device, self._dtype) for bias in zeros]))
        return self._moved[key]

    def mixture(self, experts: Experts) -> Mixture:
        """Return the weights of a mixture of experts."""
        gate_up = tuple(part for pair in zip(experts.gate, experts.up, strict=True) for part in pair)
        num = len(experts.gate)
        gate_ups, downs = self._stack(gate_up, num), self._stack(experts.down, num)
        return Mixture(gate_ups, downs, experts.num_chosen, experts.num_shared, experts.is_normalized)

    def matrices(self) -> list[torch.Tensor]:
        """Return the matrices that are multiplied with."""
        return [tensor for tensor in self._moved.values() if tensor.dtype == self._dtype and tensor.dim() == 2]

    def _stack(self, parts: tuple[torch.Tensor, ...], num_matrices: int) -> torch.Tensor:
        """Return tensors as so many matrices of the type that is computed in, each joined of as many parts."""
        key = tuple(id(part) for part in parts)
        if key not in self._moved:
            self._keep(key, self._move(parts, self._dtype).view(num_matrices, -1, parts[0].shape[1]))
        return self._moved[key]

    def _get(self, parts: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
        key = tuple(id(part) for part in parts)
        found = self._moved.get(key)
        return self._keep(key, self._move(parts, dtype)) if found is None else found

    def _move(self, parts: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        moved = torch.empty(shape, dtype=dtype, device=self._device)
        start = 0
        for part in parts:
            moved[start : start + len(part)] = part
            start += len(part)
        return moved

    def _keep(self, key: tuple[int, ...], tensor: torch.Tensor) -> torch.Tensor:
        self._moved[key] = tensor
        self.num_bytes += tensor.nbytes
        return tensor


class Buffers:
    """Memory for what is between operations: one piece for each name, as wide as it was first asked for."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._num_rows = num_rows
        self._device = device
        self._buffers: dict[tuple[str, int, torch.dtype], torch.Tensor] = {}
        self._for_experts: dict[tuple[int, ...], ExpertsWorkspace] = {}
        self.num_bytes = 0

    def get(self, name: str, width: int, dtype: torch.dtype, num_rows: int = 0) -> torch.Tensor:
        """Return the buffer [rows, width] of a name; zeroed at first: what pads a batch must be finite numbers."""
        key = (name, width, dtype)
        found = self._buffers.get(key)
        if found is None:
            shape = (num_rows or self._num_rows, width)
            found = self._buffers[key] = torch.zeros(shape, dtype=dtype, device=self._device)
            self.num_bytes += found.nbytes
        return found

    def for_experts(self, mixture: Mixture, config: ExpertsConfig) -> ExpertsWorkspace:
        """Return the memory of a mixture of experts; layers of one size share it."""
        key = (*mixture.down.shape, mixture.num_taken)
        found = self._for_experts.get(key)
        if found is None:
            found = self._for_experts[key] = ExpertsWorkspace(mixture, self._num_rows, config)
            self.num_bytes += found.num_bytes
        return found


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


def find_unstable_products(weights: list[torch.Tensor]) -> list[tuple[int, ...]]:
    """Return the shapes of weights for which the bits of a row depend on its place among the GEMM_ROWS.

    Libraries promise nothing about it, so it is tried: the same random rows, turned by some places, must
    give the same bits. Allocates, and waits for the device: for start-up only.
    """
    unstable = []
    for weight in {tuple(weight.shape): weight for weight in weights}.values():
        generator = torch.Generator(weight.device).manual_seed(1)
        x = torch.randn(GEMM_ROWS, weight.shape[1], generator=generator, device=weight.device).to(weight.dtype)
        outputs = []
        for turn in (0, 1, 37):
            output = weight.new_empty(GEMM_ROWS, len(weight))
            multiply(x.roll(turn, 0), weight, None, output)
            outputs.append(output.roll(-turn, 0))
        if any(not torch.equal(output, outputs[0]) for output in outputs):
            unstable.append(tuple(weight.shape))
    return unstable
