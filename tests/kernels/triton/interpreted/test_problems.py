"""The inputs that kernels are tuned and measured with give the right results, and the tuner notices wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from octavo.kernels.configs import RowConfig
from tools.kernels import tune
from tools.kernels.problems import (
    Problem,
    attention_problem,
    gated_problem,
    linear_problem,
    norm_problem,
    rotary_problem,
)
from tools.kernels.timing import Timer

TARGET, F16 = "cuda:90", torch.float16
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": F16}
PROBLEMS: dict[str, Callable[[], Problem]] = {
    "decode": lambda: attention_problem("cpu", TARGET, "decode", [1, 1], [40, 300], **HEADS),
    "mixed": lambda: attention_problem("cpu", TARGET, "mixed", [30, 1], [30, 70], **HEADS),
    "int8": lambda: linear_problem("cpu", TARGET, "int8", 3, 128, 64, dtype=F16),
    "fp8": lambda: linear_problem("cpu", TARGET, "fp8", 3, 128, 64, dtype=F16),
    "int8_int8": lambda: linear_problem("cpu", TARGET, "int8_int8", 20, 256, 64, dtype=F16),
    "fp8_fp8": lambda: linear_problem("cpu", TARGET, "fp8_fp8", 3, 128, 64, dtype=F16),
    "gated": lambda: gated_problem("cpu", TARGET, 2, 100, F16),
    "norm": lambda: norm_problem("cpu", 2, 100, F16),
    "rotary": lambda: rotary_problem("cpu", TARGET, 5, **HEADS),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_present_configuration_solves_the_problem(name: str) -> None:
    torch.manual_seed(0)
    problem = PROBLEMS[name]()
    problem.output.zero_()
    assert problem.error()
    problem.prepare(problem.config)()
    assert problem.error() == ""
    assert problem.num_bytes > 0


def test_tuning_times_what_is_right_and_leaves_out_what_is_not() -> None:
    problem = PROBLEMS["gated"]()

    def prepare(config: RowConfig) -> Callable[[], None]:
        if config.block == 512:
            raise RuntimeError("out of resources")
        if config.block == 256:
            return lambda: None  # writes nothing
        return problem.prepare(config)

    choice = tune.tune(replace(problem, prepare=prepare), TARGET, Timer("cpu", repeats=1), limit=12)
    by_block = {timing.config.block: timing for timing in choice.timings}
    assert "differ" in by_block[256].problem
    assert "out of resources" in by_block[512].problem
    assert choice.best.median_us > 0
    assert choice.best.config.block in (128, 1024)
