"""Cosines and sines of rotary position embeddings, computed as transformers does, in float32."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.models.config import RopeConfig, yarn_scale
from octavo.gpu_worker.ops import Rotary

if TYPE_CHECKING:  # what a model needs of memory is known without torch
    import torch


def make_rotary(config: RopeConfig, max_positions: int) -> Rotary:
    """Return the tables for positions 0 .. max_positions - 1. Raises ModelError."""
    import torch

    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
    frequencies = 1.0 / (config.theta**exponents)
    attention_factor = 1.0
    if config.rope_type == "linear":
        frequencies = frequencies / config.factor
    elif config.rope_type == "llama3":
        frequencies = _llama3(config, frequencies)
    elif config.rope_type == "longrope":
        # By the longest context, not by that of a sequence: keys in the cache stay as they were rotated.
        is_long = max_positions > config.original_max_position_embeddings
        factors = config.long_factors if is_long else config.short_factors
        frequencies = 1.0 / (torch.tensor(factors, dtype=torch.float32) * config.theta**exponents)
        attention_factor = _longrope_attention_factor(config)
    elif config.rope_type == "yarn":
        frequencies = _yarn(config, config.theta**exponents)
        attention_factor = _yarn_attention_factor(config)
    if config.freq_factors:
        frequencies = frequencies / torch.tensor(config.freq_factors, dtype=torch.float32)
    if not torch.isfinite(frequencies).all() or not math.isfinite(attention_factor):
        raise ModelError(
            f"the model's rotary settings give frequencies that are not finite: rope_theta {config.theta:g}, factor "
            f"{config.factor:g}; the checkpoint is damaged"
        )
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies
    # In place where that can be: for a long context they are large.
    cos = angles.cos().mul_(attention_factor)
    return Rotary(cos, angles.sin_().mul_(attention_factor), config.rotary_dim)


def make_unrotated(max_positions: int) -> Rotary:
    """Return tables that rotate nothing."""
    import torch

    return Rotary(torch.ones(max_positions, 1), torch.zeros(max_positions, 1), 2)


def _longrope_attention_factor(config: RopeConfig) -> float:
    if config.attention_factor is not None:
        return config.attention_factor
    if config.factor <= 1 or config.original_max_position_embeddings < 2:
        return 1.0
    return math.sqrt(1 + math.log(config.factor) / math.log(config.original_max_position_embeddings))


def _llama3(config: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Slow frequencies are divided by `factor`, fast ones kept, those between blended."""
    import torch

    context = config.original_max_position_embeddings
    low, high = config.low_freq_factor, config.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    slowed = torch.where(wavelengths > context / low, frequencies / config.factor, frequencies)
    smooth = (context / wavelengths - low) / (high - low)
    blended = (1 - smooth) * slowed / config.factor + smooth * slowed
    between = ~(wavelengths < context / high) & ~(wavelengths > context / low)
    return torch.where(between, blended, slowed)


def _yarn(config: RopeConfig, periods: torch.Tensor) -> torch.Tensor:
    """Blend extrapolated and interpolated frequencies by how often a dimension turns in the old context."""
    import torch

    dim = config.rotary_dim

    def turning(turns: float) -> float:
        context = config.original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(context) / (2 * math.log(config.theta))

    low, high = turning(config.beta_fast), turning(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    extrapolated = 1 - ramp
    return 1.0 / (config.factor * periods) * (1 - extrapolated) + 1.0 / periods * extrapolated


def _yarn_attention_factor(config: RopeConfig) -> float:
    """Return what cosines and sines are multiplied by."""
    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return yarn_scale(config, config.mscale) / yarn_scale(config, config.mscale_all_dim)
    return yarn_scale(config, 1.0)
