"""Free blocks are those that nobody holds. The next one to give out is chosen among them."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator, Mapping

STALE_TURNS = 16  # of the whole pool: a tenant that was idle for this long protects nothing
SIZE_STEPS = 16


class Block:
    """One KV block. Only BlockPool and FreeBlocks write its fields.

    ref_count   sequences that hold it; 0 means it is free
    hash        names the 16 tokens in it and all before them, or None while not full or not shared
    owner       the tenant that had its content computed, if it has a hash
    prev, next  neighbours on a free list, None when held
    """

    __slots__ = ("hash", "id", "next", "owner", "prev", "ref_count")

    def __init__(self, block_id: int) -> None:
        self.id = block_id
        self.ref_count = 0
        self.hash: bytes | None = None
        self.owner = ""
        self.prev: Block | None = None
        self.next: Block | None = None


class BlockList:
    """A doubly linked list threaded through the blocks, so that one can leave its middle in constant time."""

    __slots__ = ("_ends", "size")

    def __init__(self) -> None:
        # One sentinel is both ends of the list, so that linking needs no special cases.
        self._ends = Block(-1)
        self._ends.prev = self._ends.next = self._ends
        self.size = 0

    def __iter__(self) -> Iterator[Block]:
        block = self._ends.next
        while block is not self._ends:
            assert block is not None
            assert block.next is not None
            assert block.next.prev is block, f"free list broken at block {block.id}"
            yield block
            block = block.next

    @property
    def first(self) -> Block:
        """The block that came first; there must be one."""
        block = self._ends.next
        assert block is not None
        assert block is not self._ends, "the list is empty"
        return block

    def append(self, block: Block) -> None:
        """Put a block at the end."""
        last = self._ends.prev
        assert last is not None
        block.prev, block.next = last, self._ends
        last.next = self._ends.prev = block
        self.size += 1

    def remove(self, block: Block) -> None:
        """Take a block out."""
        previous, following = block.prev, block.next
        assert previous is not None, f"block {block.id} is not free"
        assert following is not None, f"block {block.id} is not free"
        previous.next, following.prev = following, previous
        block.prev = block.next = None
        self.size -= 1


class CachedBlocks(BlockList):
    """The free blocks that a tenant has cached, least recently used first.

    last_used   the pool's count of blocks given out when something came or went
    filed       the size that it counts for among the others: at least its own, and little more when it is looked at
    """

    __slots__ = ("filed", "last_used", "owner", "weight")

    def __init__(self, owner: str, weight: float) -> None:
        super().__init__()
        self.owner = owner
        self.weight = weight
        self.last_used = 0
        self.filed = 0


class FreeBlocks:
    """Blocks without content, and for each tenant its cached ones, least recently used first.

    Blocks without content are used first. Then the tenant whose cache is the largest for its weight
    gives up its oldest block: so whoever floods the cache pushes out its own prefixes, and a small
    tenant keeps what it has. One that nobody has asked for in a long time is first to go. Sizes are
    compared to one part in SIZE_STEPS, so that not each block that comes or goes changes an order.
    """

    def __init__(self, blocks: list[Block], weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._empty = BlockList()
        self._cached: OrderedDict[str, CachedBlocks] = OrderedDict()  # by tenant, idle longest first; none empty
        # Heap, the largest for its weight first. Of a tenant's entries the one with its filed size counts.
        self._by_size: list[tuple[float, str, int]] = []
        self._num_taken = 0
        self.size = 0
        for block in blocks:
            self.add(block)

    def add(self, block: Block) -> None:
        """Take a block that nobody holds any more."""
        if block.hash is None:
            self._empty.append(block)
        else:
            cached = self._cached.get(block.owner)
            if cached is None:
                cached = self._cached[block.owner] = CachedBlocks(block.owner, self._weights.get(block.owner, 1.0))
            cached.append(block)
            self._touch(cached)
            if cached.size > cached.filed:
                self._file(cached, cached.size + cached.size // SIZE_STEPS)
        self.size += 1

    def revive(self, block: Block) -> None:
        """Let a block go whose content somebody wants: it has some."""
        self._touch(self._cached[block.owner])
        self.remove(block)

    def remove(self, block: Block) -> None:
        """Let a block go."""
        if block.hash is None:
            self._empty.remove(block)
        else:
            cached = self._cached[block.owner]
            cached.remove(block)
            if not cached.size:
                del self._cached[block.owner]
        self.size -= 1

    def take(self) -> Block:
        """Remove and return the block to give out next; there must be one."""
        self._num_taken += 1
        block = self._empty.first if self._empty.size else self._victim().first
        self.remove(block)
        return block

    def _victim(self) -> CachedBlocks:
        """Return whose oldest block is given up."""
        idle = next(iter(self._cached.values()))
        if self._num_taken - idle.last_used > STALE_TURNS * self.size:
            return idle
        while True:
            _, owner, filed = self._by_size[0]
            cached = self._cached.get(owner)
            if cached is None or cached.filed != filed:
                heapq.heappop(self._by_size)
            elif filed - cached.size > filed // SIZE_STEPS:  # it has become smaller since
                self._file(cached, cached.size)
            else:
                return cached

    def _touch(self, cached: CachedBlocks) -> None:
        """Note that somebody uses what a tenant has cached."""
        if cached.last_used != self._num_taken:
            cached.last_used = self._num_taken
            self._cached.move_to_end(cached.owner)

    def _file(self, cached: CachedBlocks, size: int) -> None:
        """Let a tenant's cache count for `size` blocks among the others."""
        cached.filed = size
        heapq.heappush(self._by_size, (-size / cached.weight, cached.owner, size))
        if len(self._by_size) > 64 + 4 * len(self._cached):  # mostly of sizes that were
            self._by_size = [(-each.filed / each.weight, each.owner, each.filed) for each in self._cached.values()]
            heapq.heapify(self._by_size)

    def check_invariants(self) -> None:
        """Assert that each list has what belongs there, and as much as it says."""
        total = 0
        for owner, cached in (("", self._empty), *self._cached.items()):
            blocks = list(cached)
            assert len(blocks) == cached.size, (owner, cached.size)
            total += len(blocks)
            for block in blocks:
                assert block.ref_count == 0, f"block {block.id} is free with references"
                assert (block.hash is None) == (cached is self._empty), f"block {block.id} is on the wrong list"
                assert cached is self._empty or block.owner == owner, f"block {block.id} is another tenant's"
        assert total == self.size, (total, self.size)
        entries = {(owner, size) for _, owner, size in self._by_size}
        for each in self._cached.values():
            assert 0 < each.size <= each.filed, (each.owner, each.size, each.filed)
            assert (each.owner, each.filed) in entries, f"{each.owner} is not filed under its size"
        last_used = [each.last_used for each in self._cached.values()]
        assert last_used == sorted(last_used), "tenants are not in the order in which they were idle"
