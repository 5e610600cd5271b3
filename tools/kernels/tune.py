"""Time the launch configurations of the kernels on this machine's GPU, and print what belongs in `configs.py`.

    python -m tools.kernels.tune [--only TEXT] [--repeats N] [--json FILE]

For each kernel and shape every candidate is first compared with plain torch; one that is wrong, or does
not compile, is left out. The rest are timed: median of many launches, cold cache. The present
configuration stays unless another one is faster by more than the noise. Nothing is chosen while
serving: a person carries the lines over, and `aot.py` and the tests check them. Without a GPU the
exit status is 2.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from octavo.kernels.configs import LINEAR_KINDS, SHARED_MEMORY, AttentionConfig, LinearConfig, RowConfig
from octavo.kernels.gpu import gpu_target
from tools.kernels.problems import Problem, attention_problem, gated_problem, linear_problem, rotary_problem
from tools.kernels.timing import Timer

_NOISE = 0.03
"""By what share another configuration must be faster to replace the present one."""


@dataclass(frozen=True)
class Timing:
    """One configuration: the median time of a launch, or why there is none."""

    config: Any
    median_us: float = 0.0
    problem: str = ""


@dataclass(frozen=True)
class Choice:
    """What was found for a problem. `timings` begins with the present configuration."""

    name: str
    timings: tuple[Timing, ...]
    best: Timing

    @property
    def gain(self) -> float:
        """How many times faster the best is than the present configuration; 1 where that one has no time."""
        present = self.timings[0]
        return present.median_us / self.best.median_us if present.median_us else 1.0


def candidates(present: Any, target: str) -> Iterator[Any]:
    """Yield the present configuration, then all others worth a try that fit into shared memory."""
    yield present
    for config in _variations(present, target):
        if config != present and _shared_bytes(config) <= SHARED_MEMORY[target]:
            yield config


def _variations(present: Any, target: str) -> Iterator[Any]:
    if isinstance(present, AttentionConfig):
        # The rows of a tile decide which matrix instruction there is; they stay what the step's kind wants.
        rows = (16,) if present.block_m == 16 else (64, 128)
        for block_m, block_n, warps, stages, split in itertools.product(
            rows, (32, 64, 128), (2, 4, 8), (1, 2, 3, 4), (256, 512, 1024)
        ):
            yield AttentionConfig(block_m, block_n, warps, stages, split)
    elif isinstance(present, LinearConfig):
        has_tma = target in ("cuda:90", "cuda:100")
        for out, tokens, inner, warps, stages, tma in itertools.product(
            (64, 128), (16, 32, 64, 128), (64, 128, 256), (4, 8), (2, 3, 4, 5), (True, False) if has_tma else (False,)
        ):
            yield LinearConfig(out, tokens, inner, warps, stages, tma)
    elif isinstance(present, RowConfig):
        for block, warps in itertools.product((128, 256, 512, 1024, 2048, 4096), (1, 2, 4, 8)):
            yield RowConfig(block, warps)
    else:
        raise AssertionError(f"no variations of {present}")


def _shared_bytes(config: Any) -> int:
    """Estimate from below what a block needs: the stages of its tiles. The compiler has the last word."""
    if isinstance(config, LinearConfig):
        return config.num_stages * (config.block_out + config.block_tokens) * config.block_in
    if isinstance(config, AttentionConfig):
        return config.num_stages * config.block_n * 64 * 2 * 2
    return 0


def time_config(problem: Problem, config: Any, timer: Timer) -> Timing:
    """Check and time one configuration; whatever goes wrong is its problem, and not the end."""
    try:
        run = problem.prepare(config)
        problem.output.zero_()
        run()
        if wrong := problem.error():
            return Timing(config, problem=wrong)
        return Timing(config, timer.median_us(run))
    except Exception as error:
        return Timing(config, problem=f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}")


def choose(name: str, timings: Sequence[Timing]) -> Choice:
    """Choose among `timings`, of which the first is the present configuration; raise ValueError if none is right."""
    good = [timing for timing in timings if not timing.problem]
    if not good:
        raise ValueError(f"{name}: no configuration gives the right result: {timings[0].problem}")
    best = min(good, key=lambda timing: timing.median_us)
    present = timings[0]
    if not present.problem and best.median_us > (1 - _NOISE) * present.median_us:
        best = present
    return Choice(name, tuple(timings), best)


def tune(problem: Problem, target: str, timer: Timer, limit: int = 0) -> Choice:
    """Time the candidates of a problem, or only the first `limit` of them."""
    configs = candidates(problem.config, target)
    return choose(
        problem.name, [time_config(problem, config, timer) for config in itertools.islice(configs, limit or None)]
    )


def problems(device: str, target: str) -> Iterator[tuple[str, Callable[[], Problem]]]:
    """Yield the name of each shape that has a configuration of its own, and what makes it."""
    for head_dim in (64, 128, 256):
        heads = {"num_heads": 32, "num_kv_heads": 8, "head_dim": head_dim}
        yield (
            f"attention decode D={head_dim}",
            lambda heads=heads: attention_problem(  # type: ignore[misc]
                device, target, "decode", [1] * 64, [2048] * 64, **heads
            ),
        )
        yield (
            f"attention mixed D={head_dim}",
            lambda heads=heads: attention_problem(  # type: ignore[misc]
                device, target, "mixed", [2048, *[1] * 16], [2048] * 17, **heads
            ),
        )
    for kind in LINEAR_KINDS[target]:
        for tokens, out in itertools.product((16, 64, 4096) if kind == "int8_int8" else (64,), (4096, 28672)):
            yield (
                f"linear {kind} tokens={tokens} out={out}",
                lambda shape=(kind, tokens, 4096, out): linear_problem(  # type: ignore[misc]
                    device, target, *shape
                ),
            )
    yield "gated", lambda: gated_problem(device, target, 256, 14336)
    yield "rotary", lambda: rotary_problem(device, target, 256)


def report(choice: Choice) -> str:
    """Return a line for a person: what to write into `configs.py`, and what it gains."""
    kept = choice.best is choice.timings[0]
    failed = sum(1 for timing in choice.timings if timing.problem)
    verdict = "keep" if kept else f"{choice.gain:.2f} times faster than {choice.timings[0].config}"
    left_out = f"; {failed} of {len(choice.timings)} left out" if failed else ""
    return f"{choice.name}: {choice.best.config}  {choice.best.median_us:.1f} us  ({verdict}{left_out})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m tools.kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="tune only kernels whose name contains this")
    parser.add_argument("--repeats", type=int, default=30, help="launches of which the median is taken")
    parser.add_argument("--json", type=Path, help="also write every timing to this file")
    parsed = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU is here: there is nothing to time", file=sys.stderr)
        return 2
    target, timer = gpu_target(), Timer("cuda", parsed.repeats)
    print(f"{torch.cuda.get_device_name()}, configured as {target}", flush=True)
    choices, failed = [], 0
    for name, make in problems("cuda", target):
        if parsed.only not in name:
            continue
        try:
            choices.append(tune(make(), target, timer))
            print(report(choices[-1]), flush=True)
        except ValueError as error:
            failed += 1
            print(error, flush=True)
    if parsed.json:
        parsed.json.write_text(json.dumps([_as_json(choice) for choice in choices], indent=1))
    return 1 if failed else 0


def _as_json(choice: Choice) -> dict[str, Any]:
    return {
        "name": choice.name,
        "best": asdict(choice.best.config),
        "timings": [asdict(timing) for timing in choice.timings],
    }


if __name__ == "__main__":
    sys.exit(main())
