"""Which free block is given out next, where several tenants have cached ones."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest

from octavo.services.scheduler.kv_cache.free_blocks import SIZE_STEPS, STALE_TURNS, Block, FreeBlocks

from .simulation import World


def cached(block_id: int, owner: str) -> Block:
    block = Block(block_id)
    block.hash, block.owner = str(block_id).encode(), owner
    return block


def take(free: FreeBlocks) -> Block:
    block = free.take()
    free.check_invariants()
    return block


def test_blocks_without_content_come_first_then_the_oldest() -> None:
    free = FreeBlocks([cached(1, "a"), Block(2), cached(3, "a"), Block(4)], {})
    assert [take(free).id for _ in range(4)] == [2, 4, 1, 3]


def test_tenants_give_up_blocks_until_their_caches_are_as_large_as_their_weights() -> None:
    blocks = [cached(n, "heavy" if n % 2 else "light") for n in range(800)]
    free = FreeBlocks(blocks, {"heavy": 3.0})
    taken = Counter(take(free).owner for _ in range(400))
    assert abs(taken["light"] - 300) <= 64  # of 400 each, 100 and 300 stay
    assert abs(taken["heavy"] - 100) <= 64


def test_who_fills_the_cache_again_and_again_evicts_nobody_else() -> None:
    small = [cached(n, "small") for n in range(10)]
    free = FreeBlocks(small + [cached(n, "large") for n in range(10, 100)], {})
    for _ in range(300):
        block = take(free)
        assert block.owner == "large"
        free.add(block)


def test_the_largest_cache_for_its_weight_gives_up_a_block_within_a_sixteenth() -> None:
    rng = random.Random(5)
    weights = {f"tenant {n}": rng.choice([0.5, 1.0, 4.0]) for n in range(50)}
    owners = list(weights)
    free = FreeBlocks([cached(n, owners[min(n // 40, 49)]) for n in range(2000)], weights)
    sizes = Counter(owners[min(n // 40, 49)] for n in range(2000))
    for number in range(2000, 12_000):
        largest = max(sizes[owner] / weights[owner] for owner in owners)
        block = free.take()
        assert (sizes[block.owner] + 1) * (1 + 2 / SIZE_STEPS) / weights[block.owner] >= largest
        sizes[block.owner] -= 1
        owner = owners[int(50 * rng.random() ** 3)]
        sizes[owner] += 1
        free.add(cached(number, owner))
    free.check_invariants()
    assert len(free._by_size) <= 64 + 4 * 50 + 1


def test_who_was_idle_longest_gives_up_its_blocks_first() -> None:
    free = FreeBlocks([cached(n, "large") for n in range(8)] + [cached(8, "idle"), cached(9, "wanted")], {})
    wanted = next(iter(free._cached["wanted"]))
    for number in range(10, 10 + 10 * STALE_TURNS):
        block = free.take()
        assert block.owner == "large"
        free.add(cached(number, "large"))
        free.revive(wanted)
        free.add(wanted)
    owners = []
    for number in range(10):
        owners.append(free.take().owner)
        free.add(cached(1000 + number, "large"))
    assert owners.count("idle") == 1
    assert "wanted" not in owners
    free.check_invariants()


@pytest.mark.parametrize("size", [1, 3])
def test_a_block_costs_the_same_among_ten_thousand_tenants(size: int) -> None:
    def cpu_s(num_tenants: int) -> float:
        free = FreeBlocks([cached(n, f"tenant {n % num_tenants}") for n in range(size * num_tenants)], {})
        started = time.process_time()
        for number in range(2000):
            block = free.take()
            free.add(cached(number, block.owner))
        return time.process_time() - started

    assert min(cpu_s(10_000) for _ in range(2)) < 6 * max(cpu_s(10) for _ in range(2))


def test_a_tenant_whose_block_is_in_use_again_is_not_idle() -> None:
    free = FreeBlocks([cached(n, "large") for n in range(20)] + [cached(20 + n, "wanted") for n in range(2)], {})
    wanted = next(iter(free._cached["wanted"]))
    for number in range(100, 100 + 23 * STALE_TURNS):
        if number == 100 + 20 * STALE_TURNS:
            free.revive(wanted)
        block = free.take()
        assert block.owner == "large"
        free.add(cached(number, "large"))


def test_of_a_prompt_that_is_pushed_out_the_head_stays_longest() -> None:
    """A cache of tails alone would be of no use: a prompt is found from its start."""
    world = World(num_blocks=12)
    prompt = list(range(100, 181))  # five blocks and a token
    for text in (prompt, [7] * 120, prompt):  # the second one needs eight of eleven blocks
        stream = world.submit(text, max_new_tokens=1)
        world.run()

    assert 0 < stream.finished[0].usage.cached_prompt_tokens < 80
