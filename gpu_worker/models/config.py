"""What a model's forward pass must know of its config.json, checked once.

`ModelConfig` is written by `from_json` here and by `gguf_file.py`; models read nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.ops import Activation, Heads

Json = Mapping[str, Any]

ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Far above any model: a damaged file must not make loops and tables that never end.
MAX_LAYERS = 4096
MAX_POSITIONS = 1 << 24
MAX_EXPERTS = 4096
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary settings, named as in a checkpoint's `rope_parameters`.

    `freq_factors` (GGUF only) divides each inverse frequency, on top of `rope_type`.
    `attention_factor` None means: the value that `rope_type` prescribes.
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


@dataclass(frozen=True)
class Traits:
    """What the name of an architecture says, and its config.json does not.

    `defaults` are for keys that a config.json may leave out. A bias of None follows
    `attention_bias`. `windows`: no layer has a sliding window, each has, each has if
    `use_sliding_window`, or `layer_types` says.
    `has_experts`: layers are a mixture of experts, but those of `mlp_only_layers` or off `decoder_sparse_step`.
    """

    defaults: Json = field(default_factory=dict)
    qkv_bias: bool | None = False
    output_bias: bool | None = False
    qk_norm: bool = False
    windows: Literal["none", "all", "switched", "some"] = "none"
    has_experts: bool = False


@dataclass(frozen=True)
class ExpertsConfig:
    """The mixture of experts of the layers for which `in_layer` is true.

    num_chosen                 experts that a token takes
    is_normalized              whether the weights of the chosen ones are scaled to a sum of 1
    intermediate_size          of one expert
    shared_intermediate_size   of the expert that every token takes, 0 for none
    """

    num_experts: int
    num_chosen: int
    is_normalized: bool
    intermediate_size: int
    shared_intermediate_size: int
    in_layer: tuple[bool, ...]

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        if not 1 <= self.num_chosen <= self.num_experts <= MAX_EXPERTS:
            raise ModelError(
                f"the model's config takes {self.num_chosen} of {self.num_experts} experts; "
                f"at least 1 and at most all are supported, and at most {MAX_EXPERTS} experts"
            )
        if self.intermediate_size < 1 or self.shared_intermediate_size < 0:
            raise ModelError("the model's config has an expert of a size below 1; the checkpoint is damaged")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family. `windows[i]` is layer i's sliding window in tokens, 0 for none.

    Without `has_head` vectors are made of its hidden states, and it gives no logits.
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
    experts: ExpertsConfig | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        heads = self.heads
        sizes = (self.vocab_size, self.hidden_size, self.intermediate_size, self.num_layers)
        if min(*sizes, heads.num_heads, heads.num_kv_heads, heads.head_dim, self.max_position_embeddings) < 1:
            raise ModelError("the model's config has a size below 1; the checkpoint is damaged")
        if heads.num_heads % heads.num_kv_heads:
            raise ModelError(f"{heads.num_heads} query heads do not share {heads.num_kv_heads} key heads evenly")
        if self.rope.rotary_dim % 2 or not 0 < self.rope.rotary_dim <= heads.head_dim:
            raise ModelError(f"{self.rope.rotary_dim} rotary dimensions do not fit heads of {heads.head_dim}")
        if self.num_layers > MAX_LAYERS or self.max_position_embeddings > MAX_POSITIONS:
            raise ModelError(
                f"the model's config asks for {self.num_layers} layers and {self.max_position_embeddings} positions; "
                f"at most {MAX_LAYERS} and {MAX_POSITIONS} are supported"
            )
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
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelError(f"{self._where}: {key} is {value!r}, expected an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelError(f"{self._where}: {key} is {value!r}, expected a number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """Return a number, or None if it is absent."""
        return None if self._values.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ModelError(f"{self._where}: {key} is {value!r}, expected true or false")
        return value

    def _get(self, key: str, default: object) -> object:
        value = self._values.get(key)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"{self._where}: {key} is missing")
        return value


def from_json(values: Json, architecture: str, traits: Traits, where: str) -> ModelConfig:
    """Read a parsed config.json of `architecture`; `where` names the file in messages."""
    if values.get("quantization_config"):
        raise ModelError(
            f"{where}: the checkpoint is quantised (quantization_config), which is not supported; "
            "use the unquantised checkpoint or a GGUF file"
        )
    merged = {**traits.defaults, **values}
    read = Values(merged, where)
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
    activation = ACTIVATIONS.get(str(merged.get("hidden_act", "silu")))
    if activation is None:
        raise ModelError(f"{where}: hidden_act {merged['hidden_act']!r} is not one of {sorted(ACTIVATIONS)}")
    attention_bias = read.flag("attention_bias")
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
        rope=_rope(merged, heads.head_dim, where),
        windows=_windows(merged, read, traits, num_layers, where),
        tie_word_embeddings=read.flag("tie_word_embeddings"),
        qkv_bias=attention_bias if traits.qkv_bias is None else traits.qkv_bias,
        output_bias=attention_bias if traits.output_bias is None else traits.output_bias,
        mlp_bias=read.flag("mlp_bias"),
        qk_norm=traits.qk_norm,
        experts=_experts(merged, read, num_layers, where) if traits.has_experts else None,
    )


def _experts(values: Json, read: Values, num_layers: int, where: str) -> ExpertsConfig:
    """Read the settings of a mixture of experts, in the names of Mixtral or of Qwen."""
    step = read.integer("decoder_sparse_step", 1)
    dense = values.get("mlp_only_layers") or []
    if step < 1 or not isinstance(dense, list):
        raise ModelError(f"{where}: decoder_sparse_step must be at least 1 and mlp_only_layers a list of layers")
    return ExpertsConfig(
        num_experts=read.integer("num_experts" if values.get("num_experts") is not None else "num_local_experts"),
        num_chosen=read.integer("num_experts_per_tok"),
        is_normalized=read.flag("norm_topk_prob"),
        intermediate_size=read.integer("moe_intermediate_size", read.integer("intermediate_size")),
        shared_intermediate_size=read.integer("shared_expert_intermediate_size", 0),
        in_layer=tuple((layer + 1) % step == 0 and layer not in dense for layer in range(num_layers)),
    )


def _rope(values: Json, head_dim: int, where: str) -> RopeConfig:
    """Read either spelling: `rope_parameters`, or `rope_theta` with `rope_scaling`."""
    settings = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(settings, Mapping) or any(isinstance(value, Mapping) for value in settings.values()):
        raise ModelError(f"{where}: rotary settings that differ by layer are not supported")
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ModelError(f"{where}: rope_type {rope_type!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
    read = Values({**values, **settings}, where)
    return RopeConfig(
        rope_type=rope_type,
        theta=read.number("rope_theta", 10000.0),
        rotary_dim=int(head_dim * read.number("partial_rotary_factor", 1.0)),
        factor=read.number("factor", 1.0 if rope_type == "default" else None),
        original_max_position_embeddings=read.integer(
            "original_max_position_embeddings", read.integer("max_position_embeddings")
        ),
        low_freq_factor=read.number("low_freq_factor", None if rope_type == "llama3" else 1.0),
        high_freq_factor=read.number("high_freq_factor", None if rope_type == "llama3" else 4.0),
        beta_fast=read.number("beta_fast", 32.0),
        beta_slow=read.number("beta_slow", 1.0),
        attention_factor=read.optional_number("attention_factor"),
        mscale=read.optional_number("mscale"),
        mscale_all_dim=read.optional_number("mscale_all_dim"),
        truncate=read.flag("truncate", True),
    )


def _windows(values: Json, read: Values, traits: Traits, num_layers: int, where: str) -> tuple[int, ...]:
    """Return each layer's sliding window, 0 for none."""
    no_window = values.get("sliding_window") is None or traits.windows == "none"
    if no_window or (traits.windows in ("switched", "some") and not read.flag("use_sliding_window")):
        return (0,) * num_layers
    window = read.integer("sliding_window")
    if window < 1:
        raise ModelError(f"{where}: sliding_window is {window}, expected at least 1")
    if traits.windows != "some":
        return (window,) * num_layers
    kinds = values.get("layer_types")
    if kinds is None:
        first = read.integer("max_window_layers")
        kinds = ["full_attention" if layer < first else "sliding_attention" for layer in range(num_layers)]
    if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ModelError(f"{where}: layer_types must name full_attention or sliding_attention for each layer")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
