"""KV groups whose layers see a window hold what their next tokens see, and no more."""

from __future__ import annotations

import random

import pytest

from octavo.services.scheduler.groups.block_allocator import max_tokens

from .simulation import World, expected_output, random_prompt

GEMMA = (0, 512, 512, 512, 512, 512)  # 18 layers by threes, one group sees all


def test_at_32k_tokens_the_cache_is_within_a_twentieth_of_the_least() -> None:
    world = World(num_blocks=4000, max_model_len=40_000, windows=GEMMA, check=False)
    prompt = random_prompt(random.Random(1), 32_768)
    stream = world.submit(prompt, max_new_tokens=40)
    held = []
    while not stream.ended:
        world.step()
        if stream.tokens[0]:
            load = world.core.load(world.now)
            held.append((load.kv_blocks_total - load.kv_blocks_free, len(prompt) + len(stream.tokens[0])))
    settled = held[len(held) // 2 : -1]  # the last piece of the prompt is given back with the first new block
    assert len(settled) > 10
    for blocks, num_tokens in settled:
        least = num_tokens / 16 + 5 * 512 / 16
        assert blocks <= 1.05 * least, (blocks, least)
    assert stream.tokens[0] == expected_output(prompt, 40)


def test_a_sequence_gets_as_long_as_the_blocks_that_it_holds_allow() -> None:
    assert max_tokens((0,), 100) == 1600
    assert max_tokens((0, 0), 101) == 800
    assert max_tokens((0, 64), 100) == (100 - 6) * 16
    assert max_tokens((0, 64), 8) == 64
    assert max_tokens((64,), 6) == max_tokens((64, 64), 12) == float("inf")
    world = World(num_blocks=40, max_model_len=10_000, windows=(0, 64))
    prompt = random_prompt(random.Random(2), 400)
    stream = world.submit(prompt, max_new_tokens=1000)
    world.run()
    assert len(prompt) + len(stream.tokens[0]) == (39 - 6) * 16
    assert stream.tokens[0] == expected_output(prompt, len(stream.tokens[0]))


def test_a_cached_prefix_is_used_where_the_window_before_its_end_is_there() -> None:
    world = World(num_blocks=100, windows=(0, 40), max_num_batched_tokens=64, max_num_seqs=8)
    prompt = random_prompt(random.Random(3), 200)
    for question in ([1], [2]):
        stream = world.submit([*prompt, *question], max_new_tokens=5)
        world.run()
        assert stream.tokens[0] == expected_output([*prompt, *question], 5)
    assert stream.finished[0].usage.cached_prompt_tokens == 192
    names, pool = _names(world, prompt), world.core._groups["group-0"].pool
    for name in names[:3] + names[7:]:  # of the window, all but those of a middle piece
        if (block := pool.get_cached_block(name + b"\1")) is not None:
            pool.evict_block(block)
    stream = world.submit([*prompt, 3], max_new_tokens=5)
    world.run()
    assert stream.finished[0].usage.cached_prompt_tokens == 7 * 16
    assert stream.tokens[0] == expected_output([*prompt, 3], 5)


def _names(world: World, prompt: list[int]) -> list[bytes]:
    """Return the names of a prompt's blocks."""
    stream = world.submit([*prompt, 9], max_new_tokens=9)
    seq = next(iter(world.core.requests())).sequences[0]
    names = list(seq.block_hashes)
    world.cancel(stream)
    world.run()
    return names


def test_blocks_that_an_open_prompt_will_need_are_given_to_nobody_who_waits() -> None:
    world = World(num_blocks=33, windows=(0, 64), max_num_batched_tokens=16, max_num_seqs=4)
    streams = [world.submit(random_prompt(random.Random(seed), length), 1) for seed, length in [(1, 300), (2, 64)]]
    world.run()
    assert [stream.finished[0].timing.preemptions for stream in streams] == [0, 0]


@pytest.mark.parametrize("windows", [(0, 24, 24), (40,), (0, 0, 7)])
@pytest.mark.parametrize("max_row_tokens", [1, 4])
def test_tokens_are_right_where_prompts_and_candidates_compete_for_few_blocks(
    windows: tuple[int, ...], max_row_tokens: int
) -> None:
    for seed in range(12):
        rng = random.Random(seed)
        world = World(
            num_blocks=1 + rng.choice([12, 20]) * len(windows), windows=windows, max_row_tokens=max_row_tokens,
            max_num_batched_tokens=rng.choice([40, 200]), max_num_seqs=8,
        )  # fmt: skip
        shared = random_prompt(rng, 70)
        streams = []
        for number in range(8):
            prompt = shared[: rng.choice([0, 40, 70])] + random_prompt(rng, rng.choice([5, 60, 90]))
            streams.append((prompt, world.submit(prompt, 20, candidate_count=rng.choice([1, 3]))))
            for _ in range(rng.randrange(4)):
                world.step()
            if number == 5:
                world.lose("group-0")
                world.join("group-0")
        world.run()
        for prompt, stream in streams:
            for index in range(stream.submit.candidate_count):
                assert stream.tokens[index] == expected_output(prompt, 20, candidate=index), seed
        load = world.core.load(world.now)
        assert load.kv_blocks_free == load.kv_blocks_total
