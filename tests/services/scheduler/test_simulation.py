"""Deterministic simulation: random work, cancels, deadlines and worker losses, invariants after every event.

A failing seed is reproduced by `pytest -k "seed[N]"`; the world depends on nothing but the seed.
"""

from __future__ import annotations

import random

import pytest

from octavo.common.v1 import common_pb2

from .simulation import World, expected_output, random_prompt

NUM_SEEDS = 300


def make_world(rng: random.Random) -> World:
    """Draw the configuration as well, so that rare combinations of limits are met."""
    max_num_seqs = rng.choice([1, 2, 5, 16])
    num_blocks = rng.choice([6, 9, 20, 60])
    return World(
        num_blocks=num_blocks,
        max_model_len=rng.choice([40, 90, 1000]),
        groups=rng.choice([1, 1, 2, 3]),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(max_num_seqs, rng.choice([1, 8, 33, 100])),
        max_prefill_tokens=rng.choice([1, 16, 50]),
        max_waiting=rng.choice([3, 30]),
        max_recoveries=1000,
        ageing_tokens_per_s=rng.choice([0.0, 100.0, 1e6]),
        max_row_tokens=rng.choice([1, 1, 4, 16]),
    )


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_every_request_gets_its_tokens_whatever_happens(seed: int) -> None:
    rng = random.Random(seed)
    world = make_world(rng)
    prefixes = [random_prompt(rng, rng.choice([16, 40])) for _ in range(3)]
    groups = list(world.workers)
    live: list[object] = []
    for _ in range(rng.choice([30, 120])):
        action = rng.random()
        if action < 0.25:
            prompt = rng.choice([[], *prefixes]) + random_prompt(rng, rng.randrange(1, 30))
            stream = world.submit(
                prompt,
                max_new_tokens=rng.choice([1, 2, 17, 40]),
                gateway=rng.choice("ab"),
                tenant=rng.choice(["", "x", "y"]),
                priority=rng.choice([0, 0, 1, -1]),
                candidate_count=rng.choice([1, 1, 1, 3]),
                sampling={"seed": rng.randrange(1000)},
                end_of_sequence_ids=[expected_output(prompt, 9)[-1]],
                remaining_ms=rng.choice([0, 0, 0, 200]),
                bypass_prefix_cache=rng.random() < 0.1,
                logprobs=rng.choice([0, 0, 2]),
                chosen_logprob=rng.random() < 0.2,
                prompt_logprobs=rng.choice([0, 0, 0, 2]),
                progress_interval_ms=rng.choice([0, 0, 30]),
            )
            live.append(stream)
        elif action < 0.30:
            keys = [key for key, stream in world.streams.items() if not stream.ended]
            if keys:
                key = rng.choice(keys)
                world.cancel(world.streams[key], gateway=key[0])
        elif action < 0.33:
            group = rng.choice(groups)
            if group in world.workers:
                world.lose(group)
            else:
                world.join(group)
        else:
            world.step(rng.choice(groups))
    for group in groups:  # faults stop: now everything must end
        if group not in world.workers:
            world.join(group)
    world.run()
    for _ in range(32):  # of what is too long for them, a larger worker might have come
        world.now += 1.0
        world.settle()

    assert world.core.is_idle, [stream for stream in world.streams.values() if not stream.ended]
    load = world.core.load(world.now)
    assert load.kv_blocks_free == load.kv_blocks_total
    for stream in world.streams.values():
        assert stream.ended
        for candidate, tokens in stream.tokens.items():
            submit = stream.submit
            expected = expected_output(
                list(submit.prompt_token_ids),
                submit.stop.max_new_tokens,
                submit.sampling.seed,
                candidate,
                eos=submit.end_of_sequence_ids[0],
            )
            finished = stream.finished.get(candidate)
            if finished is None or finished.reason == common_pb2.FINISH_REASON_CONTEXT_LIMIT:
                assert tokens == expected[: len(tokens)]
            else:
                assert tokens == expected
                assert finished.usage.output_tokens == len(tokens)
