"""Which blocks a sequence gets: prefix cache, growth and release. One allocator for each worker group."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

from octavo.services.scheduler.block_pool import BlockPool
from octavo.services.scheduler.cache_feed import CacheFeed
from octavo.services.scheduler.config import BLOCK_SIZE
from octavo.services.scheduler.free_blocks import Block
from octavo.services.scheduler.sequence import Sequence


class BlockAllocator:
    """Gives blocks to sequences and takes them back; the only writer of a sequence's block fields.

    The prefix cache is a chain of SHA-256 hashes: a full block is named by its tokens and the name
    of the block before it, the first one by the request's salt. So equal names mean equal tokens
    from the start of the sequence, within one salt.
    """

    def __init__(self, num_blocks: int, feed: CacheFeed, weights: Mapping[str, float]) -> None:
        """Manage `num_blocks` blocks, the null block included; `weights` are the tenants'."""
        self.pool = BlockPool(num_blocks, feed, weights)
        # Names of blocks that a running sequence will have computed soon, and which one.
        self._computing: dict[bytes, Sequence] = {}

    def cached_blocks(self, seq: Sequence) -> list[Block]:
        """Return the cached blocks that `seq` could start with.

        The last token is never taken from the cache: it must be computed to get logits.
        """
        hits: list[Block] = []
        if seq.request.submit.bypass_prefix_cache:
            return hits
        self._hash_known_blocks(seq)
        for block_hash in seq.block_hashes[: (len(seq.tokens) - 1) // BLOCK_SIZE]:
            block = self.pool.find(block_hash)
            if block is None:
                break
            hits.append(block)
        return hits

    def is_being_computed(self, seq: Sequence, num_hits: int) -> bool:
        """Return whether another sequence is going to compute the block that follows `num_hits` cached ones."""
        if seq.request.submit.bypass_prefix_cache or num_hits >= (len(seq.tokens) - 1) // BLOCK_SIZE:
            return False
        return seq.block_hashes[num_hits] in self._computing

    def fits(self, seq: Sequence, hits: list[Block], reserve: int) -> bool:
        """Return whether there are blocks for all tokens of `seq`, `hits` among them.

        `reserve` blocks are left free for sequences that already run.
        """
        # A hit on the free list leaves it, so it counts like a new block.
        revived = sum(block.ref_count == 0 for block in hits)
        return seq.num_blocks_needed - len(hits) + revived + reserve <= self.pool.num_free

    def open(self, seq: Sequence, hits: list[Block]) -> None:
        """Give `seq` blocks for all its tokens, `hits` first: they fit. Sets num_computed to the cached tokens."""
        assert not seq.blocks, seq
        for block in hits:
            self.pool.hold(block)
        seq.blocks = hits + self.pool.take(seq.num_blocks_needed - len(hits))
        seq.num_computed = len(hits) * BLOCK_SIZE
        seq.num_hashed_blocks = len(hits)
        for block_hash in seq.block_hashes[len(hits) :]:
            self._computing.setdefault(block_hash, seq)

    def grow(self, seq: Sequence) -> Block:
        """Append one block to `seq`. The caller has made sure that one is free."""
        self.commit(seq)
        block = self.pool.take(1)[0]
        seq.blocks.append(block)
        return block

    def commit(self, seq: Sequence) -> None:
        """Put the blocks of `seq` that are full, computed and known into the prefix cache.

        "Computed" means planned: a plan that uses the block is the one that fills it, or executed after that. A step
        writes the keys and values of all its tokens before it reads any, in each layer.
        """
        num_full = min(seq.num_computed, len(seq.tokens)) // BLOCK_SIZE
        request = seq.request
        if num_full <= seq.num_hashed_blocks or request.is_spoiled or request.submit.bypass_prefix_cache:
            return
        self._hash_known_blocks(seq)
        for index in range(seq.num_hashed_blocks, num_full):
            block_hash = seq.block_hashes[index]
            self.pool.remember(seq.blocks[index], block_hash, request.submit.tenant)
            if self._computing.get(block_hash) is seq:
                del self._computing[block_hash]
        seq.num_hashed_blocks = num_full

    def free(self, seq: Sequence) -> None:
        """Take all blocks of `seq` back, tail first, so that a shared head stays cached longest."""
        self.commit(seq)
        for block_hash in seq.block_hashes[seq.num_hashed_blocks :]:
            if self._computing.get(block_hash) is seq:
                del self._computing[block_hash]
        self.pool.release(reversed(seq.blocks))
        seq.blocks = []
        seq.num_computed = 0
        seq.num_hashed_blocks = 0

    def spoil(self, seq: Sequence) -> None:
        """Let nobody else find what `seq` was computed from, or has computed: some of it is not finite."""
        for block_hash in seq.block_hashes:
            block = self.pool.find(block_hash)
            if block is not None:
                self.pool.forget(block)

    def num_exclusive_tokens(self, seq: Sequence) -> int:
        """Return how many computed tokens of `seq` would be lost with its blocks: no one else holds them."""
        exclusive = sum(block.ref_count == 1 for block in seq.blocks)
        return min(seq.num_computed, exclusive * BLOCK_SIZE)

    def check_invariants(self, sequences: Iterable[Sequence], num_uncertain: int = 0) -> None:
        """Assert that blocks and sequences agree. `sequences` are all that run on this group.

        num_uncertain  so many tokens may not be computed by plans in flight, for want of a block
        """
        running = list(sequences)
        held = Counter(block.id for seq in running for block in seq.blocks)
        self.pool.check_invariants(held)
        for seq in running:
            assert len(seq.blocks) * BLOCK_SIZE >= seq.num_computed - min(num_uncertain, seq.num_pending), seq
            assert len({block.id for block in seq.blocks}) == len(seq.blocks), f"{seq} holds a block twice"
            assert seq.num_hashed_blocks <= len(seq.block_hashes) <= len(seq.tokens) // BLOCK_SIZE, seq
        for owner in self._computing.values():
            assert owner in running, f"{owner} computes nothing"

    def _hash_known_blocks(self, seq: Sequence) -> None:
        """Extend block_hashes to every full block whose tokens are known."""
        hashes, tokens = seq.block_hashes, seq.tokens
        num_full = len(tokens) // BLOCK_SIZE
        if len(hashes) == num_full:
            return
        if hashes:
            parent = hashes[-1]
        else:
            submit = seq.request.submit
            parent = hashlib.sha256(f"{submit.adapter}\0{submit.cache_salt}".encode()).digest()
        for index in range(len(hashes), num_full):
            content = tokens[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE].tobytes()
            parent = hashlib.sha256(parent + content).digest()
            hashes.append(parent)
