"""A decoder that computes with the modules of transformers, over the paged cache of a device.

It serves what has no description here. Transformers lets a model's attention be a registered function: this one's
writes keys and values to the cache and attends over it with the operations that all models are written in. The rest
of a model works on each token by itself; `check` tries whether that is so, and whether a token's bits depend on
those that are computed with it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch.nn.functional import pad

from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.models.rope import make_unrotated
from octavo.gpu_worker.ops import Device, Heads, ModuleOps, StepInput, Value
from octavo.gpu_worker.protocol import BLOCK_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("octavo.worker")

IMPLEMENTATION: Final = "octavo_paged"
"""The name under which attention and masks are registered with transformers."""
TILE_TOKENS: Final = 16
_ATTRIBUTE: Final = "octavo_attention"
# What attention is told besides, and what would change its result: none of it is computed here.
_NOT_COMPUTED = ("softcap", "s_aux", "position_bias", "head_mask", "block_mask")
_PROBED_POSITIONS = (5, (1 << 20) - 1, (1 << 20) + 3)
_CHECKED_TOKENS = 40
_MOST_DIFFERENT = 2e-3  # logits, of the largest one, between two ways of adding the same numbers in float32
_MOST_DIFFERENT_16_BITS = 5e-2


@dataclass(frozen=True)
class LayerAttention:
    """What the attention of a layer is: its heads, the size of its values, and its window, 0 for none."""

    heads: Heads
    value_dim: int
    window: int


@dataclass
class Trace:
    """What a pass through a model's modules shows: the attention of each layer, and how many logits there are."""

    architecture: str
    layers: dict[int, LayerAttention] = field(default_factory=dict)
    vocab_size: int = 0

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None,
        others: dict[str, Any],
    ) -> torch.Tensor:
        """Note a layer; return zeros. Raises ModelError if it is none that the paged cache can hold."""
        del scaling
        if found := [name for name in _NOT_COMPUTED if others.get(name) is not None]:
            raise ModelError(f"its attention uses {found[0]}, which the fallback does not compute")
        layer = int(module.layer_idx)
        if layer in self.layers:
            raise ModelError(f"its layer {layer} attends twice")
        if query.shape[2] != key.shape[2]:
            raise ModelError(f"its layer {layer} attends to other tokens than its own (cross attention)")
        if query.shape[1] % key.shape[1] or key.shape[1] != value.shape[1]:
            raise ModelError(f"its layer {layer} has heads that do not share keys evenly")
        window = others.get("sliding_window") if mask is None else _window_in(mask)
        heads = Heads(query.shape[1], key.shape[1], key.shape[3])
        self.layers[layer] = LayerAttention(heads, value.shape[3], int(window or 0))
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])

    def cache_heads(self) -> Heads:
        """Return the heads of a cache that each layer fits into."""
        heads = [layer.heads for layer in self.layers.values()]
        num_kv_heads = max(each.num_kv_heads for each in heads)
        shared = max(each.num_heads // each.num_kv_heads for each in heads)
        head_dim = max(max(layer.heads.head_dim, layer.value_dim) for layer in self.layers.values())
        return Heads(num_kv_heads * shared, num_kv_heads, head_dim)


def trace(model: Any, num_layers: int, architecture: str) -> Trace:
    """Run a few tokens through a model, which may be on torch's device "meta". Raises ModelError."""
    found = Trace(architecture)
    _bind(model, found)
    device = next(model.parameters()).device
    tokens = torch.zeros(1, TILE_TOKENS, dtype=torch.long, device=device)
    positions = torch.arange(TILE_TOKENS, device=device)[None]
    try:
        with torch.no_grad():
            # With a mask, transformers does not look for several sequences in one row, which "meta" could not tell.
            logits = model(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), position_ids=positions, use_cache=False
            ).logits
    except ModelError as error:
        raise ModelError(f"architecture {architecture} cannot be served: {error}") from None
    if sorted(found.layers) != list(range(num_layers)):
        raise ModelError(
            f"architecture {architecture} cannot be served: {len(found.layers)} of its {num_layers} layers attend "
            "through transformers' attention interface, expected all"
        )
    found.vocab_size = int(logits.shape[-1])
    return found


class ModuleDecoder:
    """A `Model` of modules. Its steps have at most `rows_at_once` tokens, see `steps.tiles`.

    rows_at_once  1 if a token's bits depend on the others of a pass
    """

    def __init__(self, module: Any, traced: Trace, max_positions: int) -> None:
        """module: an instance of a class of transformers, with its weights, that was traced."""
        self.dtype = next(module.parameters()).dtype
        self.num_layers = len(traced.layers)
        self.heads = traced.cache_heads()
        self.vocab_size = traced.vocab_size
        self.rows_at_once = TILE_TOKENS
        self.architecture = traced.architecture
        self._module = module
        self._layers = traced.layers
        self._unrotated = make_unrotated(max_positions)
        self._ops: ModuleOps | None = None
        _bind(module, self)

    def forward(self, ops: ModuleOps) -> Value:
        """Run one step through the modules; return the logits [R, vocab_size]."""
        module = ops.module(self._module)
        token_ids, positions = ops.tokens()
        self._ops = ops
        try:
            logits = module(input_ids=token_ids[None], position_ids=positions[None], use_cache=False).logits[0]
        finally:
            self._ops = None
        return ops.logits(logits, None)

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None,
        others: dict[str, Any],
    ) -> torch.Tensor:
        """Write a layer's keys and values, and attend: [1, tokens, num_heads, value_dim]."""
        del mask, others  # as in the trace
        ops, index = self._ops, int(module.layer_idx)
        assert ops is not None, "attention outside of a step"
        heads, layer = self.heads, self._layers[index]
        shared = layer.heads.num_heads // layer.heads.num_kv_heads
        scale = layer.heads.head_dim**-0.5 if scaling is None else float(scaling)
        queries = query[0].transpose(0, 1).reshape(-1, layer.heads.num_kv_heads, shared, query.shape[3])
        more = (heads.num_kv_heads - layer.heads.num_kv_heads, heads.num_heads // heads.num_kv_heads - shared)
        queries = pad(queries, (0, heads.head_dim - query.shape[3], 0, more[1], 0, more[0])).flatten(1)
        keys, values = (
            pad(each[0].transpose(0, 1), (0, heads.head_dim - each.shape[3], 0, more[0])).flatten(1)
            for each in (key, value)
        )
        qkv = torch.cat([queries, keys, values], dim=1)
        queries = ops.rotary_write_kv(qkv, index, heads, self._unrotated, None, None)
        attended: torch.Tensor = ops.paged_attention(queries, index, heads, scale, layer.window)[: len(qkv)]
        attended = attended.view(len(qkv), heads.num_kv_heads, -1, heads.head_dim)
        attended = attended[:, : layer.heads.num_kv_heads, :shared, : layer.value_dim]
        return attended.flatten(1, 2)[None]

    def check(self, device: Device) -> None:
        """Compare a short text with transformers' own attention, whole and in pieces. Raises ModelError.

        Afterwards the device's cache is to be allocated anew. `rows_at_once` is 1 if that is needed.
        """
        generator = torch.Generator().manual_seed(1)
        count = min(_CHECKED_TOKENS, len(self._unrotated.cos))
        tokens = torch.randint(0, self.vocab_size, (count,), generator=generator).numpy().astype(np.int32)
        device.allocate_kv(3 + count // BLOCK_SIZE)
        pieces = [device.forward(_step(tokens, 0, count // 3)).copy()]
        pieces.append(device.forward(_step(tokens, count // 3, count)).copy())
        paged = np.concatenate(pieces)
        own = self._own_logits(tokens)
        largest = _MOST_DIFFERENT if self.dtype == torch.float32 else _MOST_DIFFERENT_16_BITS
        difference = np.abs(paged - own).max() / max(np.abs(own).max(), 1e-9)
        if not difference <= largest:
            raise ModelError(
                f"architecture {self.architecture} cannot be served: its tokens depend on each other in more than "
                f"causal attention (logits over the paged cache differ by {difference:.1%} from transformers' own)"
            )
        places = range(0, count, 3)
        alone = [device.forward(_step(tokens, place, place + 1)).copy() for place in places]
        if not np.array_equal(np.concatenate(alone), paged[::3]):
            log.info("a token's bits depend on those beside it: tokens are computed one by one, which is slow")
            self.rows_at_once = 1

    def _own_logits(self, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the logits of a text with transformers' own attention."""
        device = next(self._module.parameters()).device
        config = self._module.config
        config._attn_implementation = "eager"
        try:
            ids = torch.from_numpy(tokens).long().to(device)[None]
            with torch.no_grad():
                logits: torch.Tensor = self._module(input_ids=ids, use_cache=False).logits[0].float().cpu()
        finally:
            config._attn_implementation = IMPLEMENTATION
        own: np.ndarray[Any, Any] = logits.numpy()
        return own


def _step(tokens: np.ndarray[Any, Any], start: int, end: int) -> StepInput:
    """Return a step of tokens start .. end of a text that has the blocks from 1 on."""
    positions = np.arange(start, end, dtype=np.int32)
    return StepInput(
        token_ids=tokens[start:end],
        positions=positions,
        slot_mapping=positions + np.int32(BLOCK_SIZE),
        query_start_loc=np.array([0, end - start], np.int32),
        seq_lens=np.array([end], np.int32),
        block_tables=np.arange(1, 2 + len(tokens) // BLOCK_SIZE, dtype=np.int32)[None],
        logits_rows=np.arange(end - start, dtype=np.int32),
    )


def register() -> None:
    """Register attention and masks with transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Hand a layer's attention to whoever the module was bound to. Shapes [1, heads, tokens, head_dim]."""
    bound = getattr(module, _ATTRIBUTE, None)
    if bound is None:
        raise ModelError(f"{type(module).__name__} attends without the number of its layer")
    return bound.attend(module, query, key, value, attention_mask, scaling, others), None


def _mask(
    *, mask_function: Callable[..., torch.Tensor], attention_mask: torch.Tensor | None = None, **_: Any
) -> torch.Tensor:
    """Return a mask that says nothing but the window: attention over the cache is causal by itself.

    Only a trace gives an `attention_mask`, and reads what is returned.
    """
    window = 0 if attention_mask is None else _window_of(mask_function)
    return torch.full((1, 1, 1, 1), window, dtype=torch.long)


def _window_of(mask_function: Callable[..., torch.Tensor]) -> int:
    """Return how many tokens a query sees, 0 for all before it, as several positions show. Raises ModelError."""
    zero, window = torch.tensor(0), 0
    last = _PROBED_POSITIONS[-1]
    for position in (last, *_PROBED_POSITIONS):
        seen = mask_function(zero, zero, torch.tensor(position), torch.arange(position + 2))
        seen = seen.expand(position + 2)
        count = int(seen.sum())
        if position == last:
            window = 0 if count == position + 1 else count
        expected = min(window, position + 1) if window else position + 1
        if count != expected or not bool(seen[position + 1 - expected : position + 1].all()):
            raise ModelError("its attention is neither causal nor causal with a sliding window")
    return window


def _window_in(mask: torch.Tensor) -> int:
    """Return what a mask of `_mask` says."""
    if mask.dtype != torch.long or mask.numel() != 1:
        raise ModelError("it changes its attention masks (ALiBi or other positions in them)")
    return int(mask.flatten()[0])


def _bind(model: Any, target: Trace | ModuleDecoder) -> None:
    """Have `target` attend for all layers of a model."""
    for module in model.modules():
        if getattr(module, "layer_idx", None) is not None:
            setattr(module, _ATTRIBUTE, target)
