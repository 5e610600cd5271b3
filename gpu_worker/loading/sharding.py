"""Which part of each tensor a rank of a tensor-parallel group holds.

Queries, keys, values, gate and up are split by rows (heads, inner dimensions), what follows them
(output, down) by columns, so that a layer needs one sum over the ranks after attention and one
after the MLP. Each expert of a mixture is split like an MLP; the router is whole on every rank. The
head is split by rows: each rank makes the logits of a piece of the vocabulary. The embedding is
split by columns: any rank can look up any token, and joining the columns gives the bits of the
whole table. Norms are whole on every rank.

With fewer key heads than ranks, neighbouring ranks hold the same key head. So it is with latent keys, of which there
is one for all heads, and what makes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.models.config import ExpertsConfig, ModelConfig
from octavo.gpu_worker.ops import Heads

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
# w1, w2 and w3 are Mixtral's names for the parts of an expert.
_ROWS = ("q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "w1", "w3")
_KEY_HEAD_ROWS = ("k_proj", "v_proj")
_COLUMNS = ("o_proj", "down_proj", "w2", "embed_tokens")
_WHOLE = ("gate", "router", "shared_expert_gate", "q_a_proj", "kv_a_proj_with_mqa")


@dataclass(frozen=True)
class Pairs:
    """Which dimensions of each head of `head_dim` lie in pairs: `count` from `first` on."""

    head_dim: int
    first: int
    count: int


@dataclass(frozen=True)
class Part:
    """What of a checkpoint's tensor a rank holds.

    source   its name in the checkpoint
    index    one slice for each dimension, within bounds
    is_zero  zeros of that shape are held instead: rank 0 adds the tensor to a sum over the ranks
    pairs    where dimensions of each head lie in pairs that are rotated, to be put half of them apart; None: nowhere
    """

    source: str
    index: tuple[slice, ...]
    is_zero: bool = False
    pairs: Pairs | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is held."""
        return tuple(place.stop - place.start for place in self.index)


@dataclass(frozen=True)
class Sharding:
    """One rank's place among `world_size` ranks. World size 1 splits nothing."""

    rank: int = 0
    world_size: int = 1

    def local_config(self, config: ModelConfig) -> ModelConfig:
        """Return what to build this rank's model from: its share of heads, and a head of its own.

        Sizes of the dense layers and the vocabulary stay those of the whole model. Raises
        ModelError if the model cannot be split so.
        """
        if self.world_size == 1:
            return config
        self._check(config)
        heads = config.heads
        share = dataclasses.replace(
            heads, num_heads=heads.num_heads // self.world_size, num_kv_heads=self._num_kv_heads(heads)
        )
        return dataclasses.replace(
            config, heads=share, tie_word_embeddings=False, experts=config.experts and self._experts(config.experts)
        )

    def part(self, name: str, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Part:
        """Return what the tensor `name` of this rank's model is.

        config  of the whole model
        shapes  of the whole model's tensors
        """
        source = _EMBEDDING if name == _HEAD and config.tie_word_embeddings else name
        shape = shapes[source]
        index = [slice(0, size) for size in shape]
        if self.world_size == 1:
            return Part(source, tuple(index))
        module, kind = name.split(".")[-2:]
        is_zero = False
        if module in _ROWS:
            index[0] = self._share(shape[0])
        elif module in _COLUMNS and kind == "weight":
            index[1] = self._share(shape[1])
        elif module in _COLUMNS:
            is_zero = self.rank > 0
        elif module in _KEY_HEAD_ROWS:
            index[0] = self._kv_rows(config.heads)
        elif kind == "sinks":
            index[0] = self._share(shape[0])
        elif kind in ("gate_proj_bias", "up_proj_bias"):
            index[1] = self._share(shape[1])
        elif kind == "down_proj_bias":
            is_zero = self.rank > 0
        elif name == _HEAD:
            index[0] = self.vocab_rows(config.vocab_size)
        else:
            is_whole = module.endswith("norm") or module in _WHOLE or kind == "e_score_correction_bias"
            assert is_whole, f"no rule splits {name}"
        return Part(source, tuple(index), is_zero)

    def vocab_rows(self, vocab_size: int, rank: int | None = None) -> slice:
        """Return the token ids whose logits a rank (by default this) makes: as many on each, fewer on the last."""
        rank = self.rank if rank is None else rank
        count = -(-vocab_size // self.world_size)
        return slice(min(rank * count, vocab_size), min((rank + 1) * count, vocab_size))

    def _share(self, size: int) -> slice:
        count = size // self.world_size
        return slice(self.rank * count, (self.rank + 1) * count)

    def _num_kv_heads(self, heads: Heads) -> int:
        return max(1, heads.num_kv_heads // self.world_size)

    def _kv_rows(self, heads: Heads) -> slice:
        first = self.rank * heads.num_kv_heads // self.world_size
        return slice(first * heads.head_dim, (first + self._num_kv_heads(heads)) * heads.head_dim)

    def _experts(self, experts: ExpertsConfig) -> ExpertsConfig:
        return dataclasses.replace(
            experts,
            intermediate_size=experts.intermediate_size // self.world_size,
            shared_intermediate_size=experts.shared_intermediate_size // self.world_size,
        )

    def _check(self, config: ModelConfig) -> None:
        """Raise ModelError if a size does not divide."""
        ranks, heads = self.world_size, config.heads
        if config.norms_all_heads:
            raise ModelError(
                f"{config.architecture} norms queries over all heads at once, which {ranks} ranks would each have a "
                "part of; use one rank"
            )
        for what, size in _sizes(config):
            if size % ranks:
                raise ModelError(f"{size} {what} cannot be split over {ranks} ranks evenly; {_advice(config)}")
        if self.vocab_rows(config.vocab_size, ranks - 1).start >= config.vocab_size:
            raise ModelError(f"{config.vocab_size} token ids leave one of {ranks} ranks without any; use fewer ranks")
        if heads.num_kv_heads % ranks and ranks % heads.num_kv_heads:
            raise ModelError(
                f"{heads.num_kv_heads} key heads can be neither split over {ranks} ranks evenly nor repeated on them "
                f"evenly; {_advice(config)}"
            )


def _advice(config: ModelConfig) -> str:
    """Say which numbers of ranks a model can be split over."""
    possible = [str(ranks) for ranks in range(2, 17) if _can_split(config, ranks)]
    return f"this model can be split over {', '.join(possible)}" if possible else "this model cannot be split"


def _sizes(config: ModelConfig) -> list[tuple[str, int]]:
    """Return what the ranks must share evenly."""
    sizes = [("query heads", config.heads.num_heads), ("hidden dimensions", config.hidden_size)]
    if config.experts is None or not all(config.experts.in_layer):
        sizes.append(("inner dimensions", config.intermediate_size))
    if config.experts is not None:
        sizes.append(("inner dimensions of an expert", config.experts.intermediate_size))
        sizes.append(("inner dimensions of the shared expert", config.experts.shared_intermediate_size))
    return sizes


def _can_split(config: ModelConfig, ranks: int) -> bool:
    heads = config.heads
    even = not any(size % ranks for _, size in _sizes(config))
    return even and (heads.num_kv_heads % ranks == 0 or ranks % heads.num_kv_heads == 0)


WHOLE = Sharding()
