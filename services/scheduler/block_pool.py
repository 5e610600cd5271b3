"""The physical KV blocks of one worker group: who holds them, which are free, what they hold."""

from __future__ import annotations

from collections.abc import Iterable

from octavo.services.scheduler.cache_feed import CacheFeed


class Block:
    """One KV block. Only BlockPool writes its fields.

    ref_count   sequences that hold it; 0 means it is on the free list
    hash        names the 16 tokens in it and all before them, or None while not full or not shared
    prev, next  neighbours on the free list, None when held
    """

    __slots__ = ("hash", "id", "next", "prev", "ref_count")

    def __init__(self, block_id: int) -> None:
        self.id = block_id
        self.ref_count = 0
        self.hash: bytes | None = None
        self.prev: Block | None = None
        self.next: Block | None = None


class BlockPool:
    """All blocks of a worker group.

    The free list is a doubly linked list threaded through the blocks, so that a cached block can
    leave its middle in constant time when a prefix hit revives it. Its front is used first: blocks
    without content, then the least recently used cached ones. A free block keeps its hash, and
    stays findable, until it is given out again.

    Block 0 is the null block: padding points to it, and it is never given out.
    """

    def __init__(self, num_blocks: int, feed: CacheFeed) -> None:
        """Make a pool of `num_blocks`, the null block included. What it caches is reported to `feed`."""
        assert num_blocks >= 2, num_blocks
        self.num_blocks = num_blocks
        self._feed = feed
        self.num_free = 0
        self.num_cached = 0  # blocks with a hash, held or free
        self._blocks = [Block(block_id) for block_id in range(num_blocks)]
        self._by_hash: dict[bytes, Block] = {}
        # One sentinel is both ends of the list, so that linking needs no special cases.
        self._ends = Block(-1)
        self._ends.prev = self._ends.next = self._ends
        for block in self._blocks[1:]:
            self._link(block, self._ends)

    def find(self, block_hash: bytes) -> Block | None:
        """Return the block with this content, held or free, or None."""
        return self._by_hash.get(block_hash)

    def take(self, count: int) -> list[Block]:
        """Give out `count` blocks, each with one reference and no content. The caller checks num_free."""
        assert count <= self.num_free, (count, self.num_free)
        taken = []
        for _ in range(count):
            block = self._ends.next
            assert block is not None
            self._unlink(block)
            if block.hash is not None:  # evicted only now, as late as possible
                self.forget(block)
            block.ref_count = 1
            taken.append(block)
        return taken

    def hold(self, block: Block) -> None:
        """Add a reference to a block that `find` returned."""
        if block.ref_count == 0:
            self._unlink(block)
        block.ref_count += 1

    def release(self, blocks: Iterable[Block]) -> None:
        """Drop one reference of each block, in the order given.

        A block released earlier is given out again earlier, so a sequence releases its tail first.
        """
        for block in blocks:
            assert block.ref_count > 0, f"block {block.id} released twice"
            block.ref_count -= 1
            if block.ref_count == 0:
                # No content: to the front, so that it is used before anything worth keeping.
                self._link(block, self._ends if block.hash is not None else self._ends.next)

    def remember(self, block: Block, block_hash: bytes) -> None:
        """Make a held, full block findable. Of equal blocks only the first is: tables never change."""
        assert block.ref_count > 0, f"block {block.id} is not held"
        assert block.hash is None, f"block {block.id} already has content"
        if block_hash not in self._by_hash:
            block.hash = block_hash
            self._by_hash[block_hash] = block
            self.num_cached += 1
            self._feed.stored(block_hash)

    def forget(self, block: Block) -> None:
        """Make a block unfindable."""
        assert block.hash is not None
        del self._by_hash[block.hash]
        self._feed.removed(block.hash)
        block.hash = None
        self.num_cached -= 1

    def forget_free(self) -> int:
        """Forget the content of every free block; return how many there were."""
        forgotten = [block for block in self._by_hash.values() if block.ref_count == 0]
        for block in forgotten:
            self.forget(block)
        return len(forgotten)

    def close(self) -> None:
        """Report everything as no longer cached: the memory is gone."""
        for block_hash in self._by_hash:
            self._feed.removed(block_hash)

    def check_invariants(self, held: dict[int, int]) -> None:
        """Assert that the books balance. `held` counts, by block id, the sequences that hold it."""
        on_list = 0
        block = self._ends.next
        while block is not self._ends:
            assert block is not None
            assert block.ref_count == 0, f"block {block.id} is on the free list with references"
            assert block.next is not None
            assert block.next.prev is block, f"free list broken at block {block.id}"
            on_list += 1
            assert on_list < self.num_blocks, "the free list is a circle"
            block = block.next
        assert on_list == self.num_free, (on_list, self.num_free)
        assert 0 not in held, "the null block is held"
        for block in self._blocks[1:]:
            assert block.ref_count == held.get(block.id, 0), (block.id, block.ref_count, held.get(block.id, 0))
        assert self.num_free + len(held) == self.num_blocks - 1, (self.num_free, len(held), self.num_blocks)
        assert self.num_cached == len(self._by_hash)
        for block_hash, block in self._by_hash.items():
            assert block.hash == block_hash, f"block {block.id} is filed under another hash"

    def _link(self, block: Block, before: Block | None) -> None:
        """Put a block on the free list, before another one; before the sentinel is the back."""
        assert before is not None
        previous = before.prev
        assert previous is not None
        block.prev, block.next = previous, before
        previous.next = before.prev = block
        self.num_free += 1

    def _unlink(self, block: Block) -> None:
        """Take a block off the free list."""
        previous, following = block.prev, block.next
        assert previous is not None, f"block {block.id} is not free"
        assert following is not None, f"block {block.id} is not free"
        previous.next, following.prev = following, previous
        block.prev = block.next = None
        self.num_free -= 1
