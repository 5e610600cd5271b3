"""The block pool owns the physical KV blocks of one worker group: their references, and what they hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from octavo.services.scheduler.kv_cache.cache_events import CacheEvents
from octavo.services.scheduler.kv_cache.free_blocks import Block, FreeBlocks


class BlockPool:
    """All blocks of a worker group.

    A free block keeps its hash, and stays findable, until it is given out again: which one is next
    is decided in FreeBlocks.

    Block 0 is the null block: padding points to it, and what is behind a window. It is never given out.
    """

    def __init__(self, num_blocks: int, feed: CacheEvents, weights: Mapping[str, float]) -> None:
        """Make a pool of `num_blocks`, the null block included. What it caches is reported to `feed`.

        `weights`: shares of tenants in the cache; others weigh 1
        """
        assert num_blocks >= 1, num_blocks
        self.num_blocks = num_blocks
        self._feed = feed
        self._blocks = [Block(block_id) for block_id in range(num_blocks)]
        self._by_hash: dict[bytes, Block] = {}
        self.null_block = self._blocks[0]
        self.null_block.ref_count = 1
        self._free = FreeBlocks(self._blocks[1:], weights)
        self._is_closed = False

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return self._free.size

    def get_cached_block(self, block_hash: bytes) -> Block | None:
        """Return the block with this content, held or free, or None."""
        return self._by_hash.get(block_hash)

    def get_new_blocks(self, count: int) -> list[Block]:
        """Give out `count` blocks, each with one reference and no content. The caller checks num_free."""
        assert count <= self.num_free, (count, self.num_free)
        taken = []
        for _ in range(count):
            block = self._free.take()
            if block.hash is not None:  # evicted only now, as late as possible
                self._evict(block)
            block.ref_count = 1
            taken.append(block)
        return taken

    def touch(self, block: Block) -> None:
        """Add a reference to a block that `get_cached_block` returned."""
        if block.ref_count == 0:
            self._free.revive(block)
        block.ref_count += 1

    def free_blocks(self, blocks: Iterable[Block]) -> None:
        """Drop one reference of each block, in the order given.

        A block released earlier is given out again earlier, so a sequence releases its tail first.
        """
        for block in blocks:
            assert block.ref_count > 0, f"block {block.id} released twice"
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free.add(block)

    def cache_full_block(self, block: Block, block_hash: bytes, owner: str) -> None:
        """Make a tenant's held, full block findable. Of equal blocks only the first is: tables never change."""
        assert block.ref_count > 0, f"block {block.id} is not held"
        assert block.hash is None, f"block {block.id} already has content"
        if block_hash not in self._by_hash and not self._is_closed:
            block.hash, block.owner = block_hash, owner
            self._by_hash[block_hash] = block
            self._feed.stored(block_hash)

    def evict_block(self, block: Block) -> None:
        """Make a block unfindable."""
        if block.ref_count == 0:
            self._free.remove(block)
        self._evict(block)
        if block.ref_count == 0:
            self._free.add(block)

    def _evict(self, block: Block) -> None:
        assert block.hash is not None
        del self._by_hash[block.hash]
        self._feed.removed(block.hash)
        block.hash = None

    def evict_free_blocks(self) -> int:
        """Forget the content of every free block; return how many there were."""
        forgotten = [block for block in self._by_hash.values() if block.ref_count == 0]
        for block in forgotten:
            self.evict_block(block)
        return len(forgotten)

    def close(self) -> None:
        """Report everything as no longer cached, now and from now on: the memory is gone."""
        self._is_closed = True
        for block_hash in self._by_hash:
            self._feed.removed(block_hash)

    def check_invariants(self, held: dict[int, int]) -> None:
        """Assert that the books balance. `held` counts, by block id, the sequences that hold it."""
        self._free.check_invariants()
        assert 0 not in held, "the null block is held"
        for block in self._blocks[1:]:
            assert block.ref_count == held.get(block.id, 0), (block.id, block.ref_count, held.get(block.id, 0))
        assert self.num_free + len(held) == self.num_blocks - 1, (self.num_free, len(held), self.num_blocks)
        for block_hash, block in self._by_hash.items():
            assert block.hash == block_hash, f"block {block.id} is filed under another hash"
