"""Mixtures of experts: what Mixtral, Qwen2-MoE and Qwen3-MoE have in place of a dense feed-forward layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from octavo.gpu_worker.models.config import ModelConfig, Traits
from octavo.gpu_worker.ops import Activation, Experts, Norm, Ops, Value

# The defaults are those of transformers' config classes: published files leave them out.
ARCHITECTURES: dict[str, Traits] = {
    "MixtralForCausalLM": Traits(
        {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
        windows="all",
        has_experts=True,
    ),
    "Qwen2MoeForCausalLM": Traits(
        {
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "num_local_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        qkv_bias=True,
        windows="some",
        has_experts=True,
    ),
    "Qwen3MoeForCausalLM": Traits(
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        qkv_bias=None,
        output_bias=None,
        qk_norm=True,
        windows="switched",
        has_experts=True,
    ),
}


class _Names(NamedTuple):
    """What a checkpoint calls the parts of a layer."""

    block: str
    gate: str
    up: str
    down: str


_MIXTRAL = _Names("block_sparse_moe", "w1", "w3", "w2")
_QWEN = _Names("mlp", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ExpertsFeedForward:
    """A feed-forward layer that is a mixture of experts."""

    experts: Experts

    def forward(self, ops: Ops, residual: Value, norm: Norm, activation: Activation) -> Value:
        """Return residual + experts(norm(residual))."""
        return ops.norm_experts_residual(residual, norm, self.experts, activation)


def in_layer(config: ModelConfig, layer: int) -> bool:
    """Return whether a layer is a mixture of experts."""
    return config.experts is not None and config.experts.in_layer[layer]


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the tensors of one mixture, named without the layer."""
    assert config.experts is not None, config.architecture
    names, settings, hidden = _names(config), config.experts, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {f"{names.block}.gate.weight": (settings.num_experts, hidden)}
    groups = {f"{names.block}.experts.{index}": settings.intermediate_size for index in range(settings.num_experts)}
    if settings.shared_intermediate_size:
        groups[f"{names.block}.shared_expert"] = settings.shared_intermediate_size
        shapes[f"{names.block}.shared_expert_gate.weight"] = (1, hidden)
    for group, inner in groups.items():
        shapes[f"{group}.{names.gate}.weight"] = shapes[f"{group}.{names.up}.weight"] = (inner, hidden)
        shapes[f"{group}.{names.down}.weight"] = (hidden, inner)
    return shapes


def take_layer(config: ModelConfig, tensors: dict[str, torch.Tensor], prefix: str) -> ExpertsFeedForward:
    """Take a layer's tensors, whose names begin with `prefix`, out of `tensors`."""
    assert config.experts is not None, config.architecture
    names, settings = _names(config), config.experts
    prefix += names.block

    def matrices(name: str) -> tuple[torch.Tensor, ...]:
        chosen = [tensors.pop(f"{prefix}.experts.{index}.{name}.weight") for index in range(settings.num_experts)]
        if settings.shared_intermediate_size:
            shared = tensors.pop(f"{prefix}.shared_expert.{name}.weight")
            chosen += _pieces(shared, int(name == names.down), settings.intermediate_size)
        return tuple(chosen)

    router, gate, up, down = tensors.pop(f"{prefix}.gate.weight"), *map(matrices, names[1:])
    if settings.shared_intermediate_size:
        router = torch.cat([router, tensors.pop(f"{prefix}.shared_expert_gate.weight").to(router.dtype)])
    num_shared = len(gate) - settings.num_experts
    return ExpertsFeedForward(Experts(router, gate, up, down, settings.num_chosen, num_shared, settings.is_normalized))


def _names(config: ModelConfig) -> _Names:
    return _MIXTRAL if config.architecture == "MixtralForCausalLM" else _QWEN


def _pieces(matrix: torch.Tensor, dim: int, size: int) -> list[torch.Tensor]:
    """Cut a shared expert's matrix into experts of the common size: a sum over its inner dimensions is one over them.

    The last piece is filled with zeros.
    """
    pieces = [piece.contiguous() for piece in torch.split(matrix, size, dim)]
    missing = size - pieces[-1].shape[dim]
    if missing:
        filling = pieces[-1].new_zeros([missing if d == dim else n for d, n in enumerate(matrix.shape)])
        pieces[-1] = torch.cat([pieces[-1], filling], dim)
    return pieces
