"""How a token is drawn: the settings of a draw, and in plain numpy the rules that say which tokens may be drawn.

`Draw` is the only list of a draw's settings. The C struct of the CPU kernels, the table of the `cuda`
device and the arguments of its kernels follow from it, or are checked against it by a test. The order of
the rules is that of `SamplingParams`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import attrgetter
from typing import Annotated, Any, get_type_hints

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Draw:
    """How one row's token is drawn from its processed logits (`gpu_worker/sampling/sampler.py`).

    temperature 0 is greedy: the highest logit, the lowest id on a tie. `position` is the absolute
    position of the token to be drawn, prompt included. Beside the types: those of the C struct.
    """

    temperature: Annotated[float, "f4"]
    top_k: Annotated[int, "i4"]
    top_p: Annotated[float, "f8"]
    min_p: Annotated[float, "f8"]
    seed: Annotated[int, "u8"]
    candidate_index: Annotated[int, "u4"]
    position: Annotated[int, "u4"]
    top_n_sigma: Annotated[float, "f8"] = 0.0
    typical_p: Annotated[float, "f8"] = 1.0

    @property
    def has_edges(self) -> bool:
        """Whether a rule may leave fewer than all tokens."""
        cuts = (self.top_k > 0, self.top_p < 1, self.min_p > 0, self.top_n_sigma > 0, self.typical_p < 1)
        return self.temperature > 0 and any(cuts)


_TYPES: dict[str, str] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(Draw, include_extras=True).items()
}
STRUCT = sorted(_TYPES.items(), key=lambda item: item[1][1], reverse=True)
"""OctavoDraw, as a numpy type: as in `Draw`, the wide fields first."""

_LOGARITHMS = {"min_p": "log_min_p"}
COLUMNS = [_LOGARITHMS.get(name, name) for name in _TYPES if name not in ("seed", "position")]
"""What the `cuda` device keeps of a draw, a word each. The seed is two more; the position comes with each step."""
FLOATS = frozenset(_LOGARITHMS.get(name, name) for name, kind in _TYPES.items() if kind[0] == "f")
"""Those of `COLUMNS` that are float32."""

_values = attrgetter(*(name for name, _ in STRUCT))


def pack(draws: list[Draw]) -> npt.NDArray[np.void]:
    """Return draws as an array of `STRUCT`."""
    return np.array([_values(draw) for draw in draws], dtype=STRUCT)


def column_values(draw: Draw) -> dict[str, Any]:
    """Return the values of `COLUMNS`, within the range of their words."""
    values = {name: getattr(draw, name) for name in _TYPES if name in COLUMNS}
    values["top_k"] = min(draw.top_k, 2**31 - 1)
    values["top_p"] = min(draw.top_p, 1.0)
    values["log_min_p"] = math.log(draw.min_p) if draw.min_p > 0 else -math.inf
    return values


def kept_token_ids(scaled: Float32Array, draw: Draw) -> TokenIds:
    """Return the ids, ascending, that the rules leave of the logits divided by the temperature [vocab_size]."""
    token_ids = np.flatnonzero(scaled > -np.inf)
    if draw.top_n_sigma > 0:
        kept = scaled[token_ids]
        token_ids = token_ids[kept >= kept.max() - np.float32(draw.top_n_sigma * kept.astype(np.float64).std())]
    if 0 < draw.top_k < len(token_ids):
        token_ids = _best(scaled, token_ids)[: draw.top_k]
    if draw.top_p < 1:
        token_ids = _top_p(scaled, token_ids, draw.top_p)
    if draw.min_p > 0:
        kept = scaled[token_ids]
        token_ids = token_ids[kept >= kept.max() + np.float32(math.log(draw.min_p))]
    if draw.typical_p < 1:
        token_ids = _typical(scaled, token_ids, draw.typical_p)
    return np.sort(token_ids)


def _best(scaled: Float32Array, token_ids: TokenIds) -> TokenIds:
    """Return ids by their logits, best first, lower ids first on a tie."""
    token_ids = np.sort(token_ids)
    return token_ids[np.argsort(-scaled[token_ids], kind="stable")]


def _top_p(scaled: Float32Array, token_ids: TokenIds, top_p: float) -> TokenIds:
    """Keep the smallest set of best ids whose share of the probability reaches `top_p`, at least one."""
    token_ids = _best(scaled, token_ids)
    sums = _weights(scaled[token_ids]).cumsum()
    return token_ids[: int((sums < top_p * sums[-1]).sum()) + 1]


def _typical(scaled: Float32Array, token_ids: TokenIds, typical_p: float) -> TokenIds:
    """Keep the ids nearest to the expected logit whose share of the probability reaches `typical_p`, and their ties.

    -log p is the logarithm of a sum less the logit, its expected value, the entropy, that less the expected
    logit: so what is as near to the entropy is as near to that logit.
    """
    values = scaled[token_ids]
    weights, depths = _weights(values), values.astype(np.float64) - float(values.max())
    expected = np.float32(float(values.max()) + float((weights * depths).sum() / weights.sum()))
    distances = np.abs(values - expected)
    order = np.argsort(distances, kind="stable")
    sums = weights[order].cumsum()
    last = min(int((sums < typical_p * weights.sum()).sum()), len(order) - 1)
    kept: TokenIds = token_ids[distances <= distances[order[last]]]
    return kept


def _weights(values: Float32Array) -> npt.NDArray[np.float64]:
    """Return what the probabilities of logits are proportional to."""
    return np.exp(values.astype(np.float64) - float(values.max()))
