"""What the tuner tries and what it chooses; its timings need a GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from octavo.kernels import configs

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton: pip install triton", allow_module_level=True)

from tools.kernels import tune
from tools.kernels.tune import Choice, Timing

PRESENT = configs.RowConfig(256, 1)
OTHER = configs.RowConfig(512, 2)


@pytest.mark.parametrize("target", configs.TARGETS)
def test_candidates_begin_with_the_present_configuration_and_have_none_twice(target: str) -> None:
    for present in (
        configs.attention_config(target, "decode", 128),
        configs.attention_config(target, "mixed", 128),
        configs.linear_config(target, "int8", 4096, 1),
        configs.GATED[target],
    ):
        found = list(tune.candidates(present, target))
        assert found[0] == present
        assert len(set(found)) == len(found) > 10


@pytest.mark.parametrize("target", configs.TARGETS)
def test_candidates_are_within_what_the_planner_and_the_target_allow(target: str) -> None:
    for step in ("decode", "mixed"):
        for config in tune.candidates(configs.attention_config(target, step, 128), target):
            assert config.split_keys % config.block_n == 0
            assert (config.block_m == 16) == (step == "decode")
    for config in tune.candidates(configs.linear_config(target, "int8", 4096, 1), target):
        assert (
            config.num_stages * (config.block_out + config.block_tokens) * config.block_in
            <= (configs.SHARED_MEMORY[target])
        )
        assert not config.tma or target in ("cuda:90", "cuda:100")


def chosen(*timings: Timing) -> Choice:
    return tune.choose("kernel", timings)


def test_the_fastest_that_is_right_is_chosen() -> None:
    choice = chosen(Timing(PRESENT, 10.0), Timing(OTHER, 2.0, "1 of 2 values differ"), Timing(OTHER, 5.0))
    assert choice.best == Timing(OTHER, 5.0)
    assert choice.gain == 2


def test_the_present_configuration_stays_within_the_noise() -> None:
    assert chosen(Timing(PRESENT, 10.0), Timing(OTHER, 9.8)).best.config == PRESENT
    assert chosen(Timing(PRESENT, 10.0), Timing(OTHER, 9.6)).best.config == OTHER


def test_a_present_configuration_that_is_wrong_is_replaced_even_by_a_slower_one() -> None:
    choice = chosen(Timing(PRESENT, problem="does not compile"), Timing(OTHER, 50.0))
    assert choice.best.config == OTHER
    assert "1 of 2 left out" in tune.report(choice)


def test_it_is_an_error_if_no_configuration_is_right() -> None:
    with pytest.raises(ValueError, match="no configuration gives the right result: out of memory"):
        chosen(Timing(PRESENT, problem="out of memory"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert "no GPU is here" in capsys.readouterr().err


def test_every_shape_that_is_tuned_has_a_name_of_its_own() -> None:
    for target in configs.TARGETS:
        names = [name for name, _ in tune.problems("cuda", target)]
        assert len(set(names)) == len(names)
