# mypy: allow-untyped-calls
"""Inputs of a wanted size for each kernel, what it should compute from them, and what it must move.

For tuning (`tune.py`) and for measuring; tensors are made in place on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from octavo.kernels import reference
from octavo.kernels.attention_plan import plan_attention
from octavo.kernels.configs import (
    GATED,
    ROTARY,
    AttentionConfig,
    ExpertsConfig,
    LinearConfig,
    LinearKind,
    RowConfig,
    Step,
    attention_config,
    experts_config,
    linear_config,
)
from octavo.kernels.expert_routing import Mixture
from octavo.kernels.gated import gated
from octavo.kernels.moe import ExpertsWorkspace, add_experts
from octavo.kernels.paged_attention import BLOCK_SIZE, paged_attention, partial_buffers, tile_queries
from octavo.kernels.quantized_linear import quantize_rows, quantize_weight, quantized_linear
from octavo.kernels.rms_norm import add_rms_norm
from octavo.kernels.rotary_kv import rotary_write_kv

TOLERANCE = {torch.float32: 5e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Problem:
    """One kernel with inputs.

    prepare    takes a configuration; returns what launches the kernel once, without allocating
    output     what the kernel writes;  expected  what it should have written, float32
    config     the configuration that `configs.py` has for it; None if there is no choice
    num_bytes  least memory traffic;  flops  operations of its products
    dtype      what it computes in, if the output is of another type
    """

    name: str
    prepare: Callable[[Any], Callable[[], None]]
    output: torch.Tensor
    expected: Callable[[], torch.Tensor]
    config: Any
    num_bytes: int
    flops: int = 0
    dtype: torch.dtype | None = None

    def error(self) -> str:
        """Compare the output with what it should be; return what is wrong, or nothing."""
        expected = self.expected()
        tolerance = TOLERANCE[self.dtype or self.output.dtype]
        allowed = tolerance * (expected.abs() + expected.abs().max().clamp(max=1.0))
        difference = (self.output.float() - expected).abs()
        wrong = int((~(difference <= allowed)).sum())  # NaN is wrong too
        return f"{wrong} of {expected.numel()} values differ, by up to {float(difference.max()):.3g}" if wrong else ""


def attention_problem(
    device: str,
    target: str,
    step: Step,
    num_queries: Sequence[int],
    lengths: Sequence[int],
    *,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
) -> Problem:
    """Sequences of `lengths` tokens, of which the last `num_queries` are computed; blocks in random order."""
    counts = torch.tensor([-(-length // BLOCK_SIZE) for length in lengths])
    order = torch.randperm(int(counts.sum())) + 1
    tables = torch.zeros(len(lengths), int(counts.max()), dtype=torch.int32)
    for row, blocks in enumerate(order.split(counts.tolist())):
        tables[row, : len(blocks)] = blocks
    shape = (len(order) + 1, 2, BLOCK_SIZE, num_kv_heads, head_dim)
    cache = torch.empty(shape, device=device, dtype=dtype).normal_().to(cache_dtype or dtype)
    queries = torch.empty(sum(num_queries), num_heads, head_dim, device=device, dtype=dtype).normal_()
    starts = torch.tensor([0, *num_queries]).cumsum(0).int()
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    output = torch.empty_like(queries)
    sequence = (starts.to(device), seq_lens.to(device), tables.to(device))
    scale = head_dim**-0.5

    def prepare(config: AttentionConfig) -> Callable[[], None]:
        plan = plan_attention(
            starts.numpy(),
            seq_lens.numpy(),
            tile_queries=tile_queries(config, num_heads, num_kv_heads),
            key_tile=config.block_n,
            split_keys=config.split_keys,
        )
        work, combines = torch.from_numpy(plan.work).to(device), torch.from_numpy(plan.combines).to(device)
        partial, stats = partial_buffers(config, plan.num_slots, num_kv_heads, head_dim, device)
        arguments = (queries, cache, work, combines, *sequence, output, partial, stats)
        return lambda: paged_attention(*arguments, config=config, scale=scale)

    seen = sum(count * length - count * (count - 1) // 2 for count, length in zip(num_queries, lengths, strict=True))
    return Problem(
        f"attention {step} D={head_dim} {num_heads}/{num_kv_heads} tokens={sum(num_queries)} keys={sum(lengths)}",
        prepare,
        output,
        lambda: reference.paged_attention(queries, cache, *sequence, scale=scale),
        attention_config(target, step, head_dim, is_float32=dtype == torch.float32),
        num_bytes=2 * sum(lengths) * num_kv_heads * head_dim * cache.element_size() + 2 * output.nbytes,
        flops=4 * seen * num_heads * head_dim,
    )


def linear_problem(
    device: str,
    target: str,
    kind: LinearKind,
    num_tokens: int,
    in_features: int,
    out_features: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    only: int = 0,
) -> Problem:
    """A quantised linear layer; quantising the activations is part of it. `only` > 0: for the first tokens only."""
    weight = torch.empty(out_features, in_features, device=device, dtype=dtype).normal_(std=in_features**-0.5)
    values, scales = quantize_weight(weight, torch.int8 if kind.startswith("int8") else torch.float8_e4m3fn)
    x = torch.empty(num_tokens, in_features, device=device, dtype=dtype).normal_()
    num_tokens = only or num_tokens
    x = x[:num_tokens]
    output = torch.empty(num_tokens, out_features, device=device, dtype=dtype)
    is_quantized_x = kind in ("int8_int8", "fp8_fp8")
    x_values = torch.empty(x.shape, device=device, dtype=values.dtype)
    x_scales = torch.empty(num_tokens, device=device)

    def prepare(config: LinearConfig) -> Callable[[], None]:
        def run() -> None:
            if is_quantized_x:
                quantize_rows(x, x_values, x_scales)
                quantized_linear(x_values, values, scales, output, config=config, x_scales=x_scales)
            else:
                quantized_linear(x, values, scales, output, config=config)

        return run

    def expected() -> torch.Tensor:
        if is_quantized_x:
            rows, row_scales = reference.quantize_rows(x, values.dtype)
            return reference.quantized_linear(rows, values, scales, x_scales=row_scales)
        return reference.quantized_linear(x, values, scales)

    return Problem(
        f"linear {kind} tokens={num_tokens} {in_features}->{out_features}",
        prepare,
        output,
        expected,
        linear_config(target, kind, out_features, num_tokens, is_float32=dtype == torch.float32 and not is_quantized_x),
        num_bytes=values.nbytes + x.nbytes + output.nbytes,
        flops=2 * num_tokens * in_features * out_features,
    )


def experts_problem(
    device: str,
    target: str,
    num_tokens: int,
    hidden_size: int,
    intermediate_size: int,
    num_routed: int,
    num_chosen: int,
    *,
    num_shared: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    only: int = 0,
) -> Problem:
    """A mixture of experts, from the router's logits on, added to zeros. `only` > 0: for the first tokens only."""
    num_experts = num_routed + num_shared

    def weights(outputs: int, inputs: int) -> torch.Tensor:
        return torch.empty(num_experts, outputs, inputs, device=device, dtype=dtype).normal_(std=inputs**-0.5)

    mixture = Mixture(
        weights(2 * intermediate_size, hidden_size),
        weights(hidden_size, intermediate_size),
        num_chosen,
        num_shared,
        is_normalized=num_shared == 0,
    )
    x = torch.empty(num_tokens, hidden_size, device=device, dtype=dtype).normal_()
    logits = torch.empty(num_tokens, num_routed + (num_shared > 0), device=device, dtype=dtype).normal_()
    num_tokens = only or num_tokens
    x, logits = x[:num_tokens], logits[:num_tokens]
    slots = torch.arange(num_tokens, device=device, dtype=torch.int32)
    output = torch.empty(num_tokens, hidden_size, device=device)

    def prepare(config: ExpertsConfig) -> Callable[[], None]:
        workspace = ExpertsWorkspace(mixture, num_tokens, config)

        def run() -> None:
            output.zero_()
            add_experts(output, x, logits, slots, mixture, workspace, "silu", config, GATED[target])

        return run

    def expected() -> torch.Tensor:
        return reference.experts(
            x,
            logits,
            mixture.gate_up,
            mixture.down,
            "silu",
            num_chosen=num_chosen,
            num_shared=num_shared,
            is_normalized=mixture.is_normalized,
        )

    chosen = logits[:, :num_routed].float().topk(num_chosen, dim=1).indices
    num_read = len(chosen.unique()) + num_shared  # experts whose weights any row needs
    expert_weights = 3 * hidden_size * intermediate_size
    return Problem(
        f"experts tokens={num_tokens} {num_chosen} of {num_routed}+{num_shared} {hidden_size}x{intermediate_size}",
        prepare,
        output,
        expected,
        experts_config(target, is_float32=dtype == torch.float32),
        num_bytes=num_read * expert_weights * x.element_size() + x.nbytes + output.nbytes,
        flops=2 * num_tokens * (num_chosen + num_shared) * expert_weights,
        dtype=dtype,
    )


def gated_problem(device: str, target: str, num_tokens: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """SiLU of the gate times up."""
    gate_up = torch.empty(num_tokens, 2 * cols, device=device, dtype=dtype).normal_()
    output = torch.empty(num_tokens, cols, device=device, dtype=dtype)
    return Problem(
        f"gated silu tokens={num_tokens} {cols}",
        lambda config: lambda: gated(gate_up, output, "silu", config),
        output,
        lambda: reference.gated(gate_up, "silu"),
        GATED[target],
        num_bytes=gate_up.nbytes + output.nbytes,
    )


def norm_problem(device: str, num_tokens: int, hidden_size: int, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """Add to the residual stream, then norm. Each run adds again, so the check looks at the last norm."""
    residual = torch.empty(num_tokens, hidden_size, device=device).normal_()
    update = torch.empty(num_tokens, hidden_size, device=device, dtype=dtype).normal_()
    weight = torch.empty(hidden_size, device=device, dtype=dtype).uniform_(0.5, 1.5)
    output = torch.empty(num_tokens, hidden_size, device=device, dtype=dtype)
    return Problem(
        f"add_rms_norm tokens={num_tokens} {hidden_size}",
        lambda _: lambda: add_rms_norm(residual, update, weight, output, 1e-5),
        output,
        lambda: reference.rms_norm(residual, weight, 1e-5),
        None,
        num_bytes=2 * residual.nbytes + update.nbytes + output.nbytes,
    )


def rotary_problem(
    device: str,
    target: str,
    num_tokens: int,
    *,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> Problem:
    """Rotate queries and keys, write keys and values of tokens to slots in random order; the check sees all three."""
    num_blocks = -(-num_tokens // BLOCK_SIZE) + 1
    qkv = torch.empty(num_tokens, num_heads + 2 * num_kv_heads, head_dim, device=device, dtype=dtype).normal_()
    cache = torch.zeros(num_blocks, 2, BLOCK_SIZE, num_kv_heads, head_dim, device=device, dtype=dtype)
    positions = torch.arange(num_tokens, device=device, dtype=torch.int32) % 1024
    slots = (torch.randperm((num_blocks - 1) * BLOCK_SIZE)[:num_tokens] + BLOCK_SIZE).int().to(device)
    angles = torch.empty(1024, head_dim // 2, device=device).uniform_(0, 6)
    cos, sin = angles.cos(), angles.sin()
    # One piece of memory for what is written, so that the check compares the whole of it.
    output = torch.zeros(qkv.numel() // qkv.shape[1] * num_heads + cache.numel(), device=device, dtype=dtype)
    queries = output[: num_tokens * num_heads * head_dim].view(num_tokens, num_heads, head_dim)
    written = output[queries.numel() :].view(cache.shape)

    def prepare(config: RowConfig) -> Callable[[], None]:
        return lambda: rotary_write_kv(qkv, queries, written, positions, slots, cos, sin, config=config)

    def expected() -> torch.Tensor:
        rotated = reference.rotary_write_kv(qkv, cache, positions, slots, cos, sin, num_heads=num_heads)
        return torch.cat([rotated.flatten(), cache.float().flatten()])

    return Problem(
        f"rotary_write_kv tokens={num_tokens} D={head_dim} {num_heads}/{num_kv_heads}",
        prepare,
        output,
        expected,
        ROTARY[target],
        num_bytes=2 * qkv.nbytes + 4 * num_tokens * head_dim,
    )
