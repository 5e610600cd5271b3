"""Every kernel on the device against plain torch, and bits that must not depend on the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lab import Lab
from report import Row

from octavo.gpu_worker.ops import Draw
from octavo.gpu_worker.sampling.draw import draw_tokens
from octavo.kernels import reference, sampling
from octavo.kernels.configs import LOGITS
from octavo.kernels.draw import COLUMNS, FLOATS, column_values
from tools.kernels.problems import (
    Problem,
    attention_problem,
    experts_problem,
    gated_problem,
    linear_problem,
    norm_problem,
    rotary_problem,
)

# Hidden and inner size, routed experts and how many of them a token takes; shared experts.
MIXTURES = {
    "Mixtral-8x7B": ((4096, 14336, 8, 2), 0),
    "Qwen3-30B-A3B": ((2048, 768, 128, 8), 0),
    "Qwen1.5-MoE-A2.7B": ((2048, 1408, 60, 4), 4),
}


def check_kernels(lab: Lab) -> Iterator[Row]:
    """Compare each kernel with its reference over shapes that models have."""
    for name, make in _problems(lab):
        yield _checked(name, make)
    yield from _invariance(lab)
    yield from check_sampling(lab)


def _checked(name: str, make: Callable[[], Problem]) -> Row:
    torch.manual_seed(0)
    try:
        problem = make()
        problem.output.zero_()
        problem.prepare(problem.config)()
        wrong = problem.error()
    except Exception as error:  # one kernel that does not launch must not hide the others
        wrong = f"{type(error).__name__}: {error}"
    return Row("kernels", name, passed=not wrong, note=wrong)


def _problems(lab: Lab) -> Iterator[tuple[str, Callable[[], Problem]]]:
    """Yield a name and what makes the problem; sizes are small, the reference is slow."""
    at = (lab.device, lab.target)
    models = {"SmolLM2": (9, 3, 64), "Llama-3-8B": (32, 8, 128), "Gemma": (16, 8, 256)}
    for model, (heads, kv_heads, head_dim) in models.items() if not lab.tiny else [("tiny", (6, 2, 64))]:
        shape = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim, "dtype": lab.dtype}
        decode = lab.pick(([1] * 40, [*range(17, 2017, 50)]), ([1, 1], [17, 280]))
        mixed = lab.pick(([300, 1, 17, 513], [300, 900, 1500, 1025]), ([9, 1], [25, 40]))
        yield f"attention decode {model}", lambda s=shape, d=decode: attention_problem(*at, "decode", *d, **s)
        yield f"attention mixed {model}", lambda s=shape, m=mixed: attention_problem(*at, "mixed", *m, **s)
        if "fp8" in lab.linear_kinds:
            fp8 = {"cache_dtype": torch.float8_e4m3fn}
            yield (
                f"attention fp8 cache {model}",
                lambda s=shape, d=decode, c=fp8: attention_problem(*at, "decode", *d, **s, **c),
            )
        tokens = lab.pick(77, 5)
        yield f"rotary_write_kv {model}", lambda s=shape, t=tokens: rotary_problem(*at, t, **s)
    for hidden in lab.pick((576, 4096, 16384), (96,)):
        yield f"add_rms_norm {hidden}", lambda h=hidden: norm_problem(lab.device, lab.pick(77, 2), h, lab.dtype)
    for cols in lab.pick((1536, 14336), (100,)):
        yield f"gated {cols}", lambda c=cols: gated_problem(*at, lab.pick(77, 2), c, lab.dtype)
    for kind in lab.linear_kinds:
        for tokens, sizes in lab.pick(
            ((1, (4096, 4096)), (50, (576, 960)), (300, (4096, 9000))), ((3, (96, 70)), (17, (96, 70)))
        ):
            name = f"linear {kind} tokens={tokens} {sizes[0]}->{sizes[1]}"
            yield name, lambda k=kind, t=tokens, s=sizes: linear_problem(*at, k, t, *s, dtype=lab.dtype)
    for model, (sizes, shared) in MIXTURES.items() if not lab.tiny else [("tiny", ((96, 48, 5, 2), 2))]:
        for tokens in lab.pick((1, 300), (3,)):
            name = f"experts {model} tokens={tokens}"
            yield name, lambda t=tokens, s=sizes, n=shared: experts_problem(*at, t, *s, num_shared=n, dtype=lab.dtype)


def _invariance(lab: Lab) -> Iterator[Row]:
    """A token alone and in company: the same bits."""
    for kind in lab.linear_kinds:
        torch.manual_seed(1)
        many, few = lab.pick((500, 3), (20, 1))
        sizes = lab.pick((4096, 4096), (96, 70))
        problem = linear_problem(lab.device, lab.target, kind, many, *sizes, dtype=lab.dtype)
        problem.prepare(problem.config)()
        torch.manual_seed(1)
        alone = linear_problem(lab.device, lab.target, kind, many, *sizes, dtype=lab.dtype, only=few)
        alone.prepare(alone.config)()
        yield _same_bits(f"linear {kind}", problem, alone)
    sizes, shared = lab.pick(MIXTURES["Qwen1.5-MoE-A2.7B"], ((96, 48, 5, 2), 2))
    mixtures = []
    for only in (0, lab.pick(3, 1)):
        torch.manual_seed(1)
        tokens = lab.pick(500, 20)
        mixtures.append(
            experts_problem(lab.device, lab.target, tokens, *sizes, num_shared=shared, dtype=lab.dtype, only=only)
        )
        mixtures[-1].prepare(mixtures[-1].config)()
    yield _same_bits("experts", *mixtures)


def _same_bits(name: str, many: Problem, few: Problem) -> Row:
    """Compare the first rows of two results."""
    count = len(few.output)
    equal = torch.equal(many.output[:count], few.output)
    return Row("kernels", f"{name}: the same bits for {count} and {len(many.output)} tokens", passed=equal)


def check_sampling(lab: Lab) -> Iterator[Row]:
    """Draw with every setting on the device and with the worker's own sampler: the same tokens."""
    rows, vocab = lab.pick((64, 49152), (6, 400))
    random = torch.Generator().manual_seed(2)
    logits = torch.randn(rows, vocab, generator=random) * 3
    kinds = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 40, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.3, 0, 1.0, 0.05)]
    draws = [Draw(*kinds[row % len(kinds)], row + 2**33, 0, 100 + row) for row in range(rows)]
    token_ids = sampling_launch(lab, logits.to(lab.device), draws)()
    expected = torch.from_numpy(draw_tokens(logits.clone().numpy(), draws))
    wrong = int((token_ids.cpu() != expected).sum())
    yield Row("kernels", f"sampling: {rows} rows of {vocab}", passed=not wrong, note=f"{wrong} differ" if wrong else "")
    values = torch.empty(rows, device=lab.device)
    ranks = torch.empty(rows, device=lab.device, dtype=torch.int32)
    sampling.logprobs(logits.to(lab.device), token_ids, values, ranks, config=LOGITS[lab.target])
    expected_values, expected_ranks = reference.logprobs(logits, token_ids.cpu())
    right = torch.equal(ranks.cpu(), expected_ranks) and torch.allclose(values.cpu(), expected_values, 1e-5, 1e-5)
    yield Row("kernels", "log probabilities and ranks", passed=right)


def sampling_launch(lab: Lab, logits: torch.Tensor, draws: list[Draw]) -> Callable[[], torch.Tensor]:
    """Return what draws a token for each row, [R] int32, without allocating."""

    def ints(values: list[Any]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64).to(torch.int32).to(lab.device)

    def floats(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=lab.device)

    halves = torch.tensor([[d.seed & 0xFFFFFFFF, d.seed >> 32] for d in draws], dtype=torch.int64)
    settings = sampling.DrawSettings(
        slots=ints(list(range(len(draws)))),
        positions=ints([d.position for d in draws]),
        columns={
            name: (floats if name in FLOATS else ints)([column_values(d)[name] for d in draws]) for name in COLUMNS
        },
        seeds=halves.to(torch.int32).to(lab.device),
    )
    config = LOGITS[lab.target]
    workspace = sampling.make_workspace(len(draws), logits.shape[1], config, lab.device)
    token_ids = torch.empty(len(draws), dtype=torch.int32, device=lab.device)

    def run() -> torch.Tensor:
        sampling.sample(logits, settings, None, workspace, token_ids, config=config, has_edges=True)
        return token_ids

    return run
