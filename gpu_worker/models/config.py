"""What a model's forward pass must know of its config.json, checked once.

`ModelConfig` is written by `from_json` here and by `loading/gguf_model.py`; models read nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from octavo.gpu_worker.errors import ModelError, shown
from octavo.gpu_worker.ops import Activation, Heads
from octavo.kernels.routing import PLAIN_ROUTING, Routing

Json = Mapping[str, Any]

ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Far above any model: a damaged file must not make loops and tables that never end.
MAX_LAYERS = 4096
MAX_POSITIONS = 1 << 24
MAX_EXPERTS = 4096
MAX_GROUPS = 64
MAX_LATENT = 1 << 16
MAX_INTEGER = (1 << 31) - 1  # that the kernels take
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
# What these would do to values is not computed: a model that uses it would be another one.
_NOT_COMPUTED = ("clip_qkv",)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary settings, named as in a checkpoint's `rope_parameters`.

    `freq_factors` (GGUF only) divides each inverse frequency, on top of `rope_type`.
    `attention_factor` None means: the value that `rope_type` prescribes. `short_factors` and `long_factors` (longrope)
    divide the inverse frequencies of contexts up to `original_max_position_embeddings`, and of longer ones.
    """

    rope_type: str
    theta: float
    rotary_dim: int
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    freq_factors: tuple[float, ...] = ()
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no table can be made of."""
        positive = {"rope_theta": self.theta, "factor": self.factor}
        if self.rope_type == "llama3":
            positive |= {"low_freq_factor": self.low_freq_factor}
            positive |= {"high_freq_factor - low_freq_factor": self.high_freq_factor - self.low_freq_factor}
        if self.rope_type == "yarn":
            positive |= {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow, "rope_theta - 1": self.theta - 1}
        if self.rope_type in ("llama3", "yarn", "longrope"):
            positive |= {"original_max_position_embeddings": self.original_max_position_embeddings}
        for name, value in positive.items():
            if not value > 0:
                raise ModelError(f"the model's rotary settings: {name} is {value:g}, expected above 0")
        if not all(0 <= (scale or 0) <= 1e6 for scale in (self.mscale, self.mscale_all_dim)):
            raise ModelError("the model's rotary settings: mscale and mscale_all_dim must be from 0 to 1,000,000")
        half, needed = self.rotary_dim // 2, (self.rotary_dim // 2,) if self.rope_type == "longrope" else (0,)
        for name, factors, counts in (
            ("frequency", self.freq_factors, (0, half)),
            ("short", self.short_factors, needed),
            ("long", self.long_factors, needed),
        ):
            if any(not factor > 0 for factor in factors) or len(factors) not in counts:
                raise ModelError(f"the model's rotary settings: {len(factors)} {name} factors, expected {half} above 0")


@dataclass(frozen=True)
class LayerNorms:
    """What a checkpoint calls the norms of a layer: of what attention reads and makes, and the feed-forward layer.

    Empty where there is none.
    """

    attention: str = "input_layernorm"
    attention_post: str = ""
    mlp: str = "post_attention_layernorm"
    mlp_post: str = ""


@dataclass(frozen=True)
class MixtureNames:
    """What a checkpoint calls the parts of a mixture of experts.

    bias           within the block: what is added to scores for the choice; empty where there is none
    is_bias_a_row  whether that is a matrix of one row, not a vector
    has_biases     whether the router and the experts add biases, those of all experts in one tensor
    is_stacked     whether the matrices of all experts are in one tensor
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_expert"
    bias: str = ""
    is_bias_a_row: bool = False
    router: str = "gate"
    has_biases: bool = False
    is_stacked: bool = False


@dataclass(frozen=True)
class MixtureTraits:
    """What the name of an architecture says of its mixtures of experts. `routing` without what config.json has."""

    names: MixtureNames = MixtureNames()
    routing: Routing = PLAIN_ROUTING


@dataclass(frozen=True)
class Traits:
    """What the name of an architecture says, and its config.json does not.

    `defaults` are for keys that a config.json may leave out. A bias of None follows
    `attention_bias`. `windows`: no layer has a sliding window, each has, each has if
    `use_sliding_window`, or `layer_types` says: "some" if `use_sliding_window`, "layers" always.
    `norm_offset` is added to the weights of norms. `qk_norm`: queries and keys are normed, head by head, or with
    `norms_all_heads` all heads of a token at once. `scales_embedding`: embeddings are multiplied by the root
    of their size.
    `has_multipliers`: embeddings, scores, what layers add and logits are scaled by keys of config.json.
    `unrotated`: layers without rotary positions are those that `no_rope_layers` has a 0 for, or with
    "full_attention" those without a window, if others have one. `scales_full_rope`: a scaling of rotary
    positions that is given once is that of layers without a window, others have none.
    `mixture`: layers are a mixture of experts, but the dense ones that keys of config.json name. A `qk_norm` of None
    follows `use_qk_norm`.

    keys            config.json's names for what others call by the key's name
    fused           matrices that a checkpoint holds joined by rows, and the parts in their order
    is_interleaved  neighbouring dimensions of a head are rotated with each other, not those half a head apart; unless
                    config.json says `rope_interleave` false
    is_latent       attention is as in `LatentConfig`
    activation      of gated layers, whatever `hidden_act` says
    has_sinks       each query head has a score more, without a value
    """

    defaults: Json = field(default_factory=dict)
    qkv_bias: bool | None = False
    output_bias: bool | None = False
    qk_norm: bool | None = False
    norms_all_heads: bool = False
    windows: Literal["none", "all", "switched", "some", "layers"] = "none"
    unrotated: Literal["none", "listed", "full_attention"] = "none"
    scales_full_rope: bool = False
    mixture: MixtureTraits | None = None
    is_latent: bool = False
    activation: Activation | None = None
    has_sinks: bool = False
    norm_offset: float = 0.0
    norms: LayerNorms = LayerNorms()
    scales_embedding: bool = False
    has_multipliers: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    is_interleaved: bool = False

    @property
    def has_stacked_experts(self) -> bool:
        """Whether a checkpoint has the matrices of all experts of a layer in one tensor."""
        return self.mixture is not None and self.mixture.names.is_stacked


@dataclass(frozen=True)
class ExpertsConfig:
    """The mixture of experts of the layers for which `in_layer` is true.

    num_chosen                 experts that a token takes
    is_normalized              whether the weights of the chosen ones are scaled to a sum of 1
    intermediate_size          of one expert
    shared_intermediate_size   of the expert that every token takes, 0 for none
    routing                    how experts are chosen and weighed
    """

    num_experts: int
    num_chosen: int
    is_normalized: bool
    intermediate_size: int
    shared_intermediate_size: int
    in_layer: tuple[bool, ...]
    names: MixtureNames = MixtureNames()
    routing: Routing = PLAIN_ROUTING

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        if not 1 <= self.num_chosen <= self.num_experts <= MAX_EXPERTS:
            raise ModelError(
                f"the model's config takes {self.num_chosen} of {self.num_experts} experts; "
                f"at least 1 and at most all are supported, and at most {MAX_EXPERTS} experts"
            )
        if self.intermediate_size < 1 or self.shared_intermediate_size < 0:
            raise ModelError("the model's config has an expert of a size below 1; the checkpoint is damaged")
        routing = self.routing
        groups, chosen = routing.num_groups, routing.num_chosen_groups
        fits = 1 <= chosen <= groups <= MAX_GROUPS and self.num_experts % groups == 0
        size = self.num_experts // groups if fits else 0
        if not fits or (groups > 1 and (size < routing.num_best or size * chosen < self.num_chosen)):
            raise ModelError(
                f"the model's config chooses {self.num_chosen} of {self.num_experts} experts from {chosen} of {groups} "
                f"groups; groups must be as large as each other and hold them, and at most {MAX_GROUPS}"
            )


@dataclass(frozen=True)
class LatentConfig:
    """Latent attention (arXiv 2405.04434): keys and values of all heads are made of one short vector of a token.

    query_rank  of what queries are made of; 0: of the hidden state itself
    rank        of what keys and values are made of
    nope_dim, rope_dim  a head's dimensions of queries and keys, those that are rotated last
    value_dim   of a head
    is_split    whether what makes keys and what makes values are two tensors, [heads, rank, nope_dim] and
                [heads, value_dim, rank]
    """

    query_rank: int
    rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    is_split: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes that no layer has."""
        sizes = {
            "q_lora_rank": self.query_rank,
            "kv_lora_rank": self.rank,
            "qk_nope_head_dim": self.nope_dim,
            "qk_rope_head_dim": self.rope_dim,
            "v_head_dim": self.value_dim,
        }
        for name, size in sizes.items():
            least = int(name != "q_lora_rank")
            if not least <= size <= MAX_LATENT:
                raise ModelError(f"the model's config: {name} is {size}, expected {least} to {MAX_LATENT}")

    @property
    def query_dim(self) -> int:
        """Of a head."""
        return self.nope_dim + self.rope_dim


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family. `windows[i]` is layer i's sliding window in tokens, 0 for none.

    `rope` is that of all layers, or with a `window_rope` of those without a window. `attention_scale` multiplies
    the scores, 0 for the usual root. `qk_norm` and `norms_all_heads` are those of `Traits`. `norm_offset` is added to
    the weights of norms. Layers of `unrotated` have no rotary positions. What layers add is multiplied by
    `residual_multiplier`; logits are divided by `logits_divisor`. With a soft cap above 0 scaled scores, or
    logits, x become cap * tanh(x / cap).

    Without `has_head` vectors are made of its hidden states, and it gives no logits. With `is_interleaved` the rows of
    queries and keys are in another order than in the checkpoint. With `is_bidirectional` all tokens of a text see each
    other, or in layers with a window those at most half of it away. `num_nextn_layers` layers behind the others predict
    further tokens, and are not read. With a `latent` attention `heads` are those of its cache, which has one for all.
    With `has_sinks` each query head has a score more, without a value.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    heads: Heads
    max_position_embeddings: int
    rms_norm_eps: float
    activation: Activation
    rope: RopeConfig
    windows: tuple[int, ...]
    tie_word_embeddings: bool = False
    has_head: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norms_all_heads: bool = False
    experts: ExpertsConfig | None = None
    window_rope: RopeConfig | None = None
    embedding_scale: float = 1.0
    attention_scale: float = 0.0
    norm_offset: float = 0.0
    norms: LayerNorms = LayerNorms()
    unrotated: frozenset[int] = frozenset()
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    attention_soft_cap: float = 0.0
    logits_soft_cap: float = 0.0
    is_interleaved: bool = False
    is_bidirectional: bool = False
    num_nextn_layers: int = 0
    latent: LatentConfig | None = None
    has_sinks: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        heads = self.heads
        sizes = (self.vocab_size, self.hidden_size, self.intermediate_size, self.num_layers)
        if min(*sizes, heads.num_heads, heads.num_kv_heads, heads.head_dim, self.max_position_embeddings) < 1:
            raise ModelError("the model's config has a size below 1; the checkpoint is damaged")
        if heads.num_heads % heads.num_kv_heads:
            raise ModelError(f"{heads.num_heads} query heads do not share {heads.num_kv_heads} key heads evenly")
        for rope in filter(None, (self.rope, self.window_rope)):
            if rope.rotary_dim % 2 or not 0 < rope.rotary_dim <= heads.head_dim:
                raise ModelError(f"{rope.rotary_dim} rotary dimensions do not fit heads of {heads.head_dim}")
        if not 0 <= self.num_nextn_layers <= MAX_LAYERS:
            raise ModelError(f"the model's config has {self.num_nextn_layers} num_nextn_predict_layers")
        if self.num_layers > MAX_LAYERS or self.max_position_embeddings > MAX_POSITIONS:
            raise ModelError(
                f"the model's config asks for {self.num_layers} layers and {self.max_position_embeddings} positions; "
                f"at most {MAX_LAYERS} and {MAX_POSITIONS} are supported"
            )
        if not 0 <= self.rms_norm_eps < 1:
            raise ModelError(f"the model's config has an rms_norm_eps of {self.rms_norm_eps:g}, expected from 0 to 1")
        if min(self.windows, default=0) < 0:
            raise ModelError(f"the model's config has a sliding window of {min(self.windows)} tokens")
        if len(self.windows) != self.num_layers:
            raise ModelError(f"the model's config names windows for {len(self.windows)} of {self.num_layers} layers")


class Values:
    """Typed look-ups in a parsed JSON object. Null counts as absent. They raise ModelError."""

    def __init__(self, values: Json, where: str) -> None:
        self._values = values
        self._where = where

    def integer(self, key: str, default: int | None = None) -> int:
        """Return an integer."""
        value = self._get(key, default)
        return checked_integer(value, f"{self._where}: {key}")

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number."""
        value = self._get(key, default)
        return checked_number(value, f"{self._where}: {key}")

    def optional_number(self, key: str) -> float | None:
        """Return a number, or None if it is absent."""
        return None if self._values.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ModelError(f"{self._where}: {key} is {shown(value)}, expected true or false")
        return value

    def _get(self, key: str, default: object) -> object:
        value = self._values.get(key)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"{self._where}: {key} is missing")
        return value


def checked_integer(value: object, what: str) -> int:
    """Return an integer that a file holds; raise ModelError, with `what` in it, if it is none of 32 bits."""
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > MAX_INTEGER:
        raise ModelError(f"{what} is {shown(value)}, expected an integer of 32 bits")
    return value


def checked_number(value: object, what: str) -> float:
    """Return a number that a file holds; raise ModelError, with `what` in it, if it is not finite."""
    if not isinstance(value, bool) and isinstance(value, int | float):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise ModelError(f"{what} is {shown(value)}, expected a finite number")


def from_json(values: Json, architecture: str, traits: Traits, where: str) -> ModelConfig:
    """Read a parsed config.json of `architecture`; `where` names the file in messages."""
    merged = {**traits.defaults, **values}
    read = Values(merged, where)
    for key in _NOT_COMPUTED:
        if merged.get(key) is not None:
            raise ModelError(f"{where}: {key} is {shown(merged[key])}, expected null: it is not supported")
    num_heads = read.integer("num_attention_heads")
    hidden_size = read.integer("hidden_size")
    num_layers = read.integer("num_hidden_layers")
    if num_heads < 1 or not 1 <= num_layers <= MAX_LAYERS:
        raise ModelError(f"{where}: {num_heads} attention heads in {num_layers} layers are no model")
    heads = Heads(
        num_heads=num_heads,
        num_kv_heads=read.integer("num_key_value_heads", num_heads),
        head_dim=read.integer("head_dim", hidden_size // num_heads),
    )
    latent = _latent(read) if traits.is_latent else None
    if latent is not None:
        heads = Heads(num_heads, 1, latent.rank + latent.rope_dim, latent.rank)
    rope_head_dim = heads.head_dim if latent is None else latent.rope_dim
    act = str(merged.get("hidden_activation") or merged.get("hidden_act", "silu"))
    activation = traits.activation or ACTIVATIONS.get(act)
    if activation is None:
        raise ModelError(f"{where}: hidden_act {shown(act)} is not one of {sorted(ACTIVATIONS)}")
    if activation == "swigluoai":
        for key, value in (("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
            if read.number(key, value) != value:
                raise ModelError(f"{where}: {key} is {read.number(key):g}, supported is {value}")

    def has_bias(name: str, trait: bool | None) -> bool:
        return read.flag(traits.keys.get(name, "attention_bias")) if trait is None else trait

    def multiplier(key: str) -> float:
        return _multiplier(read, key, where) if traits.has_multipliers else 1.0

    windows = _windows(merged, read, traits, num_layers, where)
    rope = _rope(merged, rope_head_dim, where)
    attention_scale = multiplier("attention_multiplier") if traits.has_multipliers else _attention_scale(read, where)
    if latent is not None:
        attention_scale = latent.query_dim**-0.5 * yarn_scale(rope, rope.mscale_all_dim) ** 2
    return ModelConfig(
        architecture=architecture,
        vocab_size=read.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=read.integer("intermediate_size"),
        num_layers=num_layers,
        heads=heads,
        max_position_embeddings=read.integer("max_position_embeddings"),
        rms_norm_eps=read.number("rms_norm_eps", 1e-6),
        activation=activation,
        rope=rope,
        window_rope=_window_rope(merged, traits, rope_head_dim, where),
        windows=windows,
        tie_word_embeddings=read.flag("tie_word_embeddings"),
        qkv_bias=has_bias("attention_bias", traits.qkv_bias),
        output_bias=has_bias("output_bias", traits.output_bias),
        mlp_bias=read.flag(traits.keys.get("mlp_bias", "mlp_bias")),
        qk_norm=read.flag("use_qk_norm") if traits.qk_norm is None else traits.qk_norm,
        norms_all_heads=traits.norms_all_heads,
        experts=None if traits.mixture is None else _experts(merged, read, traits, num_layers, where),
        embedding_scale=hidden_size**0.5 if traits.scales_embedding else multiplier("embedding_multiplier"),
        attention_scale=attention_scale,
        norm_offset=traits.norm_offset,
        norms=traits.norms,
        unrotated=_unrotated(merged, read, traits, windows, where),
        residual_multiplier=multiplier("residual_multiplier"),
        logits_divisor=multiplier("logits_scaling"),
        attention_soft_cap=_soft_cap(read, "attn_logit_softcapping", where),
        logits_soft_cap=_soft_cap(read, "final_logit_softcapping", where),
        is_interleaved=traits.is_interleaved and read.flag("rope_interleave", True),
        is_bidirectional=read.flag("use_bidirectional_attention"),
        num_nextn_layers=read.integer("num_nextn_predict_layers", 0),
        latent=latent,
        has_sinks=traits.has_sinks,
    )


def yarn_scale(rope: RopeConfig, weight: float | None) -> float:
    """Return by how much YaRN strengthens attention to a longer context."""
    return 0.1 * weight * math.log(rope.factor) + 1.0 if weight and rope.factor > 1 else 1.0


def _latent(read: Values) -> LatentConfig:
    """Read the sizes of latent attention."""
    return LatentConfig(
        query_rank=read.integer("q_lora_rank", 0),
        rank=read.integer("kv_lora_rank"),
        nope_dim=read.integer("qk_nope_head_dim"),
        rope_dim=read.integer("qk_rope_head_dim"),
        value_dim=read.integer("v_head_dim"),
    )


def _attention_scale(read: Values, where: str) -> float:
    """Return what scores are multiplied by, 0 for the usual root of the head's dimensions."""
    scalar = read.optional_number("query_pre_attn_scalar")
    if scalar is None:
        return 0.0
    if not 0 < scalar < math.inf:
        raise ModelError(f"{where}: query_pre_attn_scalar is {scalar}, expected a number above 0")
    return float(scalar**-0.5)


def _multiplier(read: Values, key: str, where: str) -> float:
    """Return what a key says values are multiplied by."""
    value = read.number(key)
    if not 1e-6 < value < 1e6:
        raise ModelError(f"{where}: {key} is {value:g}, expected a number between 0.000001 and 1,000,000")
    return value


def _soft_cap(read: Values, key: str, where: str) -> float:
    """Return what a key says values stay below, 0 for no limit."""
    cap = read.optional_number(key)
    if cap is not None and not 1e-6 < cap < 1e6:
        raise ModelError(f"{where}: {key} is {cap:g}, expected null or a number between 0.000001 and 1,000,000")
    return cap or 0.0


def _unrotated(values: Json, read: Values, traits: Traits, windows: tuple[int, ...], where: str) -> frozenset[int]:
    """Return the layers without rotary positions."""
    if traits.unrotated == "none":
        return frozenset()
    if traits.unrotated == "full_attention":
        return frozenset(layer for layer, window in enumerate(windows) if not window and values.get("sliding_window"))
    rotated = values.get("no_rope_layers")
    if rotated is None:
        interval = read.integer("no_rope_layer_interval")
        if interval < 1:
            raise ModelError(f"{where}: no_rope_layer_interval is {interval}, expected at least 1")
        rotated = [int((layer + 1) % interval != 0) for layer in range(len(windows))]
    if not isinstance(rotated, list) or len(rotated) != len(windows) or not all(flag in (0, 1) for flag in rotated):
        raise ModelError(f"{where}: no_rope_layers is {shown(rotated)}, expected a 0 or 1 for each layer")
    return frozenset(layer for layer, flag in enumerate(rotated) if not flag)


def _experts(values: Json, read: Values, traits: Traits, num_layers: int, where: str) -> ExpertsConfig:
    """Read the settings of a mixture of experts."""
    mixture = traits.mixture
    assert mixture is not None, where

    def integer(name: str, default: int | None = None) -> int:
        return read.integer(traits.keys.get(name, name), default)

    count = traits.keys.get("num_experts", "num_experts")
    inner = read.integer("moe_intermediate_size", read.integer("intermediate_size"))
    shared = integer("shared_expert_intermediate_size", integer("n_shared_experts", 0) * inner)
    has_groups = values.get("topk_method") != "greedy"
    routing = replace(
        mixture.routing,
        num_groups=read.integer("n_group", 1) if has_groups else 1,
        num_chosen_groups=read.integer("topk_group", 1) if has_groups else 1,
        scale=_multiplier(read, "routed_scaling_factor", where) if values.get("routed_scaling_factor") else 1.0,
    )
    return ExpertsConfig(
        num_experts=read.integer(count if values.get(count) is not None else "num_local_experts"),
        num_chosen=integer("num_experts_per_tok"),
        is_normalized=read.flag("norm_topk_prob"),
        intermediate_size=inner,
        shared_intermediate_size=shared,
        in_layer=_layers_with_experts(values, read, traits, num_layers, where),
        names=mixture.names,
        routing=routing,
    )


def _layers_with_experts(values: Json, read: Values, traits: Traits, num_layers: int, where: str) -> tuple[bool, ...]:
    """Return whether each layer is a mixture: by a list, or by a step, a first and a last one, and exceptions."""
    kinds = values.get("mlp_layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != num_layers or any(k not in ("dense", "sparse") for k in kinds):
            raise ModelError(f"{where}: mlp_layer_types is {shown(kinds)}, expected dense or sparse for each layer")
        return tuple(kind == "sparse" for kind in kinds)
    step = read.integer(traits.keys.get("decoder_sparse_step", "decoder_sparse_step"), 1)
    dense = values.get("mlp_only_layers") or []
    if step < 1 or not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise ModelError(f"{where}: decoder_sparse_step must be at least 1 and mlp_only_layers a list of layers")
    first_key = traits.keys.get("first_k_dense_replace", "first_k_dense_replace")
    first = read.integer(first_key, 0)
    if not 0 <= first <= num_layers:
        raise ModelError(f"{where}: {first_key} is {first}, expected 0 to {num_layers}")
    last = read.integer("moe_layer_end_index", -1)
    last = num_layers - 1 if last < 0 else last
    dense = set(dense)
    return tuple(
        (layer + 1) % step == 0 and first <= layer <= last and layer not in dense for layer in range(num_layers)
    )


def _rope(values: Json, head_dim: int, where: str) -> RopeConfig:
    """Read either spelling: `rope_parameters`, or `rope_theta` with `rope_scaling`; of layers without a window."""
    settings = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(settings, Mapping):
        raise ModelError(f"{where}: the rotary settings are {shown(settings)}, expected an object")
    return _rope_of(values, _of_layer_kind(settings, "full_attention", where), head_dim, where)


def _window_rope(values: Json, traits: Traits, head_dim: int, where: str) -> RopeConfig | None:
    """Return the rotary settings of layers with a window, None if they are those of all layers."""
    settings = values.get("rope_parameters") or {}
    if traits.scales_full_rope and values.get("rope_scaling") and not settings:
        return _rope_of(values, {"rope_type": "default"}, head_dim, where)
    if isinstance(settings, Mapping) and "sliding_attention" in settings:
        return _rope_of(values, _of_layer_kind(settings, "sliding_attention", where), head_dim, where)
    theta = values.get("rope_local_base_freq")
    return None if theta is None else _rope_of(values, {"rope_type": "default", "rope_theta": theta}, head_dim, where)


def _of_layer_kind(settings: Json, kind: str, where: str) -> Json:
    """Return the rotary settings of a kind of layers, where they are told apart."""
    by_kind = {name: value for name, value in settings.items() if isinstance(value, Mapping)}
    if not by_kind:
        return settings
    if not by_kind.keys() <= {"full_attention", "sliding_attention"} or kind not in by_kind:
        known = "full_attention and sliding_attention"
        raise ModelError(f"{where}: there are rotary settings for {shown(sorted(by_kind))}; {known} are known")
    return by_kind[kind]


def _rope_of(values: Json, settings: Json, head_dim: int, where: str) -> RopeConfig:
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    if isinstance(rope_type, str):  # mrope is rotation along the axes of an image, which are one for text
        rope_type = {"mrope": "default", "su": "longrope"}.get(rope_type, rope_type)
    if rope_type not in ROPE_TYPES:
        raise ModelError(
            f"{where}: rope_type {shown(rope_type)} is not supported; supported are {', '.join(ROPE_TYPES)}"
        )
    read = Values({**values, **settings}, where)
    original = read.integer("original_max_position_embeddings", read.integer("max_position_embeddings"))
    # What a longrope is stretched by is said by the two contexts, and used for the attention factor alone.
    stretch = read.integer("max_position_embeddings") / max(original, 1)
    factor = {"default": 1.0, "longrope": stretch}.get(rope_type)
    is_long = rope_type == "longrope"
    return RopeConfig(
        rope_type=rope_type,
        theta=read.number("rope_theta", 10000.0),
        rotary_dim=read.integer("rotary_dim", int(head_dim * read.number("partial_rotary_factor", 1.0))),
        factor=read.number("factor", factor),
        original_max_position_embeddings=original,
        low_freq_factor=read.number("low_freq_factor", None if rope_type == "llama3" else 1.0),
        high_freq_factor=read.number("high_freq_factor", None if rope_type == "llama3" else 4.0),
        beta_fast=read.number("beta_fast", 32.0),
        beta_slow=read.number("beta_slow", 1.0),
        attention_factor=read.optional_number("attention_factor"),
        mscale=read.optional_number("mscale"),
        mscale_all_dim=read.optional_number("mscale_all_dim"),
        truncate=read.flag("truncate", True),
        short_factors=_factors(settings, "short_factor", where) if is_long else (),
        long_factors=_factors(settings, "long_factor", where) if is_long else (),
    )


def _factors(settings: Json, key: str, where: str) -> tuple[float, ...]:
    """Return a list of numbers of the rotary settings."""
    factors = settings.get(key)
    if not isinstance(factors, list):
        raise ModelError(f"{where}: {key} is {shown(factors)}, expected a list of numbers")
    return tuple(checked_number(factor, f"{where}: a number of {key}") for factor in factors)


def _windows(values: Json, read: Values, traits: Traits, num_layers: int, where: str) -> tuple[int, ...]:
    """Return each layer's sliding window, 0 for none."""
    no_window = values.get("sliding_window") is None or traits.windows == "none"
    if no_window or (traits.windows in ("switched", "some") and not read.flag("use_sliding_window")):
        return (0,) * num_layers
    window = read.integer("sliding_window")
    if window < 1:
        raise ModelError(f"{where}: sliding_window is {window}, expected at least 1")
    if traits.windows not in ("some", "layers"):
        return (window,) * num_layers
    kinds = values.get("layer_types")
    if kinds is None and traits.windows == "layers":  # the last of so many layers sees all
        pattern = read.integer("sliding_window_pattern", num_layers + 1)  # without one, none sees all
        if pattern < 1:
            raise ModelError(f"{where}: sliding_window_pattern is {pattern}, expected at least 1")
        kinds = ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(num_layers)]
    if kinds is None:
        first = read.integer("max_window_layers")
        kinds = ["full_attention" if layer < first else "sliding_attention" for layer in range(num_layers)]
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise ModelError(f"{where}: layer_types is {shown(kinds)}, expected a list of names")
    if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ModelError(f"{where}: layer_types must name full_attention or sliding_attention for each layer")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
