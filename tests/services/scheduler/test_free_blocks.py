"""Which free block is given out next, where several tenants have cached ones."""

from __future__ import annotations

from collections import Counter

from octavo.services.scheduler.free_blocks import Block, FreeBlocks


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
