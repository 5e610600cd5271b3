"""The work list of paged attention: needs neither a GPU nor Triton."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.kernels.attention_plan import AttentionPlan, cut_plan, pad_plan, plan_attention

Ints = npt.NDArray[np.int64]


def make_plan(queries: list[int], lengths: list[int], **changes: Any) -> AttentionPlan:
    sizes = {"tile_queries": 4, "key_tile": 8, "split_keys": 16, **changes}
    return plan_attention(np.concatenate([[0], np.cumsum(queries)]), np.array(lengths), **sizes)


def seen_keys(position: int, window: int) -> range:
    return range(max(0, position - window + 1) if window else 0, position + 1)


batches = st.lists(
    st.integers(0, 12).flatmap(lambda queries: st.tuples(st.just(queries), st.integers(queries, queries + 70))),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(batches, st.integers(1, 6), st.sampled_from([0, 1, 7, 16, 33]), st.sampled_from([8, 16, 64]))
def test_each_key_that_a_query_sees_is_covered_exactly_once(
    batch: list[tuple[int, int]], tile_queries: int, window: int, split_keys: int
) -> None:
    queries, lengths = [q for q, _ in batch], [length for _, length in batch]
    plan = make_plan(queries, lengths, tile_queries=tile_queries, split_keys=split_keys, window=window)
    starts = np.concatenate([[0], np.cumsum(queries)])
    covered = [np.zeros(max(lengths) + 1, dtype=int) for _ in range(sum(queries))]
    for seq, first, begin, end, _ in plan.work.tolist():
        assert begin < end
        assert begin % 8 == 0, "pieces start at a multiple of the kernel's key tile"
        assert begin // split_keys == (end - 1) // split_keys, "pieces do not cross a multiple of split_keys"
        for query in range(first, min(first + tile_queries, int(starts[seq + 1]))):
            covered[query][begin:end] += 1
    for seq, length in enumerate(lengths):
        for query in range(int(starts[seq]), int(starts[seq + 1])):
            position = length - int(starts[seq + 1]) + query
            for key in seen_keys(position, window):
                assert covered[query][key] == 1, (seq, query, key)
            assert covered[query].max() == 1
            assert not covered[query][length:].any(), "nothing beyond the end of a sequence is read"


@settings(max_examples=100, deadline=None)
@given(batches, st.sampled_from([0, 20]))
def test_each_partial_slot_is_written_once_and_joined_once_in_order(batch: list[tuple[int, int]], window: int) -> None:
    plan = make_plan([q for q, _ in batch], [length for _, length in batch], window=window)
    by_slot = {slot: (seq, first, begin) for seq, first, begin, _, slot in plan.work.tolist() if slot >= 0}
    assert sorted(by_slot) == list(range(plan.num_slots))
    joined: list[int] = []
    for seq, first, first_slot, count in plan.combines.tolist():
        assert count >= 2, "a tile that was not split needs no joining"
        pieces = [by_slot[slot] for slot in range(first_slot, first_slot + count)]
        assert all(piece[:2] == (seq, first) for piece in pieces)
        assert [piece[2] for piece in pieces] == sorted(piece[2] for piece in pieces)
        joined += range(first_slot, first_slot + count)
    assert joined == list(range(plan.num_slots))


@settings(max_examples=100, deadline=None)
@given(batches, st.sampled_from([0, 20]))
def test_the_pieces_of_a_sequence_do_not_depend_on_its_neighbours(batch: list[tuple[int, int]], window: int) -> None:
    together = make_plan([q for q, _ in batch], [length for _, length in batch], window=window)
    start = 0
    for seq, (queries, length) in enumerate(batch):
        alone = make_plan([queries], [length], window=window)
        rows = together.work[together.work[:, 0] == seq]
        pieces = sorted((first - start, begin, end) for _, first, begin, end, _ in rows.tolist())
        assert pieces == sorted((first, begin, end) for _, first, begin, end, _ in alone.work.tolist())
        start += queries


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("start", range(0, 60, 7))
def test_a_query_has_the_same_pieces_however_its_prompt_is_chunked(start: int, window: int) -> None:
    """Within what it sees: other rows of its tile may add pieces in which it sees nothing."""

    def cuts(plan: AttentionPlan, query: int, position: int) -> list[tuple[int, int]]:
        keys = seen_keys(position, window)
        pieces = [(b, e) for _, first, b, e, _ in plan.work.tolist() if first <= query < first + 4]
        clipped = sorted((max(b, keys[0]), min(e, keys[-1] + 1)) for b, e in pieces)
        return [(b, e) for b, e in clipped if b < e]

    whole, chunk = make_plan([60], [60], window=window), make_plan([60 - start], [60], window=window)
    for position in range(start, 60):
        assert cuts(whole, position, position) == cuts(chunk, position - start, position)


def test_the_same_step_gives_the_same_plan() -> None:
    one, two = (make_plan([3, 1, 9], [40, 70, 9]) for _ in range(2))
    assert np.array_equal(one.work, two.work)
    assert np.array_equal(one.combines, two.combines)


@pytest.mark.parametrize("seed", range(5))
def test_blocks_that_start_in_the_order_of_the_list_end_together(seed: int) -> None:
    """On 132 multiprocessors, 32 decodes of 100 to 8000 keys, 8 key heads: within 10 % of the best."""
    lengths = np.random.default_rng(seed).integers(100, 8000, size=32).tolist()
    plan = make_plan([1] * 32, lengths, tile_queries=4, key_tile=64, split_keys=256)
    costs = np.repeat(plan.work[:, 3] - plan.work[:, 2], 8)
    busy_until = [0] * 132
    for cost in costs.tolist():
        heapq.heapreplace(busy_until, busy_until[0] + cost)
    assert max(busy_until) <= 1.1 * costs.sum() / 132


def test_padding_rows_belong_to_no_sequence_and_change_nothing_else() -> None:
    plan = make_plan([1, 5], [40, 9])
    padded = pad_plan(plan, len(plan.work) + 3, len(plan.combines) + 2)
    assert np.array_equal(padded.work[:-3], plan.work)
    assert np.array_equal(padded.combines[:-2], plan.combines)
    assert (padded.work[-3:, 0] == -1).all()
    assert (padded.combines[-2:, 0] == -1).all()
    with pytest.raises(AssertionError, match="do not fit"):
        pad_plan(plan, len(plan.work) - 1, len(plan.combines))


def test_an_empty_step_has_no_work() -> None:
    plan = make_plan([0, 0], [0, 12])
    assert len(plan.work) == len(plan.combines) == plan.num_slots == 0


@pytest.mark.parametrize("seed", range(30))
def test_a_plan_is_cut_without_taking_a_tile_apart(seed: int) -> None:
    random = np.random.default_rng(seed)
    queries = random.integers(1, 60, size=4)
    lengths = queries + random.integers(0, 500, size=4)
    starts = np.concatenate([[0], np.cumsum(queries)])
    plan = plan_attention(starts, lengths, tile_queries=8, key_tile=32, split_keys=64)
    max_slots = int(plan.combines[:, 3].max()) + int(random.integers(0, 8))

    parts = cut_plan(plan, max_slots)

    assert len(parts) > 1
    whole = sorted(map(tuple, plan.work[:, :4].tolist()))
    assert sorted(tuple(row[:4]) for part in parts for row in part.work.tolist()) == whole
    for part in parts:
        assert part.num_slots <= max_slots
        used = sorted(part.work[part.work[:, 4] >= 0, 4].tolist())
        assert used == list(range(part.num_slots))
        pieces = {int(row[4]): (row[0], row[1], row[2]) for row in part.work if row[4] >= 0}
        for sequence, first_query, first_slot, count in part.combines.tolist():
            rows = [pieces[slot] for slot in range(first_slot, first_slot + count)]
            assert {(seq, query) for seq, query, _ in rows} == {(sequence, first_query)}
            assert [begin for _, _, begin in rows] == sorted(begin for _, _, begin in rows)
