# ruff: noqa: E501 - texts of mutations
"""What a step reads, made on the device, against plain loops; and the best tokens of a row."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from mutate import guarded, mutated

from octavo.kernels import alternatives as alternatives_kernel
from octavo.kernels import step_inputs as kernel
from octavo.kernels.configs import RowConfig
from octavo.kernels.draw import COLUMNS
from octavo.kernels.step_inputs import FIELDS

MAX_BLOCKS = 150


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def check_rows(module: ModuleType = kernel) -> None:
    """Three rows and a padding row: a decode, a long prompt, a chunk; slots out of order."""
    slots, lengths, queries = [3, 0, 2, -1], [40, 2200, 33, 2], [1, 300, 5, 2]
    ends = torch.tensor(queries).cumsum(0).tolist()
    random = torch.Generator().manual_seed(1)
    tables = torch.randint(1, 1000, (5, MAX_BLOCKS), generator=random, dtype=torch.int32)
    last = torch.randint(0, 1000, (5,), generator=random, dtype=torch.int32)
    sent = torch.randint(0, 1000, (ends[-1],), generator=random, dtype=torch.int32)
    sent[0] = sent[ends[2] - 1] = kernel.LAST_TOKEN
    outputs = [guarded(torch.full((ends[-1],), -7, dtype=torch.int32)) for _ in range(3)]
    row_tables = guarded(torch.full((4, MAX_BLOCKS), -7, dtype=torch.int32))
    module.prepare_rows(sent, ints(*slots), ints(0, *ends), ints(*lengths), last, guarded(tables), *outputs, row_tables)
    token_ids, positions, slot_mapping = (output.tolist() for output in outputs)
    for row, (slot, length, count, end) in enumerate(zip(slots, lengths, queries, ends, strict=True)):
        for token in range(end - count, end):
            position = length - end + token if slot >= 0 else 0
            place = -1 if slot < 0 else int(tables[slot, position // 16]) * 16 + position % 16
            assert (positions[token], slot_mapping[token]) == (position, place)
            assert token_ids[token] == (last[slot] if sent[token] < 0 else sent[token])
        used = -(-length // 16) if slot >= 0 else 0
        assert row_tables[row, :used].tolist() == tables[slot, :used].tolist()
        assert (row_tables[row, used:] == -7).all()


def check_words(module: ModuleType = kernel, count: int = 300) -> None:
    random = torch.Generator().manual_seed(2)
    places = torch.randperm(1000, generator=random)[:count].int()
    values = torch.randint(-9, 9, (count,), generator=random, dtype=torch.int32)
    target, seen = guarded(torch.zeros(10, 100, dtype=torch.int32)), guarded(torch.zeros(10, 100, dtype=torch.int8))
    expected = torch.zeros(1000, dtype=torch.int32)
    expected[places.long()] = values
    module.scatter_words(target, places, values, seen)
    assert torch.equal(target.flatten(), expected)
    assert seen.flatten().nonzero().flatten().tolist() == sorted(places.tolist())


def check_settings(module: ModuleType = kernel, count: int = 70) -> None:
    table = torch.arange(2 * len(FIELDS) * 100, dtype=torch.int32).view(-1, 100)
    slots = torch.randperm(100, generator=torch.Generator().manual_seed(3))[:count].int()
    slots[4] = -1
    count_of = len(COLUMNS)
    rows, seeds = guarded(torch.zeros(count_of, 80, dtype=torch.int32)), guarded(torch.zeros(80, 2, dtype=torch.int32))
    module.row_settings(table, slots, rows, seeds, count)
    chosen = slots.clamp(min=0).long()
    assert torch.equal(rows[:, :count], table[:count_of, chosen])
    assert torch.equal(seeds[:count], table[count_of : count_of + 2, chosen].t())
    assert not rows[:, count:].any()
    assert not seeds[count:].any()


def check_record(module: ModuleType = kernel) -> None:
    slots = torch.randperm(90, generator=torch.Generator().manual_seed(4))[:70].int()
    token_ids = torch.arange(70, dtype=torch.int32) + 100
    slots[65], token_ids[2] = -1, -1
    last = guarded(torch.full((90,), -7, dtype=torch.int32))
    expected = torch.full((90,), -7, dtype=torch.int32)
    for slot, token in zip(slots.tolist(), token_ids.tolist(), strict=True):
        if slot >= 0:
            expected[slot] = max(token, 0)
    module.record_tokens(token_ids, slots, last)
    assert torch.equal(last, expected)


def check_alternatives(module: ModuleType = alternatives_kernel) -> None:
    random = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 150, generator=random) * 4
    logits[0, [149, 3, 70]] = 50.0  # ties, also across lanes
    logits[1, :] = 1.0
    logits[2, 5:] = -torch.inf
    ids = guarded(torch.full((4, 8), -7, dtype=torch.int32))
    values = guarded(torch.full((4, 8), -7.0))
    module.alternatives(guarded(logits), ids, values, config=RowConfig(64, 4))
    order = logits.sort(dim=1, descending=True, stable=True)
    assert torch.equal(ids.long(), order.indices[:, :8])
    expected = logits.double().log_softmax(dim=1).gather(1, order.indices[:, :8])
    torch.testing.assert_close(values, expected.float(), rtol=1e-5, atol=1e-5)


def test_rows_find_their_tokens_positions_and_places() -> None:
    check_rows()


@pytest.mark.parametrize("count", [0, 1, 256, 300])
def test_words_go_to_their_places(count: int) -> None:
    check_words(count=count)


def test_rows_get_the_settings_of_their_slots() -> None:
    check_settings()


def test_tokens_are_remembered_by_slot_and_padding_is_not() -> None:
    check_record()


def test_the_best_tokens_come_in_order_and_ties_by_id() -> None:
    check_alternatives()


@pytest.mark.gates
@pytest.mark.parametrize(
    ("check", "old", "new"),
    [
        (check_rows, "position = length - end + token", "position = length - end + token + 1"),
        (check_rows, "tl.where(sent < 0, last, sent)", "sent"),
        (check_rows, "tl.where(is_row, position, 0)", "position"),
        (check_rows, "block * BLOCK_SIZE + position % BLOCK_SIZE, -1", "block * BLOCK_SIZE + position % BLOCK_SIZE, 0"),
        (check_rows, "entry < (length + BLOCK_SIZE - 1) // BLOCK_SIZE", "entry < max_blocks"),
        (check_rows, "for start in tl.range(begin, end, TOKENS)", "for start in tl.range(begin, begin + TOKENS, TOKENS)"),
        (check_words, "mask = word < num_words", "mask = word < num_words - 1"),
        (check_words, "tl.full([WORDS], 1, tl.int8)", "tl.full([WORDS], 0, tl.int8)"),
        (check_settings, "tl.static_range(0, 5)", "tl.static_range(0, 4)"),
        (check_settings, "(5 + half) * num_slots", "(6 - half) * num_slots"),
        (check_record, "tl.maximum(token, 0)", "token"),
    ],
)  # fmt: skip
def test_a_wrong_kernel_is_noticed(check: object, old: str, new: str, tmp_path: Path) -> None:
    assert callable(check)
    with pytest.raises(AssertionError):
        check(mutated(kernel, tmp_path, old, new))


@pytest.mark.gates
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(x == last) & (token > last_id)", "(x == last) & (token != last_id)"),
        ("tl.where(best == last, best_id, VOCAB)", "tl.where(best == last, best_id, 0)"),
        ("last - highest - log_sum", "last - log_sum"),
        ("(x > best) | (best_id == VOCAB)", "(x >= best) | (best_id == VOCAB)"),
    ],
)
def test_wrong_alternatives_are_noticed(old: str, new: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_alternatives(mutated(alternatives_kernel, tmp_path, old, new))
