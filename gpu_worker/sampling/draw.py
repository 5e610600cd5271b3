"""Draws a token from processed logits: Gumbel-max with noise from a counter-based generator.

Nothing about randomness is state: the noise of a token is a function of (seed, candidate index,
position, token id). Each operation on the noise is specified to the bit (float32, rounded after
every operation, never fused), so that every device draws the same token from the same logits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from octavo.gpu_worker.ops import Draw, Float32Array, Int32Array
from octavo.kernels.draw import kept_token_ids

UInt32Array = npt.NDArray[np.uint32]

_F32 = np.float32
# Philox4x32-10.
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_32, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
# fdlibm's logf.
_LG1, _LG2 = _F32(0xAAAAAA / 2**24), _F32(0xCCCE13 / 2**25)
_LG3, _LG4 = _F32(0x91E9EE / 2**25), _F32(0xF89E26 / 2**26)
_LN2_HIGH, _LN2_LOW = _F32(6.9313812256e-01), _F32(9.0580006145e-06)
_SQRT_HALF_BITS = np.int32(0x3F3504F3)
# Below this w, 1 - w would lose the bits of w that matter.
_SMALL = _F32(0.29289323)


def best_tokens(logits: Float32Array) -> Int32Array:
    """Return the lowest id of each row's highest logit; see `ops.Device.argmax`."""
    best_ids = logits.argmax(axis=1)  # the first of equal ones, and the first NaN if there is one
    # So a best logit is finite exactly if the row has no NaN, no +inf, and something else than -inf.
    is_finite = np.isfinite(logits[np.arange(len(logits)), best_ids])
    return np.where(is_finite, best_ids, -1).astype(np.int32)


def draw_tokens(logits: Float32Array, draws: list[Draw]) -> Int32Array:
    """Draw a token for each row of `logits` [N, vocab_size]; return [N]. Rows are independent."""
    return np.array([_draw_row(logits[index], draw) for index, draw in enumerate(draws)], dtype=np.int32)


def _draw_row(logits: Float32Array, draw: Draw) -> int:
    """Draw from one row [vocab_size]. Ties go to the lowest id."""
    if draw.temperature == 0:
        return int(logits.argmax())
    scaled = logits / _F32(draw.temperature)
    token_ids = kept_token_ids(scaled, draw)
    noise = gumbel_noise(token_ids, draw.seed, draw.candidate_index, draw.position)
    return int(token_ids[int((scaled[token_ids] + noise).argmax())])


def gumbel_noise(token_ids: npt.NDArray[np.int64], seed: int, candidate_index: int, position: int) -> Float32Array:
    """Return the noise of each of `token_ids`, ascending: -log(-log(u)) of a uniform u."""
    counters = token_ids >> 2
    first = np.ones(len(counters), dtype=np.bool_)
    first[1:] = counters[1:] != counters[:-1]  # four neighbours share one counter: compute it once
    blocks = counters[first].astype(np.uint32)
    same = [np.full_like(blocks, value) for value in (position, candidate_index, 0)]
    words = philox([blocks, *same], seed)
    random = words[token_ids & 3, np.cumsum(first) - 1]
    w = np.maximum(random.astype(np.float32), _F32(0.5)) * _F32(2**-32)
    w = np.minimum(w, _F32(1 - 2**-24))
    return -_log(-_log1m(w))


def philox(counter: list[UInt32Array], seed: int) -> UInt32Array:
    """Return Philox4x32-10 of counters, four arrays [N] of 32-bit words, under a 64-bit `seed`: [4, N]."""
    words = [word.astype(np.uint64) for word in counter]
    keys = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(_ROUNDS):
        one, two = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        words = [
            (two >> _32) ^ words[1] ^ np.uint64(keys[0]),
            two & _LOW,
            (one >> _32) ^ words[3] ^ np.uint64(keys[1]),
            one & _LOW,
        ]
        keys = [(key + step) & 0xFFFFFFFF for key, step in zip(keys, _KEY_STEPS, strict=True)]
    return np.stack(words).astype(np.uint32)


def _log1m(w: Float32Array) -> Float32Array:
    """Return log(1 - w), for 0 < w < 1."""
    exponent, fraction = _split(_F32(1) - w)
    small = w < _SMALL
    return _log_of(np.where(small, -w, fraction), np.where(small, _F32(0), exponent))


def _log(x: Float32Array) -> Float32Array:
    """Return log(x), for normal x > 0."""
    exponent, fraction = _split(x)
    return _log_of(fraction, exponent)


def _split(x: Float32Array) -> tuple[Float32Array, Float32Array]:
    """Return k and f with x = 2^k * (1 + f), 1 + f between the square roots of a half and of two."""
    bits = x.view(np.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    mantissa = (bits - (exponent << 23)).view(np.float32)
    return exponent.astype(np.float32), mantissa - _F32(1)


def _log_of(f: Float32Array, k: Float32Array) -> Float32Array:
    """Return log(1 + f) + k log(2), as fdlibm's logf does."""
    s = f / (_F32(2) + f)
    z = s * s
    w = z * z
    odd = w * (_LG2 + w * _LG4)
    even = z * (_LG1 + w * _LG3)
    series = even + odd
    half_square = _F32(0.5) * f * f
    result: Float32Array = s * (half_square + series) + k * _LN2_LOW - half_square + f + k * _LN2_HIGH
    return result
