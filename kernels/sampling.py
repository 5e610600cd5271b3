"""From logits to tokens on the GPU: masks, biases, penalties, temperature, rules of the draw, draw.

Five small kernels, of which a step launches those that its rows need:

    process_logits  masks, biases, bans and penalties; one program for each piece of each row
    find_edge       what the rules of `draw.kept_token_ids` leave of a row, as its edges; one program a row
    draw_piece      the best token of a piece: Gumbel-max, or greedy; one program for each piece of each row
    pick_token      the best piece of a row, and the penalty counts of the token; one program a row
    token_logprobs  log probability and rank of the token among the raw logits; one program a row

Noise is a function of (seed, candidate index, position, token id). It, the division by the
temperature and the penalties are specified to the bit, float32 rounded after every operation: so
division is the IEEE one, and these kernels are compiled without fused multiply-add; `aot.py` looks
for what would break that. The same logits give the same token as `gpu_worker/sampling/draw.py`, with one
exception: top-p, typical-p and top-n-sigma sum float32 values in a fixed order of their own, so a token
that lies within rounding of the edge may fall to either side.

Top-k and top-p need no sort. Floats are mapped to unsigned integers of the same order, and the edge is
found two bits at a time: each of 16 passes weighs what is at least as good as each of four candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from octavo.kernels.configs import RowConfig, power_of_two
from octavo.kernels.draw import COLUMNS, FLOATS
from octavo.kernels.sampling_kernels import (
    EDGES,
    LIST,
    draw_piece,
    find_edge,
    pick_token,
    process_logits,
    token_logprobs,
)

NOT_FINITE = -1
"""The token of a row with a NaN, with +inf, or with nothing that may be drawn."""


@dataclass(frozen=True)
class LogitRules:
    """What is done to the logits of each slot before the draw, on the device; M slots, V tokens.

    allowed       [M, ceil(V / 32)] int32, bit t % 32 of word t / 32: token t may be drawn
    has_mask      [M] int32, 0: `allowed` of the slot is not read
    bias_ids      [M, max_biases] int32, each id once;  bias_values  [M, max_biases] float32
    num_biases    [M] int32
    banned_ids    [M, max_bans] int32;  num_banned  [M] int32
    banned_until  [M] int32: they are banned at positions below
    counts        [M, V] int32, how often each token was produced; counted on in place
    seen          [M, V] int8, whether a token is in the prompt or the output; set in place
    repetition, frequency, presence  [M] float32; 1, 0 and 0 are neutral, and then the slot's counts
                  and `seen` are neither read nor written
    """

    allowed: torch.Tensor
    has_mask: torch.Tensor
    bias_ids: torch.Tensor
    bias_values: torch.Tensor
    num_biases: torch.Tensor
    banned_ids: torch.Tensor
    num_banned: torch.Tensor
    banned_until: torch.Tensor
    counts: torch.Tensor
    seen: torch.Tensor
    repetition: torch.Tensor
    frequency: torch.Tensor
    presence: torch.Tensor


@dataclass(frozen=True)
class DrawSettings:
    """How the token of each row is drawn, on the device; R rows.

    slots            [R] int32, index into `LogitRules`, no slot twice; -1 is a padding row, whose token
                     is NOT_FINITE and counted nowhere
    positions        [R] int32, absolute position of the token to be drawn
    columns          by name, each of `draw.COLUMNS`: [R] float32 or int32
    seeds            [R, 2] int32: low and high half of the 64 bits
    """

    slots: torch.Tensor
    positions: torch.Tensor
    columns: Mapping[str, torch.Tensor]
    seeds: torch.Tensor


@dataclass(frozen=True)
class Workspace:
    """Memory of `sample` for up to R rows; contents mean nothing between calls.

    processed    [R, V] float32
    edges        [len(EDGES), R] int32; floats by their bits
    piece_score  [R, pieces] float32;  piece_id  [R, pieces] int32
    """

    processed: torch.Tensor
    edges: torch.Tensor
    piece_score: torch.Tensor
    piece_id: torch.Tensor


def make_workspace(max_rows: int, vocab_size: int, config: RowConfig, device: torch.device | str) -> Workspace:
    """Allocate the memory of `sample` for up to `max_rows` rows."""

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    pieces = _pieces(vocab_size, config)
    return Workspace(
        processed=floats(max_rows, vocab_size),
        edges=ints(len(EDGES), max_rows),
        piece_score=floats(max_rows, pieces),
        piece_id=ints(max_rows, pieces),
    )


def sample(
    logits: torch.Tensor,
    settings: DrawSettings,
    rules: LogitRules | None,
    workspace: Workspace,
    token_ids: torch.Tensor,
    *,
    config: RowConfig,
    has_edges: bool,
) -> None:
    """Draw a token for each row of `logits` [R, V] float32, which stay as they are; write `token_ids` [R] int32.

    rules      None if no row has any: then no logits are copied and no token is counted
    config     `configs.LOGITS` of the target
    has_edges  whether a row may have one: see `Draw.has_edges`
    Nothing waits for the GPU or allocates. A row that is not finite gets NOT_FINITE.
    """
    num_rows, vocab_size = logits.shape
    _check(logits, torch.float32, (num_rows, vocab_size))
    _check(token_ids, torch.int32, (num_rows,))
    _check_settings(settings, num_rows)
    assert vocab_size < 2**24, "counts are summed in float32"
    assert workspace.processed.shape[0] >= num_rows, f"{num_rows} rows, room for {workspace.processed.shape[0]}"
    assert workspace.processed.shape[1] == vocab_size, (workspace.processed.shape, vocab_size)
    assert workspace.piece_id.shape[1] == _pieces(vocab_size, config), "the workspace was made for another config"
    if num_rows == 0:
        return
    if rules is not None:
        _apply_rules(logits, settings, rules, workspace.processed, config)
        logits = workspace.processed
    edges = {
        f"{name}_ptr": row.view(torch.float32) if kind == "fp32" else row
        for (name, kind), row in zip(EDGES.items(), workspace.edges, strict=True)
    }
    if has_edges:
        find_edges(logits, settings.columns, edges, config)
    draw_piece[(num_rows, _pieces(vocab_size, config))](
        logits,
        settings.positions,
        settings.columns["temperature"],
        settings.seeds,
        settings.columns["candidate_index"],
        piece_score_ptr=workspace.piece_score,
        piece_id_ptr=workspace.piece_id,
        **edges,
        HAS_EDGES=has_edges,
        **_launch(vocab_size, config),
    )
    _pick(settings, rules, workspace, token_ids, vocab_size)


def find_edges(
    logits: torch.Tensor, columns: Mapping[str, torch.Tensor], edges: Mapping[str, torch.Tensor], config: RowConfig
) -> None:
    """Write `edges`, arguments of `find_edge` by name, of logits [R, V]; `columns` as in `DrawSettings`."""
    arguments = {f"{name}_ptr": columns[name] for name in COLUMNS if f"{name}_ptr" in find_edge.arg_names}
    find_edge[(len(logits),)](logits, **arguments, **edges, **_launch(logits.shape[1], config))


def logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, values: torch.Tensor, ranks: torch.Tensor, *, config: RowConfig
) -> None:
    """Write the log probability and the rank of each row's token among its raw logits.

    logits     [R, V] float32
    token_ids  [R] int32; NOT_FINITE gets NaN and rank 0
    values     [R] float32, within a few float32 roundings of the sum over the vocabulary
    ranks      [R] int32: how many logits are at least as high, 1 is the best
    """
    num_rows, vocab_size = logits.shape
    _check(logits, torch.float32, (num_rows, vocab_size))
    _check(token_ids, torch.int32, (num_rows,))
    _check(values, torch.float32, (num_rows,))
    _check(ranks, torch.int32, (num_rows,))
    if num_rows:
        launch = {**_launch(vocab_size, config), "enable_fp_fusion": True}  # no bits are promised
        token_logprobs[(num_rows,)](logits, token_ids, values, ranks, **launch)


def _apply_rules(
    logits: torch.Tensor, settings: DrawSettings, rules: LogitRules, processed: torch.Tensor, config: RowConfig
) -> None:
    num_rows, vocab_size = logits.shape
    _check_rules(rules, vocab_size)
    process_logits[(num_rows, _pieces(vocab_size, config))](
        logits,
        processed,
        settings.slots,
        settings.positions,
        rules.allowed,
        rules.has_mask,
        rules.bias_ids,
        rules.bias_values,
        rules.num_biases,
        rules.banned_ids,
        rules.num_banned,
        rules.banned_until,
        rules.counts,
        rules.seen,
        rules.repetition,
        rules.frequency,
        rules.presence,
        rules.bias_ids.shape[1],
        rules.banned_ids.shape[1],
        WORDS=rules.allowed.shape[1],
        LIST=LIST,
        **_launch(vocab_size, config),
    )


def _pick(
    settings: DrawSettings, rules: LogitRules | None, workspace: Workspace, token_ids: torch.Tensor, vocab_size: int
) -> None:
    pieces = workspace.piece_id.shape[1]
    if rules is None:  # these are not read
        state = (token_ids, token_ids, *[workspace.piece_score] * 3)
    else:
        state = (rules.counts, rules.seen, rules.repetition, rules.frequency, rules.presence)
    pick_token[(len(token_ids),)](
        workspace.piece_score,
        workspace.piece_id,
        token_ids,
        settings.slots,
        *state,
        VOCAB=vocab_size,
        PIECES=pieces,
        PIECES_PADDED=power_of_two(pieces),
        HAS_RULES=rules is not None,
        num_warps=1,
        num_stages=2,
        enable_fp_fusion=False,
    )


def _launch(vocab_size: int, config: RowConfig) -> dict[str, Any]:
    sizes = {"VOCAB": vocab_size, "BLOCK": config.block}
    return {**sizes, "num_warps": config.num_warps, "num_stages": 2, "enable_fp_fusion": False}


def _pieces(vocab_size: int, config: RowConfig) -> int:
    return -(-vocab_size // config.block)


def _check(tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert tensor.dtype == dtype, (tensor.dtype, dtype)
    assert tensor.shape == shape, (tensor.shape, shape)
    assert tensor.is_contiguous(), "every tensor must be contiguous"


def _check_settings(settings: DrawSettings, num_rows: int) -> None:
    for ints in (settings.slots, settings.positions):
        _check(ints, torch.int32, (num_rows,))
    for name in COLUMNS:
        _check(settings.columns[name], torch.float32 if name in FLOATS else torch.int32, (num_rows,))
    _check(settings.seeds, torch.int32, (num_rows, 2))


def _check_rules(rules: LogitRules, vocab_size: int) -> None:
    slots = len(rules.counts)
    _check(rules.allowed, torch.int32, (slots, -(-vocab_size // 32)))
    _check(rules.bias_ids, torch.int32, (slots, rules.bias_ids.shape[1]))
    _check(rules.bias_values, torch.float32, tuple(rules.bias_ids.shape))
    _check(rules.banned_ids, torch.int32, (slots, rules.banned_ids.shape[1]))
    for ints in (rules.has_mask, rules.num_biases, rules.num_banned, rules.banned_until):
        _check(ints, torch.int32, (slots,))
    for floats in (rules.repetition, rules.frequency, rules.presence):
        _check(floats, torch.float32, (slots,))
    _check(rules.counts, torch.int32, (slots, vocab_size))
    _check(rules.seen, torch.int8, (slots, vocab_size))
