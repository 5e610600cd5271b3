# mypy: allow-untyped-calls
"""The Triton kernels in plain torch: slow, obvious, and what the kernels' tests compare with.

Everything is computed in float32 (or float64 where the arguments are) and rounded once, at the end,
to the type of the result. Shapes: T tokens in the step, S sequences, R rows of logits, V tokens in
the vocabulary. A KV cache is [num_blocks, 2, 16, num_kv_heads, head_dim], see `paged_attention.py`.
"""

from __future__ import annotations

import itertools
import math

import torch

from octavo.kernels.routing import PLAIN_ROUTING, Routing

_BLOCK_SIZE = 16
_FP8_MAX = 448.0
_INT8_MAX = 127.0


def paged_attention(
    queries: torch.Tensor,
    kv_cache: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> torch.Tensor:
    """Attend causally over a paged cache; return [T, num_heads, head_dim] float32.

    queries          [T, num_heads, head_dim]
    query_start_loc  [S + 1] row s owns queries query_start_loc[s] .. query_start_loc[s + 1]
    seq_lens         [S] tokens of each sequence, its new ones included
    block_tables     [S, max_blocks]
    window > 0: a query at position p sees positions p - window + 1 .. p, else 0 .. p.
    soft_cap > 0: scores become soft_cap * tanh(score / soft_cap).
    sinks            [num_heads] one more score of a head's queries, without a value; or None
    """
    num_kv_heads = kv_cache.shape[3]
    output = torch.zeros(queries.shape, dtype=torch.float32, device=queries.device)
    for seq, length in enumerate(seq_lens.tolist()):
        start, end = int(query_start_loc[seq]), int(query_start_loc[seq + 1])
        blocks = kv_cache[block_tables[seq, : math.ceil(length / _BLOCK_SIZE)].long()].float()
        keys = blocks[:, 0].flatten(0, 1)[:length] * key_scale
        values = blocks[:, 1].flatten(0, 1)[:length] * value_scale
        shared = queries.shape[1] // num_kv_heads
        q = queries[start:end].float().unflatten(1, (num_kv_heads, shared))
        scores = torch.einsum("qhgd,khd->hgqk", q, keys) * scale
        if soft_cap > 0:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        position = torch.arange(length - (end - start), length, device=queries.device)[:, None]
        key = torch.arange(length, device=queries.device)[None, :]
        visible = key <= position
        if window > 0:
            visible &= key > position - window
        scores = scores.masked_fill(~visible, -math.inf)
        if sinks is not None:
            of_heads = sinks.view(num_kv_heads, shared, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, of_heads], dim=-1)
        weights = scores.softmax(dim=-1)[..., :length]
        output[start:end] = torch.einsum("hgqk,khd->qhgd", weights, values).flatten(1, 2)
    return output


def encoder_attention(qkv: torch.Tensor, query_start_loc: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Attend among all tokens of each sequence; return [T, num_heads, head_dim] float32.

    qkv              [T, 3, num_heads, head_dim]: queries, keys, values
    query_start_loc  [S + 1] sequence s owns tokens query_start_loc[s] .. query_start_loc[s + 1]
    """
    output = torch.zeros(qkv[:, 0].shape, dtype=torch.float32, device=qkv.device)
    for start, end in itertools.pairwise(query_start_loc.tolist()):
        queries, keys, values = qkv[start:end].float().permute(1, 2, 0, 3)
        weights = (queries @ keys.transpose(1, 2) * scale).softmax(dim=-1)
        output[start:end] = (weights @ values).transpose(0, 1)
    return output


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Return (x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, float32."""
    x = x.float()
    centred = x - x.mean(dim=-1, keepdim=True)
    normed = centred * torch.rsqrt((centred * centred).mean(dim=-1, keepdim=True) + eps) * weight.float()
    return normed if bias is None else normed + bias.float()


def pool(
    hidden: torch.Tensor,
    slots: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    sums: torch.Tensor,
    mode: str,
) -> torch.Tensor:
    """Return what each sequence has come to, [S, hidden_size] float32, zeros in padding rows; writes `sums` in place.

    mode  "first", "last" or "sum"; the other arguments as in `pooling.pool`
    """
    output = torch.zeros(len(slots), hidden.shape[1], device=hidden.device)
    for row, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        tokens = hidden[int(query_start_loc[row]) : int(query_start_loc[row + 1])].double()
        is_begun = int(seq_lens[row]) > len(tokens)
        if mode == "sum":
            for token in tokens:
                sums[slot] = sums[slot] + token if is_begun else token
                is_begun = True
        elif mode == "last" or not is_begun:
            sums[slot] = tokens[-1 if mode == "last" else 0]
        output[row] = sums[slot].float()
    return output


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension, float32."""
    x = x.float()
    return x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight.float()


def _norm_heads(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm [T, heads, head_dim] head by head, or with a longer weight all heads of a token at once."""
    if weight.numel() == x.shape[-1]:
        return rms_norm(x, weight, eps)
    return rms_norm(x.flatten(1), weight.flatten(), eps).view(x.shape)


def rotary_write_kv(
    qkv: torch.Tensor,
    kv_cache: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    num_heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> torch.Tensor:
    """Norm and rotate queries and keys, write keys and values; return queries [T, num_heads, head_dim] float32.

    qkv           [T, num_heads + 2 * num_kv_heads, head_dim]: queries, keys, values
    kv_cache      written in place
    slot_mapping  [T] block_id * 16 + offset, or -1: nothing is written
    cos, sin      [max_positions, rotary_dim / 2] float32
    """
    num_kv_heads = kv_cache.shape[3]
    queries, keys, values = qkv.float().split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_norm is not None:
        queries = _norm_heads(queries, q_norm, eps)
    if k_norm is not None:
        keys = _norm_heads(keys, k_norm, eps)
    c, s = cos[positions.long()][:, None], sin[positions.long()][:, None]
    queries, keys = _rotate(queries, c, s), _rotate(keys, c, s)
    written = slot_mapping >= 0
    slots = slot_mapping[written].long()
    for side, (rows, scale) in enumerate(((keys, key_scale), (values, value_scale))):
        stored = rows[written] / scale
        if kv_cache.dtype == torch.float8_e4m3fn:
            stored = stored.clamp(-_FP8_MAX, _FP8_MAX)
        kv_cache[:, side][slots // _BLOCK_SIZE, slots % _BLOCK_SIZE] = stored.to(kv_cache.dtype)
    return queries


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    one, two, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], dim=-1)


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """Return activation(gate) * up of `gate_up` [T, 2 * intermediate_size]: gate, then up. float32."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    if activation == "swigluoai":
        gate = gate.clamp(max=7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1)
    assert activation == "gelu_tanh", activation
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `x` [T, in_features] as int8 or float8_e4m3fn, and what to multiply each row with: [T] float32."""
    largest = _INT8_MAX if dtype == torch.int8 else _FP8_MAX
    x = x.float()
    scales = x.abs().amax(dim=1) / largest
    scales = torch.where(scales == 0, 1.0, scales)
    values = (x / scales[:, None]).clamp(-largest, largest)
    return (values.round() if dtype == torch.int8 else values).to(dtype), scales


def quantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    *,
    x_scales: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x @ (weight * weight_scales).T + bias: [T, out_features] float32, rounded once from float64.

    x       [T, in_features]; with `x_scales` [T] of eight bits too
    weight  [out_features, in_features];  weight_scales, bias [out_features]
    """
    output = (x.double() @ weight.double().T) * weight_scales.double()
    if x_scales is not None:
        output *= x_scales.double()[:, None]
    if bias is not None:
        output += bias.double()
    return output.float()


def experts(
    x: torch.Tensor,
    logits: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str,
    *,
    num_chosen: int,
    num_shared: int = 0,
    is_normalized: bool = True,
    routing: Routing = PLAIN_ROUTING,
    bias: torch.Tensor | None = None,
    biases: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the weighted sum of a mixture of experts, [T, hidden_size] float32.

    x        [T, hidden_size]
    logits   [T, num_routed], one column more if shared experts have a gate
    gate_up  [num_experts, 2 * intermediate_size, hidden_size];  down [num_experts, hidden_size, intermediate_size]

    A row takes the routed experts with the highest logits, the lower index on a tie, weighed by their
    softmax (over the chosen ones if `is_normalized`), and the last `num_shared` experts weighed by the
    sigmoid of its last logit; `routing` and `bias` [num_routed] say where this is otherwise. `biases` are those of
    gate_up and down, [num_experts, rows] each.
    """
    num_routed = len(down) - num_shared
    routed = logits[:, :num_routed].double()
    scores = routed.sigmoid() if routing.scores == "sigmoid" else routed.softmax(dim=1)
    choices = routed if bias is None and routing.num_groups == 1 else scores + (0 if bias is None else bias.double())
    if routing.num_groups > 1:
        groups = choices.reshape(len(choices), routing.num_groups, -1)
        best = groups.topk(routing.num_best, dim=2).values.sum(dim=2).topk(routing.num_chosen_groups, dim=1).indices
        is_best = torch.zeros(groups.shape[:2], dtype=torch.bool, device=x.device).scatter_(1, best, True)
        choices = groups.masked_fill(~is_best[..., None], -torch.inf).flatten(1)
    chosen = choices.sort(dim=1, descending=True, stable=True).indices[:, :num_chosen]
    weights = torch.zeros_like(routed).scatter_(1, chosen, scores.gather(1, chosen))
    if is_normalized:
        weights /= weights.sum(dim=1, keepdim=True)
    weights *= routing.scale
    shared = logits[:, num_routed:].double().sigmoid() if routing.has_shared_gate else torch.ones_like(weights[:, :1])
    weights = torch.cat([weights, shared.repeat(1, num_shared)], dim=1)
    output = torch.zeros(x.shape, device=x.device)
    for expert, weight in enumerate(weights.float().T):
        gate_up_bias, down_bias = (0.0, 0.0) if biases is None else (biases[0][expert], biases[1][expert])
        inner = gated(x.float() @ gate_up[expert].float().T + gate_up_bias, activation)
        taken = weight > 0
        output[taken] += weight[taken, None] * (inner[taken] @ down[expert].float().T + down_bias)
    return output


def process_logits(
    logits: torch.Tensor,
    *,
    allowed: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    banned: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
    repetition: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
) -> torch.Tensor:
    """Return one row of `logits` [V] float32 with masks, biases and penalties applied, in that order.

    allowed, banned, seen  [V] bool;  bias  [V] float32;  counts  [V] how often a token was produced
    """
    row = logits.clone()
    if allowed is not None:
        row[~allowed] = -math.inf
    if bias is not None:
        row += bias
    if banned is not None:
        row[banned] = -math.inf
    if counts is None or seen is None:
        return row
    if repetition != 1:
        row = torch.where(seen, torch.where(row > 0, row / repetition, row * repetition), row)
    row = row - counts.float() * frequency
    return row - (counts > 0) * presence


def logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log probability [R] float32 and the rank [R] of a token of each row of `logits` [R, V].

    The rank is the number of logits that are at least as high: 1 is the best.
    """
    chosen = logits.gather(1, token_ids.long()[:, None])
    values = chosen.double()[:, 0] - logits.double().logsumexp(dim=1)
    return values.float(), (logits >= chosen).sum(dim=1).int()
