"""Cosines and sines of rotary position embeddings, computed as transformers does, in float32."""

from __future__ import annotations

import math

import torch

from octavo.gpu_worker.models.config import RopeConfig
from octavo.gpu_worker.ops import Rotary


def make_rotary(config: RopeConfig, max_positions: int) -> Rotary:
    """Return the tables for positions 0 .. max_positions - 1."""
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
    frequencies = 1.0 / (config.theta**exponents)
    attention_factor = 1.0
    if config.rope_type == "linear":
        frequencies = frequencies / config.factor
    elif config.rope_type == "llama3":
        frequencies = _llama3(config, frequencies)
    elif config.rope_type == "yarn":
        frequencies = _yarn(config, config.theta**exponents)
        attention_factor = _yarn_attention_factor(config)
    if config.freq_factors:
        frequencies = frequencies / torch.tensor(config.freq_factors, dtype=torch.float32)
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies
    return Rotary(angles.cos() * attention_factor, angles.sin() * attention_factor, config.rotary_dim)


def _llama3(config: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Slow frequencies are divided by `factor`, fast ones kept, those between blended."""
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

    def scale(weight: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * weight * math.log(config.factor) + 1.0

    if config.mscale and config.mscale_all_dim:
        return scale(config.mscale) / scale(config.mscale_all_dim)
    return scale(1.0)
