"""What the machine can do, and how near the kernels come to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from checks import MIXTURES, sampling_launch
from lab import Lab
from report import Row

from octavo.gpu_worker.ops import Draw
from tools.kernels.problems import (
    Problem,
    attention_problem,
    experts_problem,
    gated_problem,
    linear_problem,
    norm_problem,
    rotary_problem,
)


def measure_ceilings(lab: Lab) -> Iterator[Row]:
    """Copy a large tensor; multiply large matrices with torch's own products."""
    timer = lab.timer()
    source = torch.empty(lab.pick(1 << 30, 1 << 16), dtype=torch.int8, device=lab.device)
    target = torch.empty_like(source)
    us = timer.median_us(lambda: target.copy_(source))
    yield Row("ceilings", "copy", 2 * source.nbytes / us / 1e3, "GB/s", note="read + written bytes")
    size = lab.pick(8192, 64)
    for name, product in _products(lab, size):
        try:
            us = timer.median_us(product())
        except Exception as error:  # what torch cannot do on this card is no failure of ours
            yield Row("ceilings", f"{name} product", note=f"torch cannot: {str(error).splitlines()[0]}")
            continue
        yield Row("ceilings", f"{name} product", 2 * size**3 / us / 1e6, "TFLOP/s", note=f"{size}^3")


def _products(lab: Lab, size: int) -> Iterator[tuple[str, Callable[[], Callable[[], object]]]]:
    def matrices(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.empty(2, size, size, device=lab.device).uniform_(-1, 1)
        if dtype == torch.int8:
            both *= 100
        return both[0].to(dtype), both[1].to(dtype).t()  # the second by columns, as these products want it

    def bf16() -> Callable[[], object]:
        a, b = matrices(torch.bfloat16)
        output = torch.empty(size, size, device=lab.device, dtype=torch.bfloat16)
        return lambda: torch.mm(a, b, out=output)

    def int8() -> Callable[[], object]:
        a, b = matrices(torch.int8)
        return lambda: torch._int_mm(a, b)

    def fp8() -> Callable[[], object]:
        a, b = matrices(torch.float8_e4m3fn)
        one = torch.ones((), device=lab.device)
        return lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    yield "bf16", bf16
    yield "int8", int8
    yield "fp8", fp8


def measure_attention(lab: Lab) -> Iterator[Row]:
    """Decode against the copy bandwidth, prompts against arithmetic."""
    shape = (
        {"dtype": lab.dtype}
        if not lab.tiny
        else {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": lab.dtype}
    )
    for total, least in ((32, 0.6), (128, 0.8), (512, 0.8)):
        for batch in lab.pick((8, 32, 128), (2,)):
            length = lab.pick(total * 1024, 64) // batch
            # The cuda device takes the mixed tile for all its steps, so that bits do not depend on the step.
            for step in ("mixed", "decode"):
                problem = attention_problem(lab.device, lab.target, step, [1] * batch, [length] * batch, **shape)
                name = f"decode {total}k keys, batch {batch} x {total * 1024 // batch}, {step} tile"
                yield _bandwidth(lab, "attention", name, problem, least)
    for length in lab.pick((1024, 4096, 16384), (33,)):
        problem = attention_problem(lab.device, lab.target, "mixed", [length], [length], **shape)
        row = _flops(lab, "attention", f"prompt of {length}, D=128", problem, "bf16")
        yield replace(row, at_least=400.0) if length in (4096, 33) else row


def measure_rows(lab: Lab) -> Iterator[Row]:
    """The kernels that only move memory."""
    for tokens in lab.pick((32, 256, 4096), (3,)):
        hidden, inner = lab.pick((4096, 14336), (96, 160))
        yield _bandwidth(
            lab, "rows", f"add_rms_norm {tokens} x {hidden}", norm_problem(lab.device, tokens, hidden, lab.dtype)
        )
        gate = gated_problem(lab.device, lab.target, tokens, inner, lab.dtype)
        yield _bandwidth(lab, "rows", f"gated {tokens} x {inner}", gate)
        heads = lab.pick({}, {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64})
        rotary = rotary_problem(lab.device, lab.target, tokens, dtype=lab.dtype, **heads)
        yield _bandwidth(lab, "rows", f"rotary_write_kv {tokens}", rotary)
    for batch in lab.pick((1, 32, 256), (2,)):
        for vocab in lab.pick((49152, 128256), (300,)):
            logits = torch.empty(batch, vocab, device=lab.device).normal_()
            for name, settings in (("greedy", (0.0, 0, 1.0, 0.0)), ("top-p", (0.8, 50, 0.95, 0.0))):
                run = sampling_launch(lab, logits, [Draw(*settings, row, 0, 7) for row in range(batch)])
                us = lab.timer().median_us(run)
                yield Row(
                    "rows",
                    f"sample {name} {batch} x {vocab}",
                    us,
                    "us",
                    note=f"{logits.nbytes / us / 1e3:.0f} GB/s read once",
                )


def measure_linears(lab: Lab) -> Iterator[Row]:
    """Quantised layers beside torch's product of 16-bit weights; few tokens by bandwidth, many by arithmetic."""
    sizes = lab.pick(((4096, 4096), (4096, 28672), (14336, 4096)), ((96, 70),))
    for inputs, outputs in sizes:
        for tokens in lab.pick((1, 32, 256, 4096), (2, 70)):
            weight = torch.empty(outputs, inputs, device=lab.device, dtype=lab.dtype).normal_()
            x = torch.empty(tokens, inputs, device=lab.device, dtype=lab.dtype).normal_()
            plain = lab.timer().median_us(lambda x=x, weight=weight: torch.mm(x, weight.t()))
            flops = 2 * tokens * inputs * outputs
            shape = f"{tokens} x {inputs}->{outputs}"
            yield Row("linear", f"torch 16 bits {shape}", plain, "us", note=f"{flops / plain / 1e6:.1f} TFLOP/s")
            for kind in lab.linear_kinds:
                problem = linear_problem(lab.device, lab.target, kind, tokens, inputs, outputs, dtype=lab.dtype)
                us = lab.timer().median_us(problem.prepare(problem.config))
                rates = f"{problem.num_bytes / us / 1e3:.0f} GB/s, {flops / us / 1e6:.1f} TFLOP/s"
                yield Row("linear", f"{kind} {shape}", us, "us", note=f"{plain / us:.2f} times torch's, {rates}")


def measure_experts(lab: Lab) -> Iterator[Row]:
    """Mixtures of experts: few tokens by the bandwidth of the experts that they chose, many by arithmetic."""
    for model, (sizes, shared) in MIXTURES.items() if not lab.tiny else [("tiny", ((96, 48, 5, 2), 2))]:
        for tokens in lab.pick((1, 32, 256, 4096), (3,)):
            problem = experts_problem(lab.device, lab.target, tokens, *sizes, num_shared=shared, dtype=lab.dtype)
            name = f"{model}, {tokens} tokens"
            measure = _bandwidth(lab, "experts", name, problem) if tokens < 1024 else None
            yield measure or _flops(lab, "experts", name, problem, "bf16")


def _bandwidth(lab: Lab, section: str, name: str, problem: Problem, least: float | None = None) -> Row:
    us = lab.timer().median_us(problem.prepare(problem.config))
    rate = problem.num_bytes / us / 1e3
    share = rate / lab.ceilings["copy"]
    note = f"{us:.1f} us, {rate:.0f} GB/s"
    return Row(section, name, 100 * share, "% of copy", at_least=least and 100 * least, note=note)


def _flops(lab: Lab, section: str, name: str, problem: Problem, kind: str) -> Row:
    us = lab.timer().median_us(problem.prepare(problem.config))
    rate = problem.flops / us / 1e6
    note = f"{us:.1f} us, {100 * rate / lab.ceilings[kind]:.0f} % of a {kind} product"
    return Row(section, name, rate, "TFLOP/s", note=note)
