"""The allocator of a worker group gives its blocks to sequences: cached ones, more as they grow, and back."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping

from octavo.services.scheduler.config import BLOCK_SIZE
from octavo.services.scheduler.kv_cache.block_pool import BlockPool
from octavo.services.scheduler.kv_cache.cache_events import CacheEvents
from octavo.services.scheduler.kv_cache.free_blocks import Block
from octavo.services.scheduler.requests.sequence import Sequence


def window_blocks(window: int) -> float:
    """Blocks that a sequence takes at most of a KV group with this window, but for a prompt's piece in work.

    They hold what the next token sees, and the two before it that may be in flight.
    """
    return (window + 2 * BLOCK_SIZE) // BLOCK_SIZE if window else math.inf


def max_tokens(windows: Iterable[int], num_blocks: int) -> float:
    """Return how long a sequence can get that has `num_blocks` for itself, with the KV groups of these windows."""
    limits = sorted(map(window_blocks, windows))
    for count, limit in zip(range(len(limits), 0, -1), limits, strict=True):
        if count * limit > num_blocks:  # before it has so many of each that are left
            return num_blocks // count * BLOCK_SIZE
        num_blocks -= int(limit)
    return math.inf


class BlockAllocator:
    """Gives blocks to sequences and takes them back.

    The prefix cache is a chain of SHA-256 hashes: a full block is named by its tokens and the name
    of the block before it, the first one by the request's salt. So equal names mean equal tokens
    from the start of the sequence, within one salt. In KV groups after the first, the group's number
    is added to the name.

    A group without a window has blocks for all tokens of a sequence when that is opened. One with a window gets
    them as its prompt is computed, and loses those that no query will see again.
    """

    def __init__(
        self, num_blocks: int, feed: CacheEvents, weights: Mapping[str, float], windows: tuple[int, ...] = (0,)
    ) -> None:
        """Manage `num_blocks` blocks, the null block included; `weights` are the tenants', `windows` the groups'."""
        self.pool = BlockPool(num_blocks, feed, weights)
        self.num_groups = len(windows)
        self.has_windows = any(windows)
        self._windows = windows
        self._most_blocks = [window_blocks(window) for window in windows]
        self._suffixes = [bytes([group]) if group else b"" for group in range(self.num_groups)]  # of names
        # Names of blocks that a running sequence will have computed soon, and which one.
        self._computing: dict[bytes, Sequence] = {}

    def get_computed_blocks(self, seq: Sequence) -> list[list[Block]]:
        """Return the cached blocks that `seq` could start with, of each group; null ones are behind its window.

        The last token is never taken from the cache: it must be computed to get logits.
        """
        if seq.request.submit.bypass_prefix_cache:
            return [[] for _ in self._windows]
        self._hash_known_blocks(seq)
        hashes = seq.block_hashes[: (len(seq.token_ids) - 1) // BLOCK_SIZE]
        hits: list[list[Block]] = []
        for group, window in enumerate(self._windows):
            hits.append([])
            for block_hash in () if window else hashes:
                block = self._cached(block_hash, group)
                if block is None:
                    break
                hits[-1].append(block)
            if not window:
                hashes = hashes[: len(hits[-1])]
        return self._window_hits(hits, hashes) if self.has_windows else hits

    def _window_hits(self, hits: list[list[Block]], hashes: list[bytes]) -> list[list[Block]]:
        """Return hits of each group for the longest prefix of which the windowed groups have what the next token sees.

        `hits` are those of the groups without a window, of these names.
        """
        windowed = [group for group, window in enumerate(self._windows) if window]
        index = end = len(hashes)
        while index > min(self._first_seen(end * BLOCK_SIZE, group) for group in windowed):
            index -= 1
            needed = [group for group in windowed if index >= self._first_seen(end * BLOCK_SIZE, group)]
            if any(self._cached(hashes[index], group) is None for group in needed):
                end = index  # which every prefix has to see that is longer, and begins before it
        for group, table in enumerate(hits):
            del table[end:]
            if group in windowed:
                first = self._first_seen(end * BLOCK_SIZE, group)
                table += [self.pool.null_block] * first
                table += [block for name in hashes[first:end] if (block := self._cached(name, group)) is not None]
        return hits

    def _cached(self, block_hash: bytes, group: int) -> Block | None:
        return self.pool.get_cached_block(block_hash + self._suffixes[group])

    def _first_seen(self, position: int, group: int) -> int:
        """Return the first block that a token at `position` sees."""
        window = self._windows[group]
        return max(position - window + 1, 0) // BLOCK_SIZE if window else 0

    def is_being_computed(self, seq: Sequence, num_hits: int) -> bool:
        """Return whether another sequence is going to compute the block that follows `num_hits` cached ones."""
        if seq.request.submit.bypass_prefix_cache or num_hits >= (len(seq.token_ids) - 1) // BLOCK_SIZE:
            return False
        return seq.block_hashes[num_hits] in self._computing

    def fits(self, seq: Sequence, hits: list[list[Block]], reserve: int) -> bool:
        """Return whether there are blocks for all tokens of `seq`, `hits` among them.

        `reserve` blocks are left free for sequences that already run.
        """
        # A hit on the free list leaves it, so it counts like a new block.
        revived = sum(block.ref_count == 0 for table in hits for block in table)
        return self._num_missing(seq, hits, self._freed_of(hits)) + revived + reserve <= self.pool.num_free

    def num_missing(self, seq: Sequence) -> int:
        """Return how many blocks `seq` will hold that it does not have yet, its prompt's piece in work aside."""
        return self._num_missing(seq, seq.block_tables, seq.num_freed)

    def _num_missing(self, seq: Sequence, tables: list[list[Block]], num_freed: list[int]) -> int:
        needed, missing = seq.num_blocks_needed, 0
        for table, freed, most in zip(tables, num_freed, self._most_blocks, strict=True):
            missing += max(int(min(needed - len(table), most - len(table) + freed)), 0)
        return missing

    def _freed_of(self, hits: list[list[Block]]) -> list[int]:
        return [self._first_seen(len(table) * BLOCK_SIZE, group) for group, table in enumerate(hits)]

    def num_blocks(self, blocks: float) -> float:
        """Return how many blocks a sequence holds in all groups that has so many of tokens."""
        return sum(min(blocks, most) for most in self._most_blocks)

    def open(self, seq: Sequence, hits: list[list[Block]]) -> None:
        """Give `seq` blocks for all its tokens, `hits` first: they fit. Groups with a window get them later."""
        num_hits, num_freed = len(hits[0]), self._freed_of(hits)
        for table, freed in zip(hits, num_freed, strict=True):
            for block in table[freed:]:  # of all groups, before any is given out
                self.pool.touch(block)
        for table, window in zip(hits, self._windows, strict=True):
            if not window:
                table += self.pool.get_new_blocks(seq.num_blocks_needed - num_hits)
        seq.hold_blocks(hits, num_hits, num_freed)
        for block_hash in seq.block_hashes[num_hits:]:
            self._computing.setdefault(block_hash, seq)

    def grow(self, seq: Sequence) -> list[Block]:
        """Append one block to `seq` in each group. The caller has made sure that so many are free."""
        self.cache_full_blocks(seq)
        if self.has_windows:
            self.free_behind(seq)
        blocks = self.pool.get_new_blocks(self.num_groups)
        seq.append_block_of_each(blocks)
        return blocks

    def extend(self, seq: Sequence, num_tokens: int) -> list[list[Block]]:
        """Append blocks in those groups that have too few for the first `num_tokens` tokens; return them by group.

        There may be too few.
        """
        added: list[list[Block]] = [[] for _ in self._windows]
        shortest, wanted = min(map(len, seq.block_tables)), -(-num_tokens // BLOCK_SIZE)
        short = [group for group, table in enumerate(seq.block_tables) if len(table) < wanted]
        if not short:
            return added
        num_spare = self.pool.num_free
        for group in short:
            count = min(wanted, shortest + num_spare // len(short)) - len(seq.block_tables[group])
            added[group] = self.pool.get_new_blocks(max(count, 0))
            seq.append_blocks(group, added[group])
        return added

    def free_behind(self, seq: Sequence) -> None:
        """Take back the blocks of `seq` that neither the rows to be planned see, nor those to be planned again."""
        if not self.has_windows:
            return
        position = min(seq.num_computed_tokens, len(seq.token_ids) - 1)
        for group, num_freed in enumerate(seq.num_freed):
            first = self._first_seen(position, group)
            if first > num_freed:
                self.cache_full_blocks(seq)
                self.pool.free_blocks(seq.free_blocks(group, first, self.pool.null_block))

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
        owner = request.submit.tenant
        for index in range(seq.num_hashed_blocks, num_full):
            block_hash = seq.block_hashes[index]
            for table, suffix in zip(seq.block_tables, self._suffixes, strict=True):
                block = table[index]
                if block.id:  # else it is the null block
                    self.pool.cache_full_block(block, block_hash + suffix, owner)
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
            for group in range(self.num_groups):
                block = self._cached(block_hash, group)
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
        tables = [
            table[first:] for seq in running for table, first in zip(seq.block_tables, seq.num_freed, strict=True)
        ]
        held = Counter(block.id for table in tables for block in table)
        self.pool.check_invariants(held)
        for seq in running:
            num_uncomputed = min(num_uncertain, seq.num_output_placeholders)
            for table, first in zip(seq.block_tables, seq.num_freed, strict=True):
                assert len(table) * BLOCK_SIZE >= seq.num_computed_tokens - num_uncomputed, seq
                assert all(block is self.pool.null_block for block in table[:first]), seq
                assert len({block.id for block in table[first:]}) == len(table) - first, f"{seq} holds a block twice"
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
