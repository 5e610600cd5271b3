"""The blocks that nobody holds: which of them is given out next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

STALE_TURNS = 16  # a tenant that was idle while the whole pool was given out so many times protects nothing
MAX_EVICTIONS = 64  # from one tenant before the others are compared again


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
    """A doubly linked list threaded through the blocks, so that one can leave its middle in constant time.

    last_used   the pool's count of blocks given out when something came or went
    """

    __slots__ = ("_ends", "last_used", "size")

    def __init__(self) -> None:
        # One sentinel is both ends of the list, so that linking needs no special cases.
        self._ends = Block(-1)
        self._ends.prev = self._ends.next = self._ends
        self.size = 0
        self.last_used = 0

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


class FreeBlocks:
    """Blocks without content, and for each tenant its cached ones, least recently used first.

    Blocks without content are used first. Then the tenant whose cache is the largest for its weight
    gives up its oldest block: so whoever floods the cache pushes out its own prefixes, and a small
    tenant keeps what it has. One that nobody has asked for in a long time is first to go.
    """

    def __init__(self, blocks: list[Block], weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._empty = BlockList()
        self._cached: dict[str, BlockList] = {}  # by tenant; none of them empty
        self._num_taken = 0
        self._victim: tuple[str, float, int] = ("", 0.0, 0)  # who gives up blocks, while larger than, how often yet
        self.size = 0
        for block in blocks:
            self.add(block)

    def add(self, block: Block) -> None:
        """Take a block that nobody holds any more."""
        if block.hash is None:
            self._empty.append(block)
        else:
            cached = self._cached.setdefault(block.owner, BlockList())
            cached.append(block)
            cached.last_used = self._num_taken
        self.size += 1

    def revive(self, block: Block) -> None:
        """Let a block go whose content somebody wants: it has some."""
        self._cached[block.owner].last_used = self._num_taken
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
        block = self._empty.first if self._empty.size else self._evicted()
        self.remove(block)
        return block

    def _evicted(self) -> Block:
        """Return the block whose content is given up."""
        owner, least, count = self._victim
        if owner not in self._cached or count == MAX_EVICTIONS or self._size_of(owner) < least:
            owner, least, count = self._choose_victim()
        self._victim = owner, least, count + 1
        return self._cached[owner].first

    def _choose_victim(self) -> tuple[str, float, int]:
        """Return the tenant with the largest cache, and the size of the second largest."""
        sizes = sorted(((self._size_of(owner), owner) for owner in self._cached), reverse=True)[:2]
        return sizes[0][1], sizes[-1][0] if len(sizes) > 1 else 0.0, 0

    def _size_of(self, owner: str) -> float:
        """Return the size of a tenant's cache as it counts against others."""
        cached = self._cached[owner]
        if self._num_taken - cached.last_used > STALE_TURNS * self.size:
            return float("inf")
        return cached.size / self._weights.get(owner, 1.0)

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
        assert all(cached.size for cached in self._cached.values())
