# ruff: noqa: N803 - constants of a kernel are upper case
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The kernels of sampling. `sampling.py` launches them, and explains how they fit together."""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.aot_spec import AotSpec
from octavo.kernels.configs import LOGITS, TARGETS
from octavo.kernels.draw import COLUMNS, FLOATS
from octavo.kernels.noise import gumbel_noise

LIST = 16
"""Entries of a bias or ban list that are compared with a piece at once."""

EDGES = {"edge_key": "i32", "edge_id": "i32", "lowest": "fp32", "center": "fp32", "radius": "fp32"}
"""What `find_edge` writes of each row and `draw_piece` reads, and its type."""

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def process_logits(
    logits_ptr,
    output_ptr,
    slots_ptr,
    positions_ptr,
    allowed_ptr,
    has_mask_ptr,
    bias_ids_ptr,
    bias_values_ptr,
    num_biases_ptr,
    banned_ids_ptr,
    num_banned_ptr,
    banned_until_ptr,
    counts_ptr,
    seen_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    max_biases,
    max_bans,
    VOCAB: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
):
    """Write the processed logits of one piece of a row. Grid (R, ceil(VOCAB / BLOCK)).

    logits, output  [R, VOCAB] float32; the others as in `LogitRules` and `DrawSettings`.
    A forbidden token ends as -inf whatever else is done to it, so masks and bans may come last.
    """
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_token = token < VOCAB
    slot = tl.maximum(tl.load(slots_ptr + row), 0).to(tl.int64)  # a padding row has slot -1
    raw = tl.load(logits_ptr + row * VOCAB + token, mask=is_token, other=float("-inf"))
    x = raw

    for start in tl.range(0, tl.load(num_biases_ptr + slot), LIST):
        entry = start + tl.arange(0, LIST)
        is_entry = entry < tl.load(num_biases_ptr + slot)
        ids = tl.load(bias_ids_ptr + slot * max_biases + entry, mask=is_entry, other=-1)
        values = tl.load(bias_values_ptr + slot * max_biases + entry, mask=is_entry, other=0.0)
        # Each id is there once: at most one term of the sum is not zero.
        x += tl.sum(tl.where(token[:, None] == ids[None, :], values[None, :], 0.0), axis=1)

    repetition = tl.load(repetition_ptr + slot)
    frequency = tl.load(frequency_ptr + slot)
    presence = tl.load(presence_ptr + slot)
    if (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0):
        count = tl.load(counts_ptr + slot * VOCAB + token, mask=is_token, other=0)
        seen = tl.load(seen_ptr + slot * VOCAB + token, mask=is_token, other=0) != 0
        x = tl.where(seen, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
        x = x - count.to(tl.float32) * frequency
        x = x - tl.where(count > 0, presence, 0.0)

    if tl.load(has_mask_ptr + slot) != 0:
        word = tl.load(allowed_ptr + slot * WORDS + token // 32, mask=is_token, other=0)
        x = tl.where((word >> (token % 32)) & 1 != 0, x, float("-inf"))
    if tl.load(positions_ptr + row) < tl.load(banned_until_ptr + slot):
        for start in tl.range(0, tl.load(num_banned_ptr + slot), LIST):
            entry = start + tl.arange(0, LIST)
            is_entry = entry < tl.load(num_banned_ptr + slot)
            ids = tl.load(banned_ids_ptr + slot * max_bans + entry, mask=is_entry, other=-1)
            hits = tl.sum((token[:, None] == ids[None, :]).to(tl.int32), axis=1)
            x = tl.where(hits > 0, float("-inf"), x)
    # A row that was not finite stays so, even where a mask would hide it.
    x = tl.where((raw != raw) | (raw == float("inf")), raw, x)
    tl.store(output_ptr + row * VOCAB + token, x, mask=is_token)


@triton.jit
def _scaled(logits_ptr, token, temperature, VOCAB: tl.constexpr):
    """Return the logits of a row at `token`, divided by the temperature; -inf beyond the vocabulary."""
    x = tl.load(logits_ptr + token, mask=token < VOCAB, other=float("-inf"))
    return tl.div_rn(x, temperature)


@triton.jit
def _order(x):
    """Return unsigned integers in the order of the floats; 0.0 and -0.0 are the same."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits.to(tl.uint32, bitcast=True) ^ tl.where(bits < 0, 0xFFFFFFFF, 0x80000000).to(tl.uint32)


@triton.jit
def _weigh(x, key, token, best, edge_key, edge_id, IS_MASS: tl.constexpr):
    """Return what each token weighs in the search: its mass, or 1; 0 for what top-k took away."""
    kept = (key > edge_key) | ((key == edge_key) & (token <= edge_id))
    weight = tl.where(kept, 1.0, 0.0)
    if IS_MASS:
        weight = tl.where(kept, tl.exp2((x - best) * _LOG2_E), 0.0)
    return weight


@triton.jit
def _search(
    logits_ptr,
    temperature,
    best,
    edge_key,
    edge_id,
    target,
    IS_MASS: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return key and id of the last token of the shortest list of best tokens that weighs `target`.

    The list is in the order of logits, lower ids first on a tie, without what lies beyond
    (edge_key, edge_id). It holds at least one token.
    """
    found = tl.full((), 0, tl.uint32)
    digits = tl.arange(0, 4).to(tl.uint32)
    shift = tl.full((), 32, tl.uint32)
    for _ in tl.range(0, 16):
        shift -= 2
        candidate = found + (digits << shift)
        weights = tl.zeros([4], tl.float32)
        for start in tl.range(0, VOCAB, BLOCK):
            token = start + tl.arange(0, BLOCK)
            x = _scaled(logits_ptr, token, temperature, VOCAB)
            key = _order(x)
            weight = _weigh(x, key, token, best, edge_key, edge_id, IS_MASS)
            weights += tl.sum(tl.where(key[:, None] >= candidate[None, :], weight[:, None], 0.0), axis=0)
        # Weights fall from digit to digit. The first always reaches the target, up to rounding.
        digit = tl.maximum(tl.sum((weights >= target).to(tl.int32)) - 1, 0)
        found += digit.to(tl.uint32) << shift

    # Of the tokens that tie with the last one, the lowest ids that are still needed.
    above = tl.full((), 0.0, tl.float32)
    one = tl.full((), 0.0, tl.float32)
    for start in tl.range(0, VOCAB, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = _scaled(logits_ptr, token, temperature, VOCAB)
        key = _order(x)
        weight = _weigh(x, key, token, best, edge_key, edge_id, IS_MASS)
        above += tl.sum(tl.where(key > found, weight, 0.0))
        one = tl.maximum(one, tl.max(tl.where(key == found, weight, 0.0)))
    needed = tl.maximum(tl.ceil(tl.div_rn(target - above, tl.maximum(one, 1.2e-38))), 1.0)
    needed = tl.minimum(needed, VOCAB).to(tl.int32)
    ties = tl.full((), 0, tl.int32)
    last = tl.full((), VOCAB, tl.int32)
    for start in tl.range(0, VOCAB, BLOCK):
        token = start + tl.arange(0, BLOCK)
        key = _order(_scaled(logits_ptr, token, temperature, VOCAB))
        is_tie = ((key == found) & (token < VOCAB)).to(tl.int32)
        place = ties + tl.cumsum(is_tie, axis=0)
        last = tl.minimum(last, tl.min(tl.where((is_tie != 0) & (place == needed), token, VOCAB)))
        ties += tl.sum(is_tie)
    # What top-k took away stays away, should rounding ask for more ties than it left.
    last = tl.where(found == edge_key, tl.minimum(last, edge_id), last)
    is_enough = found < edge_key  # what was left weighs less than the target: all of it stays
    return tl.where(is_enough, edge_key, found), tl.where(is_enough, edge_id, last)


@triton.jit
def _standard_deviation(logits_ptr, temperature, best, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Return that of all scaled logits that are not -inf; what is summed are distances from the best one."""
    count = tl.full((), 0.0, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in tl.range(0, VOCAB, BLOCK):
        x = _scaled(logits_ptr, start + tl.arange(0, BLOCK), temperature, VOCAB)
        is_some = x > float("-inf")
        count += tl.sum(tl.where(is_some, 1.0, 0.0))
        total += tl.sum(tl.where(is_some, x - best, 0.0))
    mean = tl.div_rn(total, tl.maximum(count, 1.0))
    squares = tl.full((), 0.0, tl.float32)
    for start in tl.range(0, VOCAB, BLOCK):
        x = _scaled(logits_ptr, start + tl.arange(0, BLOCK), temperature, VOCAB)
        difference = tl.where(x > float("-inf"), x - best - mean, 0.0)
        squares += tl.sum(difference * difference)
    return tl.sqrt_rn(tl.div_rn(squares, tl.maximum(count, 1.0)))


@triton.jit
def _typical(
    logits_ptr,
    temperature,
    best,
    edge_key,
    edge_id,
    lowest,
    typical_p,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the expected scaled logit of what the other rules leave, and how far from it `typical_p` of it lies."""
    total = tl.full((), 0.0, tl.float32)
    depths = tl.full((), 0.0, tl.float32)
    for start in tl.range(0, VOCAB, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = _scaled(logits_ptr, token, temperature, VOCAB)
        weight = tl.where(x >= lowest, _weigh(x, _order(x), token, best, edge_key, edge_id, True), 0.0)
        total += tl.sum(weight)
        depths += tl.sum(tl.where(weight > 0, weight * (x - best), 0.0))
    center = best + tl.div_rn(depths, total)

    # The largest distance within which, itself left out, too little lies. The bits of distances are in their order.
    found = tl.full((), 0, tl.uint32)
    digits = tl.arange(0, 4).to(tl.uint32)
    shift = tl.full((), 32, tl.uint32)
    for _ in tl.range(0, 16):
        shift -= 2
        candidate = found + (digits << shift)
        weights = tl.zeros([4], tl.float32)
        for start in tl.range(0, VOCAB, BLOCK):
            token = start + tl.arange(0, BLOCK)
            x = _scaled(logits_ptr, token, temperature, VOCAB)
            weight = tl.where(x >= lowest, _weigh(x, _order(x), token, best, edge_key, edge_id, True), 0.0)
            distance = tl.abs(x - center).to(tl.uint32, bitcast=True)
            weights += tl.sum(tl.where(distance[:, None] < candidate[None, :], weight[:, None], 0.0), axis=0)
        digit = tl.maximum(tl.sum((weights < typical_p * total).to(tl.int32)) - 1, 0)
        found += digit.to(tl.uint32) << shift
    found = tl.minimum(found, 0x7F800000)  # infinite, should rounding ask for more than there is
    return center, found.to(tl.float32, bitcast=True)


@triton.jit
def find_edge(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    log_min_p_ptr,
    top_n_sigma_ptr,
    typical_p_ptr,
    edge_key_ptr,
    edge_id_ptr,
    lowest_ptr,
    center_ptr,
    radius_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find what top-n-sigma, top-k, top-p, min-p and typical-p leave of one row. Grid (R,).

    logits         [R, VOCAB] float32, processed
    edge_key, edge_id  [R] written: a token stays if its key is above, or equal and its id not above
    lowest         [R] float32 written: a token stays if its scaled logit is not below
    center, radius [R] float32 written: a token stays if its scaled logit is not farther from the center
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * VOCAB
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    log_min_p = tl.load(log_min_p_ptr + row)
    top_n_sigma = tl.load(top_n_sigma_ptr + row)
    typical_p = tl.load(typical_p_ptr + row)
    edge_key = tl.full((), 0, tl.uint32)
    edge_id = tl.full((), VOCAB, tl.int32)
    lowest = tl.full((), float("-inf"), tl.float32)
    center = tl.full((), 0.0, tl.float32)
    radius = tl.full((), float("inf"), tl.float32)
    has_top_k = (top_k > 0) & (top_k < VOCAB)
    has_edges = has_top_k | (top_p < 1.0) | (log_min_p > float("-inf")) | (top_n_sigma > 0.0) | (typical_p < 1.0)
    if (temperature > 0) & has_edges:
        best = tl.full((), float("-inf"), tl.float32)
        for start in tl.range(0, VOCAB, BLOCK):
            token = start + tl.arange(0, BLOCK)
            best = tl.maximum(best, tl.max(_scaled(logits_ptr, token, temperature, VOCAB)))
        if top_n_sigma > 0.0:
            sigma = _standard_deviation(logits_ptr, temperature, best, VOCAB, BLOCK)
            edge_key = _order(best - top_n_sigma * sigma)
        if has_top_k:
            edge_key, edge_id = _search(
                logits_ptr, temperature, best, edge_key, edge_id, top_k.to(tl.float32), False, VOCAB, BLOCK
            )
        if top_p < 1.0:
            mass = tl.full((), 0.0, tl.float32)
            for start in tl.range(0, VOCAB, BLOCK):
                token = start + tl.arange(0, BLOCK)
                x = _scaled(logits_ptr, token, temperature, VOCAB)
                mass += tl.sum(_weigh(x, _order(x), token, best, edge_key, edge_id, True))
            edge_key, edge_id = _search(
                logits_ptr, temperature, best, edge_key, edge_id, top_p * mass, True, VOCAB, BLOCK
            )
        lowest = best + log_min_p
        if typical_p < 1.0:
            center, radius = _typical(logits_ptr, temperature, best, edge_key, edge_id, lowest, typical_p, VOCAB, BLOCK)
    tl.store(edge_key_ptr + row, edge_key.to(tl.int32, bitcast=True))
    tl.store(edge_id_ptr + row, edge_id)
    tl.store(lowest_ptr + row, lowest)
    tl.store(center_ptr + row, center)
    tl.store(radius_ptr + row, radius)


@triton.jit
def draw_piece(
    logits_ptr,
    positions_ptr,
    temperature_ptr,
    seeds_ptr,
    candidate_index_ptr,
    edge_key_ptr,
    edge_id_ptr,
    lowest_ptr,
    center_ptr,
    radius_ptr,
    piece_score_ptr,
    piece_id_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_EDGES: tl.constexpr,
):
    """Find the best token of one piece of a row. Grid (R, ceil(VOCAB / BLOCK)).

    logits       [R, VOCAB] float32, processed
    piece_score  [R, pieces] float32 written;  piece_id [R, pieces] int32 written, NOT_FINITE if the
                 piece has a NaN or +inf
    The edges are read with HAS_EDGES; the others as in `DrawSettings`.
    """
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    token = piece * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * VOCAB + token, mask=token < VOCAB, other=float("-inf"))
    is_bad = tl.max(((x != x) | (x == float("inf"))).to(tl.int32)) != 0
    temperature = tl.load(temperature_ptr + row)
    score = x
    if temperature > 0:
        scaled = tl.div_rn(x, temperature)
        noise = gumbel_noise(
            piece * BLOCK,
            tl.load(positions_ptr + row),
            tl.load(candidate_index_ptr + row),
            tl.load(seeds_ptr + row * 2),
            tl.load(seeds_ptr + row * 2 + 1),
            BLOCK,
        )
        score = scaled + noise
        if HAS_EDGES:
            key = _order(scaled)
            edge_key = tl.load(edge_key_ptr + row).to(tl.uint32, bitcast=True)
            kept = (key > edge_key) | ((key == edge_key) & (token <= tl.load(edge_id_ptr + row)))
            kept = kept & (scaled >= tl.load(lowest_ptr + row))
            kept = kept & (tl.abs(scaled - tl.load(center_ptr + row)) <= tl.load(radius_ptr + row))
            score = tl.where(kept, score, float("-inf"))
    best = tl.max(score)
    best_id = tl.min(tl.where(score == best, token, VOCAB))  # the lowest id on a tie
    pieces = tl.num_programs(1)
    tl.store(piece_score_ptr + row * pieces + piece, best)
    tl.store(piece_id_ptr + row * pieces + piece, tl.where(is_bad, -1, best_id))


@triton.jit
def pick_token(
    piece_score_ptr,
    piece_id_ptr,
    token_ids_ptr,
    slots_ptr,
    counts_ptr,
    seen_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    VOCAB: tl.constexpr,
    PIECES: tl.constexpr,
    PIECES_PADDED: tl.constexpr,
    HAS_RULES: tl.constexpr,
):
    """Find the best piece of one row and write its token, or NOT_FINITE. Grid (R,).

    With HAS_RULES the token is counted, if its slot has a penalty.
    """
    row = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, PIECES_PADDED)
    is_piece = piece < PIECES
    score = tl.load(piece_score_ptr + row * PIECES + piece, mask=is_piece, other=float("-inf"))
    ids = tl.load(piece_id_ptr + row * PIECES + piece, mask=is_piece, other=VOCAB)
    best = tl.max(score)
    token_id = tl.min(tl.where(score == best, ids, VOCAB))
    slot = tl.load(slots_ptr + row).to(tl.int64)
    is_bad = (tl.min(ids) < 0) | (best == float("-inf")) | (slot < 0)
    token_id = tl.where(is_bad, -1, token_id)  # NOT_FINITE
    tl.store(token_ids_ptr + row, token_id)
    if HAS_RULES:
        is_counted = token_id >= 0
        slot = tl.maximum(slot, 0)
        is_counted &= (
            (tl.load(repetition_ptr + slot) != 1.0)
            | (tl.load(frequency_ptr + slot) != 0.0)
            | (tl.load(presence_ptr + slot) != 0.0)
        )
        if is_counted:
            place = slot * VOCAB + token_id
            tl.store(counts_ptr + place, tl.load(counts_ptr + place) + 1)
            tl.store(seen_ptr + place, 1)


@triton.jit
def log_total(logits_ptr, highest, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Return the logarithm of the sum of exp(logit - highest) of one row."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, VOCAB, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + token, mask=token < VOCAB, other=float("-inf"))
        total += tl.exp2((x - highest) * _LOG2_E)
    return tl.log(tl.sum(total))


@triton.jit
def token_logprobs(logits_ptr, token_ids_ptr, logprobs_ptr, ranks_ptr, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Write log probability and rank of one row's token. Grid (R,).

    logits  [R, VOCAB] float32, raw;  token_ids [R];  logprobs [R] float32;  ranks [R] int32
    A row of NOT_FINITE gets NaN and 0.
    """
    row = tl.program_id(0).to(tl.int64)
    token_id = tl.load(token_ids_ptr + row)
    logprob = float("nan")
    rank = 0
    if token_id >= 0:
        logits_ptr += row * VOCAB
        chosen = tl.load(logits_ptr + token_id)
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        count = tl.zeros([BLOCK], tl.int32)
        for start in tl.range(0, VOCAB, BLOCK):
            token = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + token, mask=token < VOCAB, other=float("-inf"))
            best = tl.maximum(best, x)
            count += ((x >= chosen) & (token < VOCAB)).to(tl.int32)
        highest = tl.max(best)
        logprob = chosen - highest - log_total(logits_ptr, highest, VOCAB, BLOCK)
        rank = tl.sum(count)
    tl.store(logprobs_ptr + row, logprob)
    tl.store(ranks_ptr + row, rank)


def _spec(function: str, label: str, target: str, pointers: dict[str, str], **constexprs: int) -> AotSpec:
    """Describe one kernel for a vocabulary of 128256 tokens; `pointers` are by type."""
    config = LOGITS[target]
    names = [(name, kind) for kind, names in pointers.items() for name in names.split()]
    per_row = function == "pick_token"
    return AotSpec(
        function=function,
        label=label,
        signature={f"{name}_ptr": f"*{kind}:16" for name, kind in names}
        | ({"max_biases": "i32", "max_bans": "i32"} if function == "process_logits" else {}),
        constexprs={"VOCAB": 128256, **({} if per_row else {"BLOCK": config.block}), **constexprs},
        num_warps=1 if per_row else config.num_warps,
        enable_fp_fusion=function == "token_logprobs",  # the others are specified to the bit
        targets=(target,),
        require={} if per_row else {"ld128": 1},
    )


def _pieces(target: str) -> dict[str, int]:
    """Return the pieces of a row of 128256 logits."""
    pieces = -(-128256 // LOGITS[target].block)
    return {"PIECES": pieces, "PIECES_PADDED": triton.next_power_of_2(pieces)}


def _specs() -> list[AotSpec]:
    penalties = "repetition frequency presence"
    float_edges, int_edges = (" ".join(name for name, kind in EDGES.items() if kind == k) for k in ("fp32", "i32"))
    float_columns = " ".join(name for name in COLUMNS if name in FLOATS)
    specs = []
    for target in TARGETS:
        draw = {
            "fp32": f"logits temperature piece_score {float_edges}",
            "i32": f"positions seeds candidate_index piece_id {int_edges}",
        }
        process = {
            "fp32": f"logits output bias_values {penalties}",
            "i32": "slots positions allowed has_mask bias_ids num_biases banned_ids num_banned banned_until counts",
            "i8": "seen",
        }
        edge = {"fp32": f"logits {float_columns} {float_edges}", "i32": f"top_k {int_edges}"}
        pick = {"fp32": f"piece_score {penalties}", "i32": "piece_id token_ids slots counts", "i8": "seen"}
        specs += [
            _spec("process_logits", "", target, process, WORDS=4008, LIST=LIST),
            _spec("find_edge", "", target, edge),
            _spec("draw_piece", "", target, draw, HAS_EDGES=False),
            _spec("draw_piece", "edges", target, draw, HAS_EDGES=True),
            _spec("pick_token", "", target, pick, **_pieces(target), HAS_RULES=True),
            _spec("token_logprobs", "", target, {"fp32": "logits logprobs", "i32": "token_ids ranks"}),
        ]
    return specs


AOT_SPECS = _specs()
