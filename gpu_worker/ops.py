"""What a model is written in, and what a device must be able to do.

A model's `forward` (`gpu_worker/models/`) calls the operations of `Ops` and nothing else. The
`reference` device executes each call at once with plain torch. The `cpu` device runs `forward`
once, with an `Ops` that records, and replays the recorded program natively in every step. So a
model is described once, in one file, for every device.

Shapes: T tokens in the step, S sequences, R rows that need logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from octavo.kernels.draw import Draw as Draw
from octavo.kernels.routing import PLAIN_ROUTING, Routing

if TYPE_CHECKING:  # a worker whose weights are packed never needs torch, which takes a second to import
    import torch

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
UInt32Array = npt.NDArray[np.uint32]

# A value inside a forward pass: a tensor where calls are executed, a buffer's number where they
# are recorded. A model only hands values from one operation to the next.
Value = Any

# Of "swigluoai" a gated layer is gate * sigmoid(1.702 * gate) * (up + 1), with a gate of at most 7 and an up within 7.
Activation = Literal["silu", "gelu_tanh", "gelu", "swigluoai"]


@dataclass(frozen=True)
class Module:
    """A linear layer as the checkpoint has it: how many outputs it has, and its name there.

    The name is empty if no adapter can add to it: its outputs are in another order here.
    """

    name: str
    out_features: int


@dataclass(frozen=True)
class Linear:
    """A linear layer: y = x @ weight.T + bias, to which the adapter of a row adds; see `LoraPair`.

    weight      [out_features, in_features], any float type, contiguous
    bias        [out_features] or None
    is_partial  whether the ranks of a split model each have some of its inputs: their results are summed
    modules     what it was joined of, in the order of its outputs; empty if that is not known
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    is_partial: bool = False
    modules: tuple[Module, ...] = ()


@dataclass(frozen=True)
class LoraPair:
    """What an adapter adds to a module's outputs: scale * b @ (a @ x), float32, every value finite.

    a  [rank, in_features]
    b  [out_features, rank]
    """

    module: str
    a: Float32Array
    b: Float32Array
    scale: float


@dataclass(frozen=True)
class Norm:
    """RMSNorm: x / sqrt(mean(x^2) + eps) * weight, in float32. weight [hidden_size]."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean) / sqrt(variance + eps) * weight + bias, in float32. weight [hidden_size], bias the same or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float


@dataclass(frozen=True)
class Heads:
    """Head counts of an attention layer. `num_heads` is a multiple of `num_kv_heads`.

    latent_dim  of a latent cache: a token's one value is the first so many dimensions of its one key; 0: values are
                apart, and as long as keys
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    latent_dim: int = 0

    @property
    def value_dim(self) -> int:
        """Dimensions of a value."""
        return self.latent_dim or self.head_dim

    @property
    def cached_per_token(self) -> int:
        """Numbers that the cache of a layer holds of a token."""
        return self.num_kv_heads * self.head_dim * (1 if self.latent_dim else 2)


@dataclass(frozen=True)
class HeadLinear:
    """A matrix for each head, by which its first dimensions are multiplied; those behind them are kept.

    weight  [num_heads, out_features, in_features], any float type
    """

    weight: torch.Tensor


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: gated layers of one shape, of which each row is computed by a few.

    A row's logits are router(h). Of the first `num_routed` experts it takes the `num_chosen` with the
    highest logits, the lower index on a tie, and weighs them by the softmax over all routed ones, or
    over the chosen ones if `is_normalized`. The other experts are shared: each row takes them all,
    weighed by the sigmoid of its last logit. `routing` says where this is otherwise.

    router    [num_routed, hidden_size], one row more if shared experts have a gate; any float type
    bias      [num_routed] float32, added to scores for the choice; or None
    gate, up  of each expert [intermediate_size, hidden_size], any float type
    down      of each expert [hidden_size, intermediate_size]
    router_bias  [rows of the router] or None
    biases       [num_experts, 2 * intermediate_size], gate and then up, and [num_experts, hidden_size]; or None
    """

    router: torch.Tensor
    gate: tuple[torch.Tensor, ...]
    up: tuple[torch.Tensor, ...]
    down: tuple[torch.Tensor, ...]
    num_chosen: int
    num_shared: int
    is_normalized: bool
    routing: Routing = PLAIN_ROUTING
    bias: torch.Tensor | None = None
    router_bias: torch.Tensor | None = None
    biases: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def has_shared_logit(self) -> bool:
        """Whether the router has a row for what shared experts are weighed by."""
        return self.num_shared > 0 and self.routing.has_shared_gate

    @property
    def num_routed(self) -> int:
        """Experts that rows choose from."""
        return len(self.gate) - self.num_shared


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding, rotating halves (the Hugging Face layout), not pairs.

    cos, sin  [max_positions, rotary_dim / 2] float32, attention scaling included. The first
              `rotary_dim` of each head's dimensions are rotated: dimension i with
              i + rotary_dim / 2.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    rotary_dim: int


@dataclass(frozen=True)
class StepInput:
    """One ragged batch: prefill chunks and decodes mixed, row after row. All arrays contiguous.

    token_ids        [T] token to compute at each place
    positions        [T] its absolute position in its sequence
    slot_mapping     [G * T] where its key and value go in each KV group: block_id * 16 + offset
    query_start_loc  [S + 1] row s owns tokens query_start_loc[s] .. query_start_loc[s + 1]
    seq_lens         [S] tokens of each sequence whose keys exist after this step
    block_tables     [G * S, max_blocks] block ids of each sequence, group after group, 0 beyond its end and where a
                     group's window no longer reaches
    logits_rows      [R] tokens (indexes into T) whose logits, or hidden states, are wanted, ascending
    segments         [T] 0 or 1: which of two texts a token is of; None if no sequence has two
    adapter_ids      [T] the adapter of each token's row, 0 for none; None if no row has one
    """

    token_ids: Int32Array
    positions: Int32Array
    slot_mapping: Int32Array
    query_start_loc: Int32Array
    seq_lens: Int32Array
    block_tables: Int32Array
    logits_rows: Int32Array
    segments: Int32Array | None = None
    adapter_ids: Int32Array | None = None


class Ops(Protocol):
    """The operations that forward passes are written in. The residual stream is float32 everywhere.

    A device may join neighbours, such as a norm and the layers that read it, or a layer and the sum that takes it.
    So a value is used up by what it goes into, but for the residual stream and a norm's result: the first is read
    until something is added to it, the second by any number of layers before that.
    """

    def embed(self, table: torch.Tensor, scale: float = 1.0) -> Value:
        """Look up the step's tokens in `table` [vocab_size, hidden_size]; return them, times `scale`: [T, hidden_size].

        `scale` is rounded to float32.
        """

    def norm(self, x: Value, norm: Norm) -> Value:
        """Norm each row of `x`: [T, hidden_size]."""

    def linear(self, x: Value, linear: Linear) -> Value:
        """Multiply each row of `x`, and add what its adapter adds: [T, out_features]. So do others that take a layer.

        The base's product is the same for all rows. A row's bits depend on its own adapter alone.
        """

    def gated_linear(self, x: Value, gate: Linear, up: Linear, activation: Activation) -> Value:
        """Return activation(gate(x)) * up(x): [T, intermediate_size]."""

    def add(self, residual: Value, x: Value) -> Value:
        """Return residual + x. The old residual must not be used afterwards."""

    def add_experts(self, residual: Value, x: Value, experts: Experts, activation: Activation) -> Value:
        """Return residual + the weighted sum of down(activation(gate(x)) * up(x)) over a row's experts.

        The terms are added in the order of the experts, to the residual first. The old residual must not be used
        afterwards.
        """

    def rotary_write_kv(
        self, qkv: Value, layer: int, heads: Heads, rotary: Rotary, q_norm: Norm | None, k_norm: Norm | None
    ) -> Value:
        """Norm (if given) and rotate queries and keys, write keys and values to the cache.

        A norm whose weight is [head_dim] is that of each head, one of [heads * head_dim] that of all of them at once.

        `qkv` is [T, (num_heads + 2 * num_kv_heads) * head_dim]: queries, keys, values.
        Returns the queries, [T, num_heads * head_dim].
        """

    def paged_attention(
        self,
        queries: Value,
        layer: int,
        heads: Heads,
        scale: float,
        window: int,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> Value:
        """Attend causally over the cache of `layer`; return [T, num_heads * value_dim].

        With window > 0 a query at position p sees positions p - window + 1 .. p, else 0 .. p. With soft_cap > 0
        scaled scores x become soft_cap * tanh(x / soft_cap). Each of `sinks` [num_heads] is one more score of its
        head's queries, which takes its share of the softmax and has no value.
        """

    def logits(self, x: Value, head: Linear | None, soft_cap: float = 0.0) -> Value:
        """Return head(x) of the rows in `logits_rows`: [R, vocab_size] float32. `x` is a norm's result.

        With soft_cap > 0 logits are capped as the scores of attention are.
        Without a head that is x, the hidden states that vectors are made of: [R, hidden_size].
        """


class LatentOps(Ops, Protocol):
    """What models with a latent cache need besides."""

    def rotate_queries(self, queries: Value, num_heads: int, rotary: Rotary) -> Value:
        """Rotate the last `rotary_dim` dimensions of each head of `queries`, a layer's result; return them all."""

    def write_latent(self, latent: Value, layer: int, heads: Heads, rotary: Rotary, norm: Norm) -> None:
        """Write keys of a latent cache: `latent` [T, head_dim], its first `latent_dim` normed and the others rotated.

        It is a layer's result.
        """

    def head_linear(self, x: Value, linear: HeadLinear) -> Value:
        """Multiply the first `in_features` of each head of `x`; return these and what is behind them, head by head.

        `x` is what `rotate_queries` or `paged_attention` returned.
        """


class ModuleOps(Ops, Protocol):
    """What models that compute with modules of torch need besides. Their values are tensors of so many rows.

    `logits` without a head returns the rows in `logits_rows` of logits that such a module made.
    """

    def module(self, module: Any) -> Any:
        """Return a module with its weights where it is computed, and of the type that is computed in."""

    def tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens and their positions, both int64, padded to as many rows as values have."""


class EncoderOps(Protocol):
    """Operations of models in which all tokens of a sequence see each other. Values are float32.

    A sequence is computed whole, in one step, and nothing of it is kept: there is no cache.
    """

    def embed(self, table: torch.Tensor) -> Value:
        """Look up the step's tokens in `table` [vocab_size, hidden_size]; return [T, hidden_size]."""

    def embed_sum(self, words: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor) -> Value:
        """Return the sum of a token's rows of three tables, by its id, its position and its segment: [T, hidden_size].

        words [vocab_size, hidden_size], positions [max_positions, ..], segments [1 or 2, ..]; with one row it is
        that of every token.
        """

    def layer_norm(self, x: Value, norm: LayerNorm) -> Value:
        """Return norm(x): [T, hidden_size]."""

    def linear(self, x: Value, linear: Linear, activation: Activation | None = None) -> Value:
        """Return activation(linear(x)): [T, out_features]."""

    def linear_residual(self, x: Value, linear: Linear, residual: Value) -> Value:
        """Return residual + linear(x). The old residual must not be used afterwards."""

    def gated_linear(self, x: Value, gate: Linear, up: Linear, activation: Activation) -> Value:
        """Return activation(gate(x)) * up(x): [T, intermediate_size]."""

    def rotate(
        self, qkv: Value, heads: Heads, rotary: Rotary, q_norm: Norm | None = None, k_norm: Norm | None = None
    ) -> Value:
        """Return `qkv` with its queries and keys normed (if given) and rotated by their positions.

        `qkv` is [T, (num_heads + 2 * num_kv_heads) * head_dim]: queries, keys, values. The old one must not be used
        afterwards.
        """

    def self_attention(self, qkv: Value, heads: Heads, scale: float, reach: int = 0) -> Value:
        """Attend among all tokens of each sequence; return [T, num_heads * head_dim].

        `qkv` is [T, (num_heads + 2 * num_kv_heads) * head_dim]: queries, keys, values. With reach > 0 a token sees
        only those at most `reach` places away from it.
        """

    def hidden(self, x: Value) -> Value:
        """Return x of the rows in `logits_rows`: [R, hidden_size] float32."""


class Model(Protocol):
    """A model: weights and the forward pass over them.

    dtype        type of its embeddings, which is what a GPU computes in
    num_layers   layers that have a KV cache; 0 for a model in which all tokens of a sequence see each other
    """

    dtype: torch.dtype
    num_layers: int
    heads: Heads
    vocab_size: int

    def forward(self, ops: Ops) -> Value:
        """Run one step through `ops`; return the logits [R, vocab_size] or hidden states [R, hidden_size]."""


@runtime_checkable
class CheckedModel(Protocol):
    """A model that tries out on its device whether what it computes is right, before it serves."""

    def check(self, device: Device) -> None:
        """Raise ModelError if it is not. The device's cache is to be allocated anew then."""


class EncoderModel(Protocol):
    """A model in which all tokens of a sequence see each other. As `Model`, with num_layers 0 and hidden states.

    output_size  their columns
    """

    dtype: torch.dtype
    num_layers: int
    heads: Heads
    vocab_size: int
    output_size: int

    def forward(self, ops: EncoderOps) -> Value:
        """Run one step through `ops`; return the hidden states, [R, output_size]."""


class ModuleList:
    """An `Ops` that computes nothing and lists the modules that a model's forward pass goes through.

    shapes  (out_features, in_features) by name
    """

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, int]] = {}

    def add_linear(self, linear: Linear) -> None:
        """List a layer's modules."""
        columns = linear.weight.shape[1]
        self.shapes.update({module.name: (module.out_features, columns) for module in linear.modules if module.name})

    def linear(self, x: Value, linear: Linear) -> None:  # noqa: ARG002
        """See `Ops`."""
        self.add_linear(linear)

    def gated_linear(self, x: Value, gate: Linear, up: Linear, activation: Activation) -> None:  # noqa: ARG002
        """See `Ops`."""
        self.add_linear(gate)
        self.add_linear(up)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None  # all other operations


@dataclass(frozen=True)
class KvGroups:
    """How the layers are cut into groups of equal size, each with a window and a block table.

    windows     of each group; 0: its layers see all
    places      of each layer, its group and which one of the group it is
    num_layers  of a group, the last one of a window may have fewer
    """

    windows: tuple[int, ...]
    places: tuple[tuple[int, int], ...]
    num_layers: int


class _LayerWindows(ModuleList):
    """Lists the window of each layer that a forward pass goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.of_layer: dict[int, int] = {}

    def paged_attention(self, queries: Value, layer: int, heads: Heads, scale: float, window: int, *_: Any) -> None:  # noqa: ARG002
        """See `Ops`."""
        self.of_layer[layer] = window


def kv_groups_of(model: Model | EncoderModel, most: int) -> KvGroups:
    """Cut a model's layers into at most `most` groups; into one where most of the pages would not be of use."""
    num_layers = model.num_layers
    one = KvGroups((0,), tuple((0, layer) for layer in range(num_layers)), num_layers)
    if most < 2 or num_layers == 0 or model.heads.latent_dim or isinstance(model, CheckedModel):
        return one
    listed = _LayerWindows()
    cast(Model, model).forward(listed)
    layers: dict[int, list[int]] = {}
    for layer in range(num_layers):
        layers.setdefault(listed.of_layer.get(layer, 0), []).append(layer)
    for size in range(min(map(len, layers.values())), num_layers):
        parts = [
            (window, all_[at : at + size])
            for window, all_ in sorted(layers.items())
            for at in range(0, len(all_), size)
        ]
        if len(parts) <= most and 8 * size * len(parts) <= 9 * num_layers:
            places = {layer: (group, at) for group, (_, part) in enumerate(parts) for at, layer in enumerate(part)}
            return KvGroups(tuple(window for window, _ in parts), tuple(places[n] for n in range(num_layers)), size)
    return one if len(layers) > 1 else KvGroups(tuple(layers), one.places, num_layers)


class NoAdapters:
    """The part of a device, or of a runner, that takes no adapters."""

    def adapter_modules(self) -> dict[str, tuple[int, int]]:
        """There are none."""
        return {}

    def pack_adapter(self, pairs: Iterable[LoraPair]) -> Any:  # noqa: ARG002
        """Never called."""
        raise AssertionError("takes no adapters")

    def set_adapter(self, adapter_id: int, packed: Any | None) -> None:  # noqa: ARG002
        """Never called with an adapter."""
        assert packed is None, "takes no adapters"


class Device(Protocol):
    """Executes steps. Built by `gpu_worker/devices/__init__.py` from a Model.

    The constructor of each device takes (model, max_batch_tokens, max_running, max_blocks_per_sequence).
    """

    name: str
    kv_windows: tuple[int, ...]
    """The window of each KV group."""

    def kv_block_bytes(self) -> int:
        """Bytes that one block of 16 tokens takes, over all layers of a KV group, keys and values."""

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocate the zeroed cache, block 0 (never read as data) included. Called once."""

    def touch_kv(self) -> bool:
        """Have the system give the memory of one more piece of the cache, which a first write would wait for.

        Changes nothing in it. Called between steps; takes a few milliseconds at most. False if no piece is left.
        """

    def forward(self, step: StepInput) -> Float32Array:
        """Run one step; return logits [R, vocab_size] or hidden states, valid until the next call.

        A row's bits depend only on its sequence's tokens: not on what else is in the step, not on
        how its prompt was chunked, not on which blocks it has. The caller may change the logits
        in place.

        In each layer the keys and values of all tokens are written before any are read: a sequence may have blocks
        that another one fills in this step.
        """

    def progress(self) -> int:
        """A number that grows with every piece of `forward` that is done; for any thread, also while it runs."""

    def copy_blocks(self, pairs: Int32Array) -> None:
        """Copy blocks, pairs [N, 2] of (from, to), in order."""

    def adapter_modules(self) -> dict[str, tuple[int, int]]:
        """Return (out_features, in_features) of the modules that adapters can add to; empty: it takes no adapters."""

    def pack_adapter(self, pairs: Iterable[LoraPair]) -> Any:
        """Return an adapter in the form that the device computes with. Called by any thread, also while steps run."""

    def set_adapter(self, adapter_id: int, packed: Any | None) -> None:
        """Have rows of `adapter_id`, at least 1, take a packed adapter from now on; None: no row may have it."""

    def mask(self, row: Float32Array, allowed: UInt32Array) -> None:
        """Set the logits of `row` [vocab_size] to -inf whose bit is not set, in place.

        allowed  [ceil(vocab_size / 32)] bit t % 32 of word t // 32 stands for token t
        """

    def argmax(self, logits: Float32Array) -> Int32Array:
        """Return the lowest id of the highest logit of each row of `logits` [N, vocab_size]: [N].

        A row with NaN or +inf in it, or with nothing but -inf, gives -1. What `forward` returned is asked for as it
        was: a device may have found the ids while it computed the logits.
        """

    def draw(self, logits: Float32Array, draws: list[Draw]) -> Int32Array:
        """Draw a token for each row of processed `logits` [N, vocab_size]; return [N].

        Rows are independent. Logits of -inf are never drawn.
        """
