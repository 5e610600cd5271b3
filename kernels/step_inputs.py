# ruff: noqa: N803 - constants of a kernel are upper case
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""What a step reads, made on the device from the little that the host sends.

Block tables, last tokens and sampling settings live on the device, in tables with a row or a column
for each slot. The host sends changes to them as words and their places, and of the step itself what
does not follow from the tables. So the host needs to know no token that was just sampled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels.aot_spec import AotSpec
from octavo.kernels.draw import COLUMNS

BLOCK_SIZE = 16
LAST_TOKEN = -1
"""In the tokens that the host sends: the last token of the row's slot."""

FIELDS = (*COLUMNS, "seed_low", "seed_high")
"""The first rows of the settings table, in order; `row_settings` gathers these."""

_WORDS, _TOKENS, _ROWS = 256, 128, 64


@triton.jit(do_not_specialize=["num_words"])
def _scatter_words(
    target_ptr, seen_ptr, places_ptr, values_ptr, num_words, HAS_SEEN: tl.constexpr, WORDS: tl.constexpr
):
    """Write WORDS words. Grid (ceil(num_words / WORDS),). places [num_words] are distinct."""
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    mask = word < num_words
    place = tl.load(places_ptr + word, mask=mask, other=0).to(tl.int64)
    tl.store(target_ptr + place, tl.load(values_ptr + word, mask=mask, other=0), mask=mask)
    if HAS_SEEN:
        tl.store(seen_ptr + place, tl.full([WORDS], 1, tl.int8), mask=mask)


@triton.jit
def _prepare_rows(
    sent_ptr,
    slots_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    last_tokens_ptr,
    block_tables_ptr,
    token_ids_ptr,
    positions_ptr,
    slot_mapping_ptr,
    row_tables_ptr,
    max_blocks,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Make what one row's tokens need. Grid (S,). Arguments as in `prepare_rows`."""
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row)
    begin = tl.load(query_start_loc_ptr + row)
    end = tl.load(query_start_loc_ptr + row + 1)
    length = tl.load(seq_lens_ptr + row)
    is_row = slot >= 0  # captured graphs pad the batch; a padding row has slot -1
    slot = tl.maximum(slot, 0).to(tl.int64)
    table_ptr = block_tables_ptr + slot * max_blocks
    last = tl.load(last_tokens_ptr + slot)
    real_end = tl.where(is_row, end, begin)
    for start in tl.range(begin, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        mask = token < end
        sent = tl.load(sent_ptr + token, mask=mask, other=0)
        position = length - end + token
        block = tl.load(table_ptr + position // BLOCK_SIZE, mask=token < real_end, other=0)
        tl.store(token_ids_ptr + token, tl.where(sent < 0, last, sent), mask=mask)
        tl.store(positions_ptr + token, tl.where(is_row, position, 0), mask=mask)
        tl.store(
            slot_mapping_ptr + token,
            tl.where(is_row, block * BLOCK_SIZE + position % BLOCK_SIZE, -1),
            mask=mask,
        )
    if is_row:
        target_ptr = row_tables_ptr + row.to(tl.int64) * max_blocks
        for start in tl.range(0, (length + BLOCK_SIZE - 1) // BLOCK_SIZE, TOKENS):
            entry = start + tl.arange(0, TOKENS)
            mask = entry < (length + BLOCK_SIZE - 1) // BLOCK_SIZE
            tl.store(target_ptr + entry, tl.load(table_ptr + entry, mask=mask, other=0), mask=mask)


@triton.jit(do_not_specialize=["num_slots", "num_rows", "max_rows"])
def _row_settings(
    table_ptr,
    slots_ptr,
    rows_ptr,
    seeds_ptr,
    num_slots,
    num_rows,
    max_rows,
    NUM_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gather the settings of ROWS rows. Grid (ceil(num_rows / ROWS),). Arguments as in `row_settings`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < num_rows
    slot = tl.maximum(tl.load(slots_ptr + row, mask=mask, other=0), 0)
    for field in tl.static_range(0, NUM_COLUMNS):
        tl.store(rows_ptr + field * max_rows + row, tl.load(table_ptr + field * num_slots + slot, mask=mask), mask=mask)
    for half in tl.static_range(0, 2):
        seed = tl.load(table_ptr + (NUM_COLUMNS + half) * num_slots + slot, mask=mask)
        tl.store(seeds_ptr + row * 2 + half, seed, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _record_tokens(token_ids_ptr, slots_ptr, last_tokens_ptr, num_rows, ROWS: tl.constexpr):
    """Remember the tokens of ROWS rows. Grid (ceil(num_rows / ROWS),)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slots_ptr + row, mask=row < num_rows, other=-1)
    token = tl.load(token_ids_ptr + row, mask=row < num_rows, other=0)
    tl.store(last_tokens_ptr + slot, tl.maximum(token, 0), mask=slot >= 0)


def scatter_words(
    target: torch.Tensor, places: torch.Tensor, values: torch.Tensor, seen: torch.Tensor | None = None
) -> None:
    """Write values[i] to place places[i] of `target`, and 1 to the same place of `seen`, if it is given.

    target          int32, contiguous, any shape; `places` are flat indexes into it
    places, values  [N] int32; no place twice
    seen            int8, as large as `target`
    """
    _check(target, places, values)
    assert places.shape == values.shape, (places.shape, values.shape)
    assert seen is None or (seen.dtype == torch.int8 and seen.shape == target.shape), "seen must be int8, like target"
    if len(places):
        grid = (-(-len(places) // _WORDS),)
        _scatter_words[grid](
            target,
            target if seen is None else seen,
            places,
            values,
            len(places),
            HAS_SEEN=seen is not None,
            WORDS=_WORDS,
            num_warps=4,
        )


def prepare_rows(
    sent: torch.Tensor,
    slots: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    last_tokens: torch.Tensor,
    block_tables: torch.Tensor,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    row_tables: torch.Tensor,
) -> None:
    """Write the last four arguments from the others. All int32; S rows, T tokens, M slots.

    sent             [T] tokens from the host, or LAST_TOKEN
    slots            [S] slot of each row; -1 is a padding row
    query_start_loc  [S + 1];  seq_lens [S]: as in `paged_attention`
    last_tokens      [M] the token that each slot sampled last
    block_tables     [M, max_blocks]
    token_ids        [T] written;  positions [T] written, 0 in padding rows
    slot_mapping     [T] written: block_id * 16 + offset, -1 in padding rows
    row_tables       [S, max_blocks] written as far as a row's tokens reach
    """
    _check(sent, slots, query_start_loc, seq_lens, last_tokens, block_tables)
    _check(token_ids, positions, slot_mapping, row_tables)
    assert len(query_start_loc) == len(slots) + 1 == len(seq_lens) + 1, "S differs"
    assert sent.shape == token_ids.shape == positions.shape == slot_mapping.shape, "T differs"
    assert row_tables.shape == (len(slots), block_tables.shape[1]), (row_tables.shape, block_tables.shape)
    if len(slots):
        _prepare_rows[(len(slots),)](
            sent,
            slots,
            query_start_loc,
            seq_lens,
            last_tokens,
            block_tables,
            token_ids,
            positions,
            slot_mapping,
            row_tables,
            block_tables.shape[1],
            BLOCK_SIZE=BLOCK_SIZE,
            TOKENS=_TOKENS,
            num_warps=4,
        )


def row_settings(
    table: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, seeds: torch.Tensor, num_rows: int
) -> None:
    """Gather settings by slot. All int32; floats by their bits.

    table  [at least len(FIELDS), M]: FIELDS of each slot
    slots  [R]; -1 gets the settings of slot 0
    rows   [len(COLUMNS), max_rows] written in the first R columns;  seeds [max_rows, 2] written in the first R rows
    """
    _check(table, slots, rows, seeds)
    if num_rows:
        grid = (-(-num_rows // _ROWS),)
        sizes = (table.shape[1], num_rows, rows.shape[1])
        _row_settings[grid](table, slots, rows, seeds, *sizes, NUM_COLUMNS=len(COLUMNS), ROWS=_ROWS, num_warps=1)


def record_tokens(token_ids: torch.Tensor, slots: torch.Tensor, last_tokens: torch.Tensor) -> None:
    """Write the tokens [R] of `slots` [R] to `last_tokens` [M]; one that is not finite (-1) counts as 0. All int32."""
    _check(token_ids, slots, last_tokens)
    if len(slots):
        _record_tokens[(-(-len(slots) // _ROWS),)](token_ids, slots, last_tokens, len(slots), ROWS=_ROWS, num_warps=1)


def _check(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        assert tensor.dtype == torch.int32, tensor.dtype
        assert tensor.is_contiguous(), "every tensor must be contiguous"
        assert tensor.device == tensors[0].device, (tensor.device, tensors[0].device)


def _spec(function: str, pointers: str, scalars: str, num_warps: int, **constexprs: int) -> AotSpec:
    names = {f"{name}_ptr": "*i32:16" for name in pointers.split()}
    if "seen_ptr" in names:
        names["seen_ptr"] = "*i8:16"
    return AotSpec(
        function=function,
        label="",
        signature={**names, **dict.fromkeys(scalars.split(), "i32")},
        constexprs=constexprs,
        num_warps=num_warps,
    )


_PREPARED = "token_ids positions slot_mapping row_tables"
AOT_SPECS = [
    _spec("_scatter_words", "target seen places values", "num_words", 4, HAS_SEEN=True, WORDS=_WORDS),
    _spec(
        "_prepare_rows",
        f"sent slots query_start_loc seq_lens last_tokens block_tables {_PREPARED}",
        "max_blocks",
        4,
        BLOCK_SIZE=BLOCK_SIZE,
        TOKENS=_TOKENS,
    ),
    _spec(
        "_row_settings",
        "table slots rows seeds",
        "num_slots num_rows max_rows",
        1,
        NUM_COLUMNS=len(COLUMNS),
        ROWS=_ROWS,
    ),
    _spec("_record_tokens", "token_ids slots last_tokens", "num_rows", 1, ROWS=_ROWS),
]
