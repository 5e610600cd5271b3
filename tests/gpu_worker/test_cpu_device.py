from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from octavo.gpu_worker.devices.cpu.device import CpuDevice
from octavo.gpu_worker.ops import Activation, Draw, Experts, Heads, Linear, Norm, Ops, Rotary, StepInput, Value
from octavo.gpu_worker.quantization import Quantization
from octavo.gpu_worker.sampling.draw import best_tokens
from octavo.kernels.cpu import library
from octavo.kernels.cpu.packing import Packer

BLOCK_TOKENS = 16
MAX_TOKENS = 512
MAX_SEQUENCES = 40
MAX_BLOCKS = 80
NUM_BLOCKS = 400
# Some multiply bytes faster than another and bf16 the same: test_cpu_quantization.py has them.
VARIANTS = [variant for variant in library.runnable_variants() if not variant.endswith("_vnni")]
DEFAULT_HEADS = Heads(num_heads=4, num_kv_heads=2, head_dim=16)


@dataclass(frozen=True)
class Shape:
    hidden: int = 64
    intermediate: int = 96
    vocab: int = 128
    heads: Heads = DEFAULT_HEADS
    rotary_dim: int = 16
    window: int = 0
    bias: bool = False
    qk_norm: bool = False
    activation: Activation = "silu"
    layers: int = 2
    post_norms: bool = False  # of what a layer adds
    embedding_scale: float = 1.0
    norms_row: bool = False  # of the heads' norms: all heads of a token at once
    soft_cap: float = 0.0
    has_sinks: bool = False


SHAPES = {
    "plain": Shape(),
    "wide": Shape(intermediate=1301),
    "wide, bias": Shape(intermediate=1301, bias=True),
    "odd sizes": Shape(hidden=77, intermediate=101, vocab=131, bias=True),
    "group of 3, head_dim 64": Shape(hidden=96, heads=Heads(9, 3, 64), rotary_dim=64),
    "group of 14": Shape(heads=Heads(14, 1, 32), rotary_dim=32),
    "no sharing, head_dim 80, partial rotary": Shape(heads=Heads(3, 3, 80), rotary_dim=40, bias=True),
    "head_dim 256, gelu": Shape(heads=Heads(4, 2, 256), rotary_dim=256, activation="gelu_tanh"),
    "head_dim 128, qk norm": Shape(hidden=160, heads=Heads(8, 2, 128), rotary_dim=128, qk_norm=True),
    "window across tiles": Shape(window=37, heads=Heads(8, 2, 32), rotary_dim=32),
    "norms of what is added, scaled embedding": Shape(
        hidden=80,
        intermediate=224,
        heads=Heads(4, 1, 32),
        rotary_dim=32,
        qk_norm=True,
        post_norms=True,
        embedding_scale=8.9,
        activation="gelu_tanh",
        layers=3,
    ),
    "norms over all heads, odd sizes": Shape(heads=Heads(3, 1, 48), rotary_dim=18, qk_norm=True, norms_row=True),
    "norms over all heads, a wide row": Shape(heads=Heads(16, 4, 80), rotary_dim=80, qk_norm=True, norms_row=True),
    "head_dim 48, odd rotary, window of one block": Shape(heads=Heads(2, 1, 48), rotary_dim=18, window=16),
    "sinks, a clamped gate, window": Shape(
        heads=Heads(6, 2, 32), rotary_dim=32, window=37, has_sinks=True, activation="swigluoai", bias=True
    ),
    "soft caps, odd vocabulary": Shape(heads=Heads(4, 2, 32), rotary_dim=32, vocab=131, soft_cap=0.7),
}


class TinyModel:
    """A model of any shape with random bf16 weights."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        self.shape = shape
        self.num_layers, self.heads, self.vocab_size = shape.layers, shape.heads, shape.vocab
        self._generator = torch.Generator().manual_seed(seed)
        q_size = self.heads.num_heads * self.heads.head_dim
        qkv_size = q_size + 2 * self.heads.num_kv_heads * self.heads.head_dim
        self.embedding = self._random(shape.vocab, shape.hidden)
        angles = torch.outer(torch.arange(MAX_BLOCKS * BLOCK_TOKENS), 0.7 ** torch.arange(shape.rotary_dim // 2))
        self.rotary = Rotary(angles.cos(), angles.sin(), shape.rotary_dim)
        self.layers = [
            {
                "qkv": self._linear(qkv_size, shape.hidden),
                "output": self._linear(shape.hidden, q_size),
                "gate": self._linear(shape.intermediate, shape.hidden),
                "up": self._linear(shape.intermediate, shape.hidden),
                "down": self._linear(shape.hidden, shape.intermediate),
                "norm": self._norm(shape.hidden),
                "post_norm": self._norm(shape.hidden) if shape.post_norms else None,
                "q_norm": self._head_norm(self.heads.num_heads) if shape.qk_norm else None,
                "k_norm": self._head_norm(self.heads.num_kv_heads) if shape.qk_norm else None,
                "sinks": 2 * self._random(self.heads.num_heads, 1)[:, 0] if shape.has_sinks else None,
            }
            for _ in range(shape.layers)
        ]
        self.norm = self._norm(shape.hidden)
        self.head = Linear(self._random(shape.vocab, shape.hidden))

    def forward(self, ops: Ops) -> Value:
        x = ops.embed(self.embedding, self.shape.embedding_scale)
        scale = self.heads.head_dim**-0.5
        for index, layer in enumerate(self.layers):
            weights: dict[str, Any] = layer
            qkv = ops.linear(ops.norm(x, weights["norm"]), weights["qkv"])
            queries = ops.rotary_write_kv(qkv, index, self.heads, self.rotary, weights["q_norm"], weights["k_norm"])
            attended = ops.paged_attention(
                queries, index, self.heads, scale, self.shape.window, self.shape.soft_cap, weights["sinks"]
            )
            x = ops.add(x, self._normed(ops, ops.linear(attended, weights["output"]), weights["post_norm"]))
            gated = ops.gated_linear(
                ops.norm(x, weights["norm"]), weights["gate"], weights["up"], self.shape.activation
            )
            x = ops.add(x, self._normed(ops, ops.linear(gated, weights["down"]), weights["post_norm"]))
        return ops.logits(ops.norm(x, self.norm), self.head, self.shape.soft_cap)

    @staticmethod
    def _normed(ops: Ops, x: Value, norm: Norm | None) -> Value:
        return x if norm is None else ops.norm(x, norm)

    def _random(self, *shape: int) -> torch.Tensor:
        weights: torch.Tensor = (torch.randn(*shape, generator=self._generator) * shape[-1] ** -0.5).to(torch.bfloat16)
        return weights

    def _linear(self, rows: int, columns: int) -> Linear:
        return Linear(self._random(rows, columns), self._random(rows) if self.shape.bias else None)

    def _head_norm(self, count: int) -> Norm:
        return self._norm(self.heads.head_dim * (count if self.shape.norms_row else 1))

    def _norm(self, size: int) -> Norm:
        return Norm(1 + 0.1 * torch.randn(size, generator=self._generator), 1e-5)


class WholeSequenceOps:
    """Plain torch over all tokens of one sequence, without a cache; rounds to bf16 where the device does."""

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids = token_ids
        self.keys = self.values = torch.empty(0)
        # For each row, by how much the last expert that it takes is ahead of the first that it does not.
        self.choice_margins = torch.full([len(token_ids)], torch.inf)

    def embed(self, table: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return table[self.token_ids].float() * scale

    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        return self._norm(x, norm)

    def linear(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        return self._linear(_rounded(x), linear)

    def add(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return residual + x

    def rotary_write_kv(
        self, qkv: torch.Tensor, layer: int, heads: Heads, rotary: Rotary, q_norm: Norm | None, k_norm: Norm | None
    ) -> torch.Tensor:
        counts = [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads]
        parts = torch.split(qkv.view(len(qkv), -1, heads.head_dim), counts, dim=1)
        queries, keys = (
            _rounded(self._rotate(part if norm is None else self._norm_heads(part, norm), rotary))
            for part, norm in zip(parts, (q_norm, k_norm), strict=False)
        )
        group = heads.num_heads // heads.num_kv_heads
        self.keys = keys.repeat_interleave(group, 1)
        self.values = _rounded(parts[2]).repeat_interleave(group, 1)
        return queries

    def _norm_heads(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        is_of_head = norm.weight.numel() == x.shape[-1]
        return self._norm(x, norm) if is_of_head else self._norm(x.flatten(1), norm).view(x.shape)

    def paged_attention(
        self,
        queries: torch.Tensor,
        layer: int,
        heads: Heads,
        scale: float,
        window: int,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        scores = capped(torch.einsum("qhd,khd->hqk", queries, self.keys) * scale, soft_cap)
        age = torch.arange(len(queries))[:, None] - torch.arange(len(queries))
        hidden = (age < 0) | (age >= window if window else torch.tensor(False))
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.float().view(-1, 1, 1).expand(-1, len(queries), 1)], -1)
        weights = scores.softmax(-1)[..., : len(queries)]
        return _rounded(torch.einsum("hqk,khd->qhd", weights, self.values)).flatten(1)

    def gated_linear(self, x: torch.Tensor, gate: Linear, up: Linear, activation: Activation) -> torch.Tensor:
        h = _rounded(x)
        gated = self._linear(h, gate)
        if activation == "swigluoai":
            gated, active = gated.clamp(max=7), self._linear(h, up).clamp(-7, 7) + 1
            return _rounded(gated * torch.sigmoid(1.702 * gated) * active)
        active = torch.nn.functional.silu(gated)
        if activation == "gelu_tanh":
            active = torch.nn.functional.gelu(gated, approximate="tanh")
        return _rounded(active * self._linear(h, up))

    def add_experts(
        self, residual: torch.Tensor, x: torch.Tensor, experts: Experts, activation: Activation
    ) -> torch.Tensor:
        h = _rounded(x)
        logits = self._linear(h, Linear(experts.router, experts.router_bias))
        routed, shared = logits[:, : experts.num_routed], logits[:, experts.num_routed :]
        routing = experts.routing
        scores = routed.sigmoid() if routing.scores == "sigmoid" else routed.softmax(-1)
        by_score = experts.bias is not None or routing.num_groups > 1
        choices = scores if by_score else routed
        if experts.bias is not None:
            choices = choices + experts.bias
        if routing.num_groups > 1:
            groups = choices.reshape(len(choices), routing.num_groups, -1)
            best = groups.topk(routing.num_best).values.sum(-1).sort(descending=True)
            last = routing.num_chosen_groups
            margins = best.values[:, last - 1] - best.values[:, last]
            self.choice_margins = torch.minimum(self.choice_margins, margins)
            outside = torch.ones(groups.shape[:2], dtype=torch.bool).scatter_(1, best.indices[:, :last], False)
            choices = groups.masked_fill(outside[..., None], -torch.inf).flatten(1)
        order = choices.sort(descending=True)
        chosen = torch.zeros_like(routed).scatter_(1, order.indices[:, : experts.num_chosen], 1.0)
        if experts.num_chosen < experts.num_routed:
            margins = order.values[:, experts.num_chosen - 1] - order.values[:, experts.num_chosen]
            self.choice_margins = torch.minimum(self.choice_margins, margins)
        weights = scores * chosen
        if experts.is_normalized:
            weights /= weights.sum(-1, keepdim=True)
        weights = weights * routing.scale
        shared = shared.sigmoid() if routing.has_shared_gate else torch.ones(len(weights), 1)
        weights = torch.cat([weights, shared.repeat(1, experts.num_shared)], 1)
        total = residual
        inner, hidden = experts.gate[0].shape
        biases = experts.biases or (torch.zeros(len(weights.T), 2 * inner), torch.zeros(len(weights.T), hidden))
        for weight, gate, up, down, gate_up_bias, down_bias in zip(
            weights.T, experts.gate, experts.up, experts.down, *biases, strict=True
        ):
            gate_bias, up_bias = gate_up_bias.chunk(2)
            gated = self.gated_linear(x, Linear(gate, gate_bias), Linear(up, up_bias), activation)
            total = total + weight[:, None] * self._linear(gated, Linear(down, down_bias))
        return total

    def logits(self, x: torch.Tensor, head: Linear, soft_cap: float = 0.0) -> torch.Tensor:
        return capped(self.linear(x, head), soft_cap)

    @staticmethod
    def _norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight

    @staticmethod
    def _linear(x: torch.Tensor, linear: Linear) -> torch.Tensor:
        return torch.nn.functional.linear(
            x, linear.weight.float(), None if linear.bias is None else linear.bias.float()
        )

    @staticmethod
    def _rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        half = rotary.rotary_dim // 2
        one, two, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], dim=-1)
        cos, sin = rotary.cos[: len(x), None], rotary.sin[: len(x), None]
        return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], dim=-1)


def capped(x: torch.Tensor, cap: float) -> torch.Tensor:
    return torch.tanh(x / cap) * cap if cap else x


def _rounded(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).float()


@dataclass
class Sequence:
    """Tokens, the blocks that hold them, and how many of them are computed."""

    token_ids: list[int]
    blocks: list[int]
    computed: int = 0


def make_sequence(seed: int, length: int, blocks: list[int]) -> Sequence:
    return Sequence(np.random.default_rng(seed).integers(0, 128, length).tolist(), blocks)


def make_step(parts: list[tuple[Sequence, int]]) -> StepInput:
    """Return a step of the next so many tokens of each sequence, with logits of all of them."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    block_tables = np.zeros((len(parts), MAX_BLOCKS), np.int32)
    for row, (sequence, count) in enumerate(parts):
        new = range(sequence.computed, sequence.computed + count)
        token_ids += [sequence.token_ids[p] for p in new]
        positions += new
        slots += [sequence.blocks[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS for p in new]
        starts.append(len(token_ids))
        block_tables[row, : len(sequence.blocks)] = sequence.blocks
    seq_lens = [sequence.computed + count for sequence, count in parts]
    columns = (token_ids, positions, slots, starts, seq_lens, block_tables, range(len(token_ids)))
    return StepInput(*(np.array(column, dtype=np.int32) for column in columns))


def run(device: CpuDevice, parts: list[tuple[Sequence, int]]) -> list[torch.Tensor]:
    """Run a step; return the logits of each sequence's new tokens."""
    logits = torch.from_numpy(device.forward(make_step(parts)).copy())
    for sequence, count in parts:
        sequence.computed += count
    return list(torch.split(logits, [count for _, count in parts]))


def run_in_chunks(device: CpuDevice, sequence: Sequence, chunk: int) -> torch.Tensor:
    """Compute a whole sequence alone; return the logits of all its tokens."""
    outputs = []
    while sequence.computed < len(sequence.token_ids):
        outputs += run(device, [(sequence, min(chunk, len(sequence.token_ids) - sequence.computed))])
    return torch.cat(outputs)


def make_device(model: TinyModel, variant: str = "", num_threads: int = 2) -> CpuDevice:
    device = CpuDevice(model, MAX_TOKENS, MAX_SEQUENCES, MAX_BLOCKS, num_threads=num_threads, variant=variant)
    device.allocate_kv(NUM_BLOCKS)
    return device


def shuffled_blocks(seed: int) -> list[int]:
    return [int(block) for block in np.random.default_rng(seed).permutation(np.arange(1, NUM_BLOCKS))[:MAX_BLOCKS]]


@pytest.fixture(scope="module")
def invariance_model() -> TinyModel:
    return TinyModel(Shape(hidden=112, intermediate=700, heads=Heads(6, 2, 32), rotary_dim=32, bias=True))


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_of_plain_torch(name: str, variant: str) -> None:
    model = TinyModel(SHAPES[name])
    device = make_device(model, variant)
    sequence = make_sequence(1, 150, shuffled_blocks(1))

    logits = torch.cat([*run(device, [(sequence, 141)]), run_in_chunks(device, sequence, 1)])

    expected = model.forward(WholeSequenceOps(sequence.token_ids))
    assert expected.std() > 0.3
    torch.testing.assert_close(logits, expected, atol=0.06, rtol=0.03)
    assert (logits - expected).square().mean().sqrt() < 0.01 * expected.std()


def test_scores_may_exceed_those_of_earlier_keys_by_far(variant: str) -> None:
    model = TinyModel(replace(SHAPES["group of 3, head_dim 64"], layers=1))
    model.layers[0]["qkv"].weight[: (9 + 3) * 64] *= 16  # queries and keys
    device = make_device(model, variant)
    sequence = make_sequence(1, 400, shuffled_blocks(1))

    logits = run_in_chunks(device, sequence, 400)

    expected = model.forward(WholeSequenceOps(sequence.token_ids))
    assert (logits - expected).square().mean().sqrt() < 0.002 * expected.std()
    sequence.computed = 0
    assert torch.equal(run_in_chunks(device, sequence, 1), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_any_float_type_are_packed(dtype: torch.dtype) -> None:
    model = TinyModel(SHAPES["odd sizes"])
    expected = run_in_chunks(make_device(model), make_sequence(1, 20, [3, 1]), 20)

    def cast(linear: Linear) -> Linear:
        return Linear(linear.weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype))

    for layer in model.layers:
        layer.update({name: cast(value) for name, value in layer.items() if isinstance(value, Linear)})
    model.embedding, model.head = model.embedding.to(dtype), cast(model.head)
    logits = run_in_chunks(make_device(model), make_sequence(1, 20, [3, 1]), 20)

    if dtype == torch.float16:  # the smallest bf16 weights are rounded in float16
        torch.testing.assert_close(logits, expected, atol=0.02, rtol=0.01)
    else:
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("name", ["plain", "odd sizes"])
def test_a_tied_embedding_is_read_from_the_head(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TinyModel(SHAPES[name])
    model.head = Linear(model.embedding.clone())
    stored: list[torch.Tensor] = []
    store_rows = Packer.store_rows
    monkeypatch.setattr(Packer, "store_rows", lambda self, table: stored.append(table) or store_rows(self, table))
    expected = run_in_chunks(make_device(model), make_sequence(1, 20, [3, 1]), 20)
    assert len(stored) == 1

    model.head = Linear(model.embedding)
    device = make_device(model)

    assert len(stored) == 1

    assert torch.equal(run_in_chunks(device, make_sequence(1, 20, [3, 1]), 20), expected)


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_bits_do_not_depend_on_how_a_prompt_is_chunked(invariance_model: TinyModel, variant: str, chunk: int) -> None:
    device = make_device(invariance_model, variant)
    whole = run_in_chunks(device, make_sequence(1, 200, shuffled_blocks(1)), 200)

    chunked = run_in_chunks(device, make_sequence(1, 200, shuffled_blocks(2)), chunk)

    assert torch.equal(chunked, whole)


@pytest.mark.parametrize("head_dim", [16, 48, 80, 128, 256])
def test_nor_do_they_with_heads_of_any_size(variant: str, head_dim: int) -> None:
    model = TinyModel(Shape(hidden=64, intermediate=96, heads=Heads(4, 2, head_dim), rotary_dim=16))
    device = make_device(model, variant)
    whole = run_in_chunks(device, make_sequence(1, 150, shuffled_blocks(1)), 150)

    one_by_one = run_in_chunks(device, make_sequence(1, 150, shuffled_blocks(2)), 1)

    assert torch.equal(one_by_one, whole)


@pytest.mark.parametrize("window", [0, 1100])
def test_nor_do_they_where_keys_are_read_a_few_pieces_at_a_time(variant: str, window: int) -> None:
    model = TinyModel(Shape(heads=Heads(6, 2, 256), rotary_dim=16, layers=1, window=window, has_sinks=True))
    device = make_device(model, variant)
    length = MAX_BLOCKS * BLOCK_TOKENS  # more keys and values of a head than stay in a cache
    whole = run_in_chunks(device, make_sequence(1, length, shuffled_blocks(1)), MAX_TOKENS)

    one_by_one = run_in_chunks(device, make_sequence(1, length, shuffled_blocks(2)), 1)

    assert torch.equal(one_by_one, whole)


def test_nor_do_they_where_products_of_attention_underflow(variant: str) -> None:
    model = TinyModel(Shape(hidden=112, intermediate=700, heads=Heads(6, 2, 32), rotary_dim=32))
    for layer in model.layers:
        layer["qkv"].weight[-2 * 32 :] *= 2.0**-122  # the values'
        layer["output"].weight.mul_(2.0**122)
    device = make_device(model, variant)
    whole = run_in_chunks(device, make_sequence(1, 100, shuffled_blocks(1)), 100)

    one_by_one = run_in_chunks(device, make_sequence(1, 100, shuffled_blocks(2)), 1)

    assert torch.equal(one_by_one, whole)


@pytest.mark.parametrize("window", [0, 21])
def test_bits_do_not_depend_on_the_rest_of_the_batch(variant: str, window: int) -> None:
    model = TinyModel(Shape(hidden=112, intermediate=700, heads=Heads(6, 2, 32), rotary_dim=32, window=window))
    device = make_device(model, variant)
    sequences = [make_sequence(seed, 150, [1 + 10 * seed + i for i in range(10)]) for seed in range(32)]
    alone = []
    for sequence in sequences:
        alone.append(run_in_chunks(device, sequence, 150))
        sequence.computed = 0
        sequence.blocks = sequence.blocks[::-1]
    random = np.random.default_rng(0)

    together: list[list[torch.Tensor]] = [[] for _ in sequences]
    while any(s.computed < 150 for s in sequences):
        chosen = [i for i in random.permutation(32) if sequences[i].computed < 150][: random.integers(1, 33)]
        budget, parts = MAX_TOKENS, []
        for i in chosen:  # decodes, and prefill chunks of all lengths
            count = min(150 - sequences[i].computed, int(random.choice([1, 1, 2, 5, 13, 30, 90])), budget)
            if count:
                parts.append((i, count))
                budget -= count
        for (i, _), logits in zip(parts, run(device, [(sequences[i], n) for i, n in parts]), strict=True):
            together[i].append(logits)

    for one, pieces in zip(alone, together, strict=True):
        assert torch.equal(torch.cat(pieces), one)


@pytest.mark.parametrize("reader_goes_first", [False, True])
@pytest.mark.parametrize(("num_filled", "num_own"), [(1, 1), (3, 9), (16, 14), (47, 60)])
def test_a_sequence_may_read_blocks_that_another_one_fills_in_the_same_step(
    variant: str, num_filled: int, num_own: int, reader_goes_first: bool
) -> None:
    device = make_device(TinyModel(Shape(hidden=112, intermediate=700, heads=Heads(6, 2, 32), rotary_dim=32)), variant)
    writer, reader = make_sequence(1, 48, [7, 3, 9]), make_sequence(2, 48 + num_own, [7, 3, 9, *range(20, 26)])
    reader.token_ids[:48] = writer.token_ids
    alone = run_in_chunks(device, replace(reader, blocks=list(range(30, 40))), 48)[48:]
    parts = [(writer, num_filled), (reader, num_own)]

    for _ in range(20):  # a reader that does not wait may be lucky
        device._blocks[writer.blocks] = 0
        writer.computed, reader.computed = 0, 48
        run(device, [(writer, 48 - num_filled)])
        logits = run(device, parts[::-1] if reader_goes_first else parts)

        assert torch.equal(logits[0 if reader_goes_first else 1], alone)


@pytest.mark.parametrize("window", [0, 700])
def test_a_long_context_cut_into_pieces_gives_the_same_bits(variant: str, window: int) -> None:
    model = TinyModel(Shape(hidden=96, heads=Heads(9, 3, 64), rotary_dim=64, window=window))
    sequence = make_sequence(1, 1205, shuffled_blocks(1))
    whole = run_in_chunks(make_device(model, variant, num_threads=1), sequence, 500)  # one thread: never cut
    expected = model.forward(WholeSequenceOps(sequence.token_ids))
    sequence.computed = 0
    device = make_device(model, variant)
    others = [make_sequence(seed, 2, [seed * 100]) for seed in (2, 3)]

    pieces = run_in_chunks(device, replace(sequence, token_ids=sequence.token_ids[:1190]), 500)
    sequence.computed = 1190
    for count in (1, 1, 2):  # few rows of a long context: cut, also beside short sequences
        parts = [(sequence, count)] + [(other, 1) for other in others if other.computed < 2]
        pieces = torch.cat([pieces, run(device, parts)[0]])
    pieces = torch.cat([pieces, run_in_chunks(device, sequence, 3)])

    assert torch.equal(pieces, whole)
    assert (whole - expected)[-200:].square().mean().sqrt() < 0.01 * expected.std()


def test_a_profile_counts_the_phases_of_each_operation(invariance_model: TinyModel) -> None:
    device = make_device(invariance_model)
    device.profile(True)
    run(device, [(make_sequence(1, 3, [1]), 3)])

    profile = device.profile(False)

    counts = {name: phases for name, (_, phases) in profile.items()}
    assert counts == {
        "embed": 1,
        "norm_linear": 2,  # rows so few are normed in the same phase
        "paged_attention": 2,  # and keys written
        "linear_residual": 4,
        "norm_gated_linear": 2,
        "logits": 1,
    }
    assert all(ns > 0 for ns, _ in profile.values())
    run(device, [(make_sequence(1, 3, [1]), 3)])
    assert device.profile(False) == {}


def test_bits_do_not_depend_on_the_number_of_threads(invariance_model: TinyModel) -> None:
    outputs = []
    for num_threads in (1, 2, 5, 64):
        device = make_device(invariance_model, num_threads=num_threads)
        outputs.append(run_in_chunks(device, make_sequence(1, 130, shuffled_blocks(1)), 43))

    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize(("num_threads", "chunk"), [(1, 300), (2, 512)])
def test_nor_do_they_where_each_thread_has_rows_of_its_own(
    invariance_model: TinyModel, variant: str, num_threads: int, chunk: int
) -> None:
    few_rows = run_in_chunks(make_device(invariance_model, variant), make_sequence(1, 520, shuffled_blocks(1)), 130)

    device = make_device(invariance_model, variant, num_threads)
    many_rows = run_in_chunks(device, make_sequence(1, 520, shuffled_blocks(1)), chunk)

    assert torch.equal(many_rows, few_rows)


def test_the_kernels_say_how_many_rows_they_multiply_at_once(invariance_model: TinyModel, variant: str) -> None:
    expected = {"amx": 32, "avx512_bf16": 12, "avx512": 12, "neon_bf16": 6, "neon": 6}

    assert make_device(invariance_model, variant).rows_at_once == expected.get(variant, 4)


def test_a_broken_sequence_leaves_nothing_in_its_blocks_that_spoils_the_next_owner(variant: str) -> None:
    model = TinyModel(Shape())
    model.embedding[5] = torch.nan
    device = make_device(model, variant)
    clean = run_in_chunks(device, make_sequence(1, 3, [1]), 3)
    broken = Sequence([5] * 16, [2])

    assert run_in_chunks(device, broken, 16).isnan().all()
    sequence = make_sequence(1, 3, [2])
    sequence_tokens = [t if t != 5 else 6 for t in sequence.token_ids]
    assert sequence.token_ids == sequence_tokens  # the random prompt is a clean one

    assert torch.equal(run_in_chunks(device, sequence, 3), clean)


@pytest.mark.parametrize("quantization", [Quantization.NONE, Quantization.INT8, Quantization.INT4])
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_broken_token_spoils_no_later_one_in_its_row(quantization: Quantization, is_tied: bool) -> None:
    model = TinyModel(Shape(hidden=80))  # rows have padding
    model.embedding[5] = torch.inf
    if is_tied:
        model.head = Linear(model.embedding)
    device = CpuDevice(model, MAX_TOKENS, MAX_SEQUENCES, MAX_BLOCKS, num_threads=1, quantization=quantization)
    device.allocate_kv(NUM_BLOCKS)

    assert not run(device, [(Sequence([5], [1]), 1)])[0].isfinite().all()

    clean = run(device, [(Sequence([7], [2]), 1)])[0]
    assert clean[:, 8:].isfinite().all()  # a tied head has a logit of the broken token


def test_many_threads_share_the_rows_that_a_layer_reads(invariance_model: TinyModel) -> None:
    """A thread that norms all rows for itself takes the longer, the more rows there are, and the others with it."""
    phases = {}
    for num_threads, num_rows in [(1, 32), (2, 1), (64, 1), (64, 32)]:
        model = TinyModel(Shape(hidden=4096, intermediate=64, layers=1))
        device = make_device(model, num_threads=num_threads)
        device.profile(True)
        run(device, [(make_sequence(row, 1, [row + 1]), 1) for row in range(num_rows)])
        phases[num_threads, num_rows] = device.profile(False).get("prepare", (0, 0))[1]

    assert phases == {(1, 32): 0, (2, 1): 0, (64, 1): 0, (64, 32): 3}  # two layers and the head


def test_a_copied_block_holds_the_same_cache(invariance_model: TinyModel) -> None:
    device = make_device(invariance_model)
    original = make_sequence(1, 40, [5, 6, 7])
    run(device, [(original, 32)])

    device.copy_blocks(np.array([[5, 20], [6, 21], [21, 22]], np.int32))

    copy = replace(original, blocks=[20, 22, 23])
    assert torch.equal(run(device, [(copy, 8)])[0], run(device, [(original, 8)])[0])


def test_logits_may_be_changed_in_place_and_only_wanted_rows_are_computed(invariance_model: TinyModel) -> None:
    device = make_device(invariance_model)
    sequence = make_sequence(1, 10, [1])
    everything = run_in_chunks(device, sequence, 10)
    sequence.computed = 0
    step = replace(make_step([(sequence, 10)]), logits_rows=np.array([2, 9], np.int32))

    device.forward(step).fill(np.nan)

    assert torch.equal(torch.from_numpy(device.forward(step)), everything[[2, 9]])


def test_an_empty_step_gives_no_logits(invariance_model: TinyModel) -> None:
    assert make_device(invariance_model).forward(make_step([])).shape == (0, 128)


def test_a_block_takes_keys_and_values_of_all_layers_in_bf16(invariance_model: TinyModel) -> None:
    device = make_device(invariance_model)

    assert device.kv_block_bytes() == 2 * 2 * 2 * 16 * 32 * 2  # layers, K and V, kv heads, tokens, head_dim, bytes


BAD_STEPS: dict[str, tuple[str, int, int]] = {
    "token above the vocabulary": ("token_ids", 2, 128),
    "negative token": ("token_ids", 0, -1),
    "position beyond the rotary table": ("positions", 1, MAX_BLOCKS * BLOCK_TOKENS),
    "position that is not the sequence's": ("positions", 1, 7),
    "slot beyond the cache": ("slot_mapping", 3, NUM_BLOCKS * BLOCK_TOKENS),
    "negative slot": ("slot_mapping", 3, -1),
    "query_start_loc not from 0": ("query_start_loc", 0, 1),
    "query_start_loc beyond the tokens": ("query_start_loc", 1, 100),
    "query_start_loc falling": ("query_start_loc", 2, 1),
    "sequence longer than its blocks": ("seq_lens", 0, MAX_BLOCKS * BLOCK_TOKENS + 1),
    "sequence shorter than its new tokens": ("seq_lens", 1, 1),
    "negative length": ("seq_lens", 1, -(2**31)),
    "logits of a token that is not there": ("logits_rows", 0, 9),
    "logits of a negative token": ("logits_rows", 0, -1),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_a_bad_index_is_refused_before_anything_is_written(invariance_model: TinyModel, name: str) -> None:
    column, index, value = BAD_STEPS[name]
    device = make_device(invariance_model)
    step = make_step([(make_sequence(1, 5, [1]), 5), (make_sequence(2, 4, [2]), 4)])
    changed = getattr(step, column).copy()
    changed[index] = value

    with pytest.raises(ValueError, match=column):
        device.forward(replace(step, **{column: changed}))

    assert not device._blocks.any()


@pytest.mark.parametrize("block", [-1, NUM_BLOCKS])
def test_a_block_outside_the_cache_is_refused(invariance_model: TinyModel, block: int) -> None:
    device = make_device(invariance_model)
    sequence = make_sequence(1, 20, [1, 2])
    step = make_step([(sequence, 20)])
    step.block_tables[0, 1] = block

    with pytest.raises(ValueError, match="block_tables"):
        device.forward(step)
    with pytest.raises(ValueError, match="copy_blocks"):
        device.copy_blocks(np.array([[1, block]], np.int32))


def test_a_step_above_the_limits_is_refused(invariance_model: TinyModel) -> None:
    device = CpuDevice(invariance_model, 8, 1, 2, num_threads=1)
    device.allocate_kv(4)

    with pytest.raises(ValueError, match="max_batch_tokens 8"):
        device.forward(make_step([(make_sequence(1, 9, [1]), 9)]))
    with pytest.raises(ValueError, match="9 logits_rows in a step, more than max_batch_tokens 8"):
        device.forward(replace(make_step([(make_sequence(1, 1, [1]), 1)]), logits_rows=np.zeros(9, np.int32)))
    with pytest.raises(ValueError, match="max_running 1"):
        device.forward(make_step([(make_sequence(1, 1, [1]), 1), (make_sequence(2, 1, [2]), 1)]))
    with pytest.raises(ValueError, match="room for 2 blocks"):
        device.forward(make_step([(Sequence([1] * 33, [1, 2, 3], computed=32), 1)]))


def test_arrays_that_do_not_fit_together_are_refused(invariance_model: TinyModel) -> None:
    device = make_device(invariance_model)
    step = make_step([(make_sequence(1, 4, [1]), 4)])

    with pytest.raises(ValueError, match="positions must be"):
        device.forward(replace(step, positions=step.positions[:2]))
    with pytest.raises(ValueError, match="token_ids must be"):
        device.forward(replace(step, token_ids=step.token_ids.astype(np.int64)))
    with pytest.raises(ValueError, match="slot_mapping must be"):
        device.forward(replace(step, slot_mapping=np.repeat(step.slot_mapping, 2)[::2]))


def test_the_model_is_not_kept_alive() -> None:
    model = TinyModel(Shape())
    weight = weakref.ref(model.layers[0]["qkv"])
    device = make_device(model)

    del model
    gc.collect()

    assert weight() is None
    assert run_in_chunks(device, make_sequence(1, 3, [1]), 3).isfinite().all()


@pytest.mark.parametrize("vocab", [37, 131, 4096])
def test_the_best_tokens_are_found_while_logits_are_computed(variant: str, vocab: int) -> None:
    model = TinyModel(Shape(vocab=vocab))
    weights = model.head.weight
    weights[[vocab // 2, vocab - 1]] = 8 * weights[vocab // 3]  # one of three is the highest, or two equal ones
    weights[vocab // 3] *= -8
    weights[5, 0] = torch.inf  # of some rows one logit is inf, of others -inf
    model.embedding[3] = torch.nan
    device = make_device(model, variant, num_threads=3)
    tokens = [token for token in make_sequence(1, 60, []).token_ids if token % vocab != 3]
    sequence = Sequence([token % vocab for token in tokens[:50]] + [3] * 3, [1, 2, 3, 4])

    found = []
    for count in (1, 6, 13, 30, 3):
        logits = device.forward(make_step([(sequence, count)]))
        sequence.computed += count
        found.append(device.argmax(logits).tolist())

        assert found[-1] == best_tokens(logits).tolist()
        assert device.argmax(logits[:1].copy()).tolist() == found[-1][:1]
    assert {vocab // 2, vocab // 3, -1} <= {token for tokens in found for token in tokens}
    assert found[-1] == [-1] * 3
    assert vocab - 1 not in found[-2]


def test_logits_that_were_changed_have_best_tokens_of_their_own(invariance_model: TinyModel) -> None:
    device = make_device(invariance_model)
    logits = device.forward(make_step([(make_sequence(1, 10, [1]), 10)]))
    first = device.argmax(logits)
    changed = logits.copy()
    changed[np.arange(10), first] = -np.inf

    assert (device.argmax(changed) == best_tokens(changed)).all()
    assert (device.argmax(logits) == first).all()


def test_a_token_is_drawn_for_each_row(invariance_model: TinyModel) -> None:
    device = make_device(invariance_model)
    logits = np.zeros((3, 128), np.float32)
    logits[0, 7] = logits[2, 9] = 50.0
    logits[1] = -np.inf

    greedy = Draw(0.0, 0, 1.0, 0.0, seed=1, candidate_index=0, position=0)
    tokens = device.draw(logits, [greedy, greedy, replace(greedy, temperature=1.0, seed=2**64 - 1)])

    assert tokens.tolist() == [7, -1, 9]
