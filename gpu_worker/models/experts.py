"""Mixtures of experts, which families have in some or all layers in place of a dense feed-forward layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.gpu_worker.models.config import ModelConfig
from octavo.gpu_worker.ops import Activation, Experts, Norm, Ops, Value

if TYPE_CHECKING:  # what a model needs of memory is known without torch
    import torch


@dataclass(frozen=True)
class ExpertsFeedForward:
    """A feed-forward layer that is a mixture of experts."""

    experts: Experts

    def forward(self, ops: Ops, residual: Value, norm: Norm, activation: Activation) -> Value:
        """Return residual + experts(norm(residual))."""
        return ops.add_experts(residual, ops.norm(residual, norm), self.experts, activation)


def in_layer(config: ModelConfig, layer: int) -> bool:
    """Return whether a layer is a mixture of experts."""
    return config.experts is not None and config.experts.in_layer[layer]


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the tensors of one mixture, named without the layer."""
    assert config.experts is not None, config.architecture
    settings, hidden = config.experts, config.hidden_size
    names = settings.names
    shapes: dict[str, tuple[int, ...]] = {f"{names.block}.{names.router}.weight": (settings.num_experts, hidden)}
    if names.has_biases:
        shapes[f"{names.block}.{names.router}.bias"] = (settings.num_experts,)
        for name, size in (
            (names.gate, settings.intermediate_size),
            (names.up, settings.intermediate_size),
            (names.down, hidden),
        ):
            shapes[f"{names.block}.experts.{name}_bias"] = (settings.num_experts, size)
    if names.bias:
        rows = (1,) if names.is_bias_a_row else ()
        shapes[f"{names.block}.{names.bias}"] = (*rows, settings.num_experts)
    groups = {f"{names.block}.experts.{index}": settings.intermediate_size for index in range(settings.num_experts)}
    if settings.shared_intermediate_size:
        groups[f"{names.block}.{names.shared}"] = settings.shared_intermediate_size
        if settings.routing.has_shared_gate:
            shapes[f"{names.block}.shared_expert_gate.weight"] = (1, hidden)
    for group, inner in groups.items():
        shapes[f"{group}.{names.gate}.weight"] = shapes[f"{group}.{names.up}.weight"] = (inner, hidden)
        shapes[f"{group}.{names.down}.weight"] = (hidden, inner)
    return shapes


def take_layer(config: ModelConfig, tensors: dict[str, torch.Tensor], prefix: str) -> ExpertsFeedForward:
    """Take a layer's tensors, whose names begin with `prefix`, out of `tensors`."""
    import torch

    assert config.experts is not None, config.architecture
    settings = config.experts
    names = settings.names
    prefix += names.block

    def matrices(name: str) -> tuple[torch.Tensor, ...]:
        chosen = [tensors.pop(f"{prefix}.experts.{index}.{name}.weight") for index in range(settings.num_experts)]
        if settings.shared_intermediate_size:
            shared = tensors.pop(f"{prefix}.{names.shared}.{name}.weight")
            chosen += _pieces(shared, int(name == names.down), settings.intermediate_size)
        return tuple(chosen)

    gate, up, down = map(matrices, (names.gate, names.up, names.down))
    router = tensors.pop(f"{prefix}.{names.router}.weight")
    if settings.shared_intermediate_size and settings.routing.has_shared_gate:
        router = torch.cat([router, tensors.pop(f"{prefix}.shared_expert_gate.weight").to(router.dtype)])
    bias = tensors.pop(f"{prefix}.{names.bias}").float().flatten() if names.bias else None
    router_bias = biases = None
    if names.has_biases:
        router_bias = tensors.pop(f"{prefix}.{names.router}.bias")
        gated = [tensors.pop(f"{prefix}.experts.{name}_bias") for name in (names.gate, names.up)]
        biases = (torch.cat(gated, dim=1), tensors.pop(f"{prefix}.experts.{names.down}_bias"))
    return ExpertsFeedForward(
        Experts(
            router,
            gate,
            up,
            down,
            settings.num_chosen,
            len(gate) - settings.num_experts,
            settings.is_normalized,
            settings.routing,
            bias,
            router_bias,
            biases,
        )
    )


def _pieces(matrix: torch.Tensor, dim: int, size: int) -> list[torch.Tensor]:
    """Cut a shared expert's matrix into experts of the common size: a sum over its inner dimensions is one over them.

    The last piece is filled with zeros.
    """
    import torch

    pieces = [piece.contiguous() for piece in torch.split(matrix, size, dim)]
    missing = size - pieces[-1].shape[dim]
    if missing:
        filling = pieces[-1].new_zeros([missing if d == dim else n for d, n in enumerate(matrix.shape)])
        pieces[-1] = torch.cat([pieces[-1], filling], dim)
    return pieces
