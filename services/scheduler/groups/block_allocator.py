"""The allocator of a worker group gives its blocks to sequences: cached ones, more as they grow, and back."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

from octavo.services.scheduler.config import BLOCK_SIZE
from octavo.services.scheduler.kv_cache.block_pool import BlockPool
from octavo.services.scheduler.kv_cache.cache_events import CacheEvents
from octavo.services.scheduler.kv_cache.free_blocks import Block
from octavo.services.scheduler.requests.sequence import Sequence


class BlockAllocator:
    """Gives blocks to sequences and takes them back.

    The prefix cache is a chain of SHA-256 hashes: a full block is named by its tokens and the name
    of the block before it, the first one by the request's salt. So equal names mean equal tokens
    from the start of the sequence, within one salt.
    """

    def __init__(self, num_blocks: int, feed: CacheEvents, weights: Mapping[str, float]) -> None:
        """Manage `num_blocks` blocks, the null block included; `weights` are the tenants'."""
        self.pool = BlockPool(num_blocks, feed, weights)
        # Names of blocks that a running sequence will have computed soon, and which one.
        self._computing: dict[bytes, Sequence] = {}

    def get_computed_blocks(self, seq: Sequence) -> list[Block]:
        """Return the cached blocks that `seq` could start with.

        The last token is never taken from the cache: it must be computed to get logits.
        """
        hits: list[Block] = []
        if seq.request.submit.bypass_prefix_cache:
            return hits
        self._hash_known_blocks(seq)
        for block_hash in seq.block_hashes[: (len(seq.token_ids) - 1) // BLOCK_SIZE]:
            block = self.pool.get_cached_block(block_hash)
            if block is None:
                break
            hits.append(block)
        return hits

    def is_being_computed(self, seq: Sequence, num_hits: int) -> bool:
        """Return whether another sequence is going to compute the block that follows `num_hits` cached ones."""
        if seq.request.submit.bypass_prefix_cache or num_hits >= (len(seq.token_ids) - 1) // BLOCK_SIZE:
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
        """Give `seq` blocks for all its tokens, `hits` first: they fit."""
        for block in hits:
            self.pool.touch(block)
        seq.hold_blocks(hits + self.pool.get_new_blocks(seq.num_blocks_needed - len(hits)), len(hits))
        for block_hash in seq.block_hashes[len(hits) :]:
            self._computing.setdefault(block_hash, seq)

    def grow(self, seq: Sequence) -> Block:
        """Append one block to `seq`. The caller has made sure that one is free."""
        self.cache_full_blocks(seq)
        block = self.pool.get_new_blocks(1)[0]
        seq.append_block(block)
        return block

    def cache_full_blocks(self, seq: Sequence) -> None:
        """Put the blocks of `seq` that are full, computed and known into the prefix cache.

        "Computed" means planned: a plan that uses the block is the one that fills it, or executed after that. A step
        writes the keys and values of all its tokens before it reads any, in each layer.
        """
        num_full = min(seq.num_computed_tokens, len(seq.token_ids)) // BLOCK_SIZE
        request = seq.request
        if num_full <= seq.num_hashed_blocks or request.is_invalid or request.submit.bypass_prefix_cache:
            return
        self._hash_known_blocks(seq)
        for index in range(seq.num_hashed_blocks, num_full):
            block_hash = seq.block_hashes[index]
            self.pool.cache_full_block(seq.block_table[index], block_hash, request.submit.tenant)
            if self._computing.get(block_hash) is seq:
                del self._computing[block_hash]
        seq.cache_blocks(num_full)

    def free(self, seq: Sequence) -> None:
        """Take all blocks of `seq` back, tail first, so that a shared head stays cached longest."""
        self.cache_full_blocks(seq)
        for block_hash in seq.block_hashes[seq.num_hashed_blocks :]:
            if self._computing.get(block_hash) is seq:
                del self._computing[block_hash]
        self.pool.free_blocks(reversed(seq.drop_blocks()))

    def invalidate(self, seq: Sequence) -> None:
        """Let nobody else find what `seq` was computed from, or has computed: some of it is not finite."""
        for block_hash in seq.block_hashes:
            block = self.pool.get_cached_block(block_hash)
            if block is not None:
                self.pool.evict_block(block)

    def num_exclusive_tokens(self, seq: Sequence) -> int:
        """Return how many computed tokens of `seq` would be lost with its blocks: no one else holds them."""
        exclusive = sum(block.ref_count == 1 for block in seq.block_table)
        return min(seq.num_computed_tokens, exclusive * BLOCK_SIZE)

    def check_invariants(self, sequences: Iterable[Sequence], num_uncertain: int = 0) -> None:
        """Assert that blocks and sequences agree. `sequences` are all that run on this group.

        num_uncertain  tokens that may not be computed by plans in flight, for want of a block
        """
        running = list(sequences)
        held = Counter(block.id for seq in running for block in seq.block_table)
        self.pool.check_invariants(held)
        for seq in running:
            assert len(seq.block_table) * BLOCK_SIZE >= seq.num_computed_tokens - min(
                num_uncertain, seq.num_output_placeholders
            ), seq
            assert len({block.id for block in seq.block_table}) == len(seq.block_table), f"{seq} holds a block twice"
            assert seq.num_hashed_blocks <= len(seq.block_hashes) <= len(seq.token_ids) // BLOCK_SIZE, seq
        for owner in self._computing.values():
            assert owner in running, f"{owner} computes nothing"

    def _hash_known_blocks(self, seq: Sequence) -> None:
        """Extend block_hashes to every full block whose tokens are known."""
        hashes, tokens = seq.block_hashes, seq.token_ids
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
