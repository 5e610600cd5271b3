"""What becomes of sequences whose worker is lost, and of those that lost their blocks just before."""

from __future__ import annotations

import random

import pytest
from google.rpc import code_pb2

from .simulation import World, expected_output, random_prompt

PROMPT = list(range(10, 45))


@pytest.mark.parametrize("num_losses", [1, 2])
def test_a_request_survives_as_many_losses_as_it_may_have_recoveries(num_losses: int) -> None:
    world = World(max_recoveries=2)
    stream = world.submit(PROMPT, max_new_tokens=20)
    for _ in range(num_losses):
        world.step()
        world.lose("group-0")
        world.join("group-0")
    world.run()

    assert stream.tokens[0] == expected_output(PROMPT, 20)


def test_one_loss_more_gives_it_up() -> None:
    world = World(max_recoveries=2)
    stream = world.submit(PROMPT, max_new_tokens=20)
    for _ in range(3):
        assert stream.failed is None
        world.step()
        world.lose("group-0")
        world.join("group-0")

    assert stream.failed is not None
    assert stream.failed.code == code_pb2.UNAVAILABLE


@pytest.mark.parametrize("seed", range(20))
def test_a_worker_that_dies_while_preempted_sequences_wait_for_its_step_costs_nobody_a_token(seed: int) -> None:
    """They queue again when the tokens of a step in flight are known. Here they never are."""
    rng = random.Random(seed)
    world = World(num_blocks=8, max_model_len=100, max_num_seqs=4)
    prompts = [random_prompt(rng, rng.randrange(5, 30)) for _ in range(4)]
    streams = [world.submit(prompt, max_new_tokens=50) for prompt in prompts]
    num_lost = 0
    for _ in range(1000):
        if world.core._waiting.awaiting_output:
            world.lose("group-0")
            num_lost += 1
            world.join("group-0")
            break
        world.step()
    world.run()

    assert num_lost == 1, "nobody was preempted with a step in flight"
    assert world.core.is_idle
    for prompt, stream in zip(prompts, streams, strict=True):
        assert stream.tokens[0] == expected_output(prompt, 50)


def test_a_preempted_sequence_is_served_before_new_ones() -> None:
    """It has been waited for the longer, and its prompt is in the cache."""
    world = World(num_blocks=8, max_model_len=110, max_num_seqs=2)
    long, short = random_prompt(random.Random(1), 40), random_prompt(random.Random(2), 40)
    streams = [world.submit(prompt, max_new_tokens=60) for prompt in (long, short)]
    while not any(stream.finished for stream in streams):
        world.step()
        if world.core.load(world.now).waiting:
            break
    assert world.core.load(world.now).waiting == 1, "nobody was preempted"
    newer = world.submit([3] * 50, max_new_tokens=1)  # has less to do, and there is no room for both
    while not all(stream.finished for stream in streams):
        assert not newer.tokens[0]
        world.step()
    world.run()

    assert newer.finished


def test_log_probabilities_of_a_prompt_come_once_though_it_is_computed_again_in_other_pieces() -> None:
    prompt = list(range(10, 74))
    world = World(max_num_seqs=1, max_num_batched_tokens=16, max_prefill_tokens=16, max_recoveries=3)
    stream = world.submit(prompt, max_new_tokens=2, prompt_logprobs=2, bypass_prefix_cache=True)
    for size in (10, 7):
        world.step()
        world.step()
        world.lose("group-0")
        world.join("group-0", max_num_batched_tokens=size)
    world.run()

    assert stream.prompt_logprobs == [-float(token) for token in prompt[1:]]
    assert stream.tokens[0] == expected_output(prompt, 2)
