"""Weights and buffers of the `cuda` device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from octavo.gpu_worker.ops import Experts, Linear
from octavo.gpu_worker.quantization import Quantization
from octavo.kernels.configs import ExpertsConfig
from octavo.kernels.expert_routing import Mixture
from octavo.kernels.moe import ExpertsWorkspace
from octavo.kernels.quantized_linear import quantize_weight

Largest = Callable[[torch.Tensor], torch.Tensor]
"""Makes of values [N] float32 the largest that any rank has."""

_QUANTIZED_TYPES = {Quantization.INT8: torch.int8, Quantization.FP8: torch.float8_e4m3fn}
_QUANTIZED_AT_ONCE = 1 << 24  # weights: in float32, which they are for a moment, 64 MiB


@dataclass(frozen=True)
class Layer:
    """Linear layers on the device, one below the other.

    weight  [out_features, in_features] of the type that is computed in; or quantised, of eight bits
    scales  [out_features] float32 if it is quantised
    bias    [out_features] or None
    """

    weight: torch.Tensor
    scales: torch.Tensor | None
    bias: torch.Tensor | None


class Weights:
    """The model's tensors on the device, each moved once and known by identity: the model keeps its own alive."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        quantization: Quantization = Quantization.NONE,
        largest: Largest | None = None,
    ) -> None:
        """Move nothing yet.

        quantization  none, or one of the schemes with eight bits
        largest       makes the largest of every rank's values, of a model that is split; all ranks then ask for
                      the same layers in the same order
        """
        self._device = device
        self._dtype = dtype
        self._quantization = quantization
        self._largest = largest
        self._moved: dict[tuple[int, ...], torch.Tensor] = {}
        self._layers: dict[tuple[int, ...], Layer] = {}
        self._stacks: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor | None]] = {}
        self.num_bytes = 0

    def layer(self, *parts: Linear, has_part_of_inputs: bool = False) -> Layer:
        """Return linear layers of one input as one layer, quantised if the device was told so.

        has_part_of_inputs  whether the other ranks of a split model have the other inputs of the same outputs
        """
        key = tuple(id(part.weight) for part in parts)
        found = self._layers.get(key)
        if found is None:
            found = self._layers[key] = self._move_layer(parts, has_part_of_inputs)
        return found

    def head(self, linear: Linear) -> Layer:
        """Return what makes logits, or chooses experts: it is not quantised."""
        return Layer(self.matrix(linear.weight), None, self.bias(linear))

    def matrix(self, *parts: torch.Tensor) -> torch.Tensor:
        """Return tensors, one below the other, in the type that is computed in."""
        return self._get(parts, self._dtype)

    def table(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor in its own type."""
        return self._get((tensor,), tensor.dtype)

    def norm(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight of a norm: in float32 if it is that, else in the type that is computed in."""
        return self.table(weight) if weight.dtype == torch.float32 else self.matrix(weight)

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
        (gate_ups, gate_up_scales), (downs, down_scales) = (
            self._stack(gate_up, num, has_part_of_inputs=False),
            self._stack(experts.down, num, has_part_of_inputs=True),
        )
        return Mixture(
            gate_ups,
            downs,
            experts.num_chosen,
            experts.num_shared,
            experts.is_normalized,
            gate_up_scales,
            down_scales,
            experts.routing,
            None if experts.bias is None else self.table(experts.bias),
            None if experts.biases is None else (self.table(experts.biases[0]), self.table(experts.biases[1])),
        )

    def matrices(self) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Return the matrices that are multiplied with, and the bias of each that has one."""
        return [
            (tensor, self._moved.get((-1, *key)))
            for key, tensor in self._moved.items()
            if tensor.dtype == self._dtype and tensor.dim() == 2
        ]

    def _move_layer(self, parts: tuple[Linear, ...], has_part_of_inputs: bool) -> Layer:
        weights, bias = [part.weight for part in parts], self.bias(*parts)
        if self._quantization is Quantization.NONE:
            return Layer(self.matrix(*weights), None, bias)
        return Layer(*self._quantize(weights, has_part_of_inputs), bias)

    def _quantize(self, weights: Sequence[torch.Tensor], has_part_of_inputs: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return matrices, one below the other, in eight bits, and the scale of each row."""
        dtype = _QUANTIZED_TYPES[self._quantization]
        shape = (sum(map(len, weights)), weights[0].shape[1])
        values = torch.empty(shape, dtype=dtype, device=self._device)
        scales = torch.empty(shape[0], dtype=torch.float32, device=self._device)
        num_rows = max(_QUANTIZED_AT_ONCE // shape[1], 1)
        pieces = [weight[first : first + num_rows] for weight in weights for first in range(0, len(weight), num_rows)]
        maxima = None
        if has_part_of_inputs and self._largest is not None:
            maxima = torch.cat([piece.to(self._device).float().abs().amax(dim=1) for piece in pieces])
            maxima = self._largest(maxima)
        start = 0
        for piece in pieces:
            place = slice(start, start + len(piece))
            of_rows = None if maxima is None else maxima[place]
            values[place], scales[place] = quantize_weight(piece.to(self._device), dtype, of_rows)
            start += len(piece)
        self.num_bytes += values.nbytes + scales.nbytes
        return values, scales

    def _stack(
        self, parts: tuple[torch.Tensor, ...], num_matrices: int, has_part_of_inputs: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return tensors as so many matrices, each joined of as many parts, and their scales if they are quantised."""
        key = tuple(id(part) for part in parts)
        if key not in self._stacks:
            scales = None
            if self._quantization is Quantization.NONE:
                joined = self._move(parts, self._dtype)
                self.num_bytes += joined.nbytes
            else:
                joined, scales = self._quantize(parts, has_part_of_inputs)
                scales = scales.view(num_matrices, -1)
            self._stacks[key] = joined.view(num_matrices, -1, parts[0].shape[1]), scales
        return self._stacks[key]

    def _get(self, parts: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
        key = tuple(id(part) for part in parts)
        found = self._moved.get(key)
        return self._keep(key, self._move(parts, dtype)) if found is None else found

    def _move(self, parts: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
        first = parts[0]
        if len(parts) == 1 and (first.device, first.dtype) == (self._device, dtype) and first.is_contiguous():
            return first  # made there: nobody writes to weights
        shape = (sum(len(part) for part in parts), *first.shape[1:])
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

    def for_experts(self, mixture: Mixture, config: ExpertsConfig, dtype: torch.dtype) -> ExpertsWorkspace:
        """Return the memory of a mixture of experts; layers of one size share it."""
        key = (*mixture.down.shape, mixture.num_taken)
        found = self._for_experts.get(key)
        if found is None:
            found = self._for_experts[key] = ExpertsWorkspace(mixture, self._num_rows, config, dtype)
            self.num_bytes += found.num_bytes
        return found
