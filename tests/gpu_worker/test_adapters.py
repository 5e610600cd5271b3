"""Rows with LoRA adapters: what they add is what merged weights would, and a row knows its own adapter alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from octavo.gpu_worker.devices.cpu.device import CpuDevice
from octavo.gpu_worker.devices.reference.device import ReferenceDevice
from octavo.gpu_worker.ops import Device, Linear, LoraPair, Module
from octavo.gpu_worker.quantization import Quantization

from .test_cpu_device import (
    MAX_BLOCKS,
    MAX_SEQUENCES,
    MAX_TOKENS,
    NUM_BLOCKS,
    SHAPES,
    VARIANTS,
    Sequence,
    Shape,
    TinyModel,
    WholeSequenceOps,
    make_sequence,
    make_step,
    shuffled_blocks,
)

NAMES = (
    "plain",
    "wide, bias",
    "odd sizes",
    "group of 3, head_dim 64",
    "no sharing, head_dim 80, partial rotary",
    "norms of what is added, scaled embedding",
    "norms over all heads, odd sizes",
)


class AdaptedModel(TinyModel):
    """A TinyModel whose layers say what they were joined of."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__(shape, seed)
        q_size, kv_size = (self.heads.head_dim * n for n in (self.heads.num_heads, self.heads.num_kv_heads))
        for index, layer in enumerate(self.layers):
            for name in ("qkv", "output", "gate", "up", "down"):
                weight = layer[name].weight
                modules = (Module(f"{index}.{name}", len(weight)),)
                if name == "qkv":
                    sizes = (("q", q_size), ("k", kv_size), ("v", kv_size))
                    modules = tuple(Module(f"{index}.{part}", size) for part, size in sizes)
                layer[name] = Linear(weight, layer[name].bias, modules=modules)

    def merged(self, pairs: list[LoraPair]) -> TinyModel:
        """Return the model with an adapter in its weights, in float32."""
        model = TinyModel(self.shape)
        model.embedding, model.norm, model.head, model.rotary = self.embedding, self.norm, self.head, self.rotary
        model.layers = [dict(layer) for layer in self.layers]
        for pair in pairs:
            for layer in model.layers:
                for name, linear in layer.items():
                    at = 0
                    for module in getattr(linear, "modules", ()):
                        if module.name == pair.module:
                            weight = linear.weight.float().clone()
                            weight[at : at + module.out_features] += pair.scale * torch.from_numpy(pair.b @ pair.a)
                            layer[name] = linear = replace(linear, weight=weight)
                        at += module.out_features
        return model


def make_adapter(device: Device, seed: int, rank: int, share: float = 1.0) -> list[LoraPair]:
    """Return pairs for some of the modules."""
    rng = np.random.default_rng(seed)
    pairs = []
    for name, (rows, columns) in device.adapter_modules().items():
        if rng.random() < share:
            a = rng.standard_normal((rank, columns)).astype(np.float32) * columns**-0.5
            b = rng.standard_normal((rows, rank)).astype(np.float32) * rank**-0.5
            pairs.append(LoraPair(name, a, b, 0.5))
    return pairs


def make_device(
    model: TinyModel, name: str, num_threads: int = 2, quantization: Quantization = Quantization.NONE
) -> Device:
    limits = (MAX_TOKENS, MAX_SEQUENCES * 2, MAX_BLOCKS)
    device: Device
    if name == "reference":
        device = ReferenceDevice(model, *limits)
    else:
        device = CpuDevice(model, *limits, num_threads=num_threads, variant=name, quantization=quantization)
    device.allocate_kv(NUM_BLOCKS)
    return device


def run(device: Device, parts: list[tuple[Sequence, int, int]]) -> list[torch.Tensor]:
    """Run a step of (sequence, new tokens, adapter); return the logits of each sequence's new tokens."""
    step = make_step([(sequence, count) for sequence, count, _ in parts])
    ids = np.repeat(np.array([each for *_, each in parts], np.int32), [count for _, count, _ in parts])
    logits = torch.from_numpy(device.forward(replace(step, adapter_ids=ids)).copy())
    for sequence, count, _ in parts:
        sequence.computed += count
    return list(torch.split(logits, [count for _, count, _ in parts]))


@pytest.fixture(params=["reference", *VARIANTS])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("shape", NAMES)
def test_logits_are_those_of_merged_weights(shape: str, name: str) -> None:
    model = AdaptedModel(SHAPES[shape])
    device = make_device(model, name)
    adapters = {1: make_adapter(device, 1, rank=5), 7: make_adapter(device, 2, rank=16, share=0.6)}
    for adapter_id, pairs in adapters.items():
        device.set_adapter(adapter_id, device.pack_adapter(pairs))
    sequences = {each: make_sequence(each, 70, list(range(1 + 8 * each, 9 + 8 * each))) for each in (1, 7)}

    logits: dict[int, list[torch.Tensor]] = {1: [], 7: []}
    for count in (50, 1, 19):
        for each, part in zip(sequences, run(device, [(sequences[s], count, s) for s in sequences]), strict=True):
            logits[each].append(part)

    for each, sequence in sequences.items():
        expected = model.merged(adapters[each]).forward(WholeSequenceOps(sequence.token_ids))
        plain = model.forward(WholeSequenceOps(sequence.token_ids))
        assert (plain - expected).square().mean().sqrt() > 0.2 * expected.std()
        assert (torch.cat(logits[each]) - expected).square().mean().sqrt() < 0.015 * expected.std()


@pytest.mark.parametrize("scheme", [Quantization.NONE, Quantization.INT8])
def test_64_adapters_in_one_step_give_each_row_the_bits_that_it_has_alone(name: str, scheme: Quantization) -> None:
    if name == "reference" and scheme is not Quantization.NONE:
        pytest.skip("device reference does not quantise")
    model = AdaptedModel(Shape(hidden=112, intermediate=330, heads=SHAPES["plain"].heads, bias=True))
    device = make_device(model, name, quantization=scheme)
    for each in range(1, 65):
        pairs = make_adapter(device, each, rank=8 + each * 7 % 57, share=0.7)
        device.set_adapter(each, device.pack_adapter(pairs))
    rows = [(each * 5 % 65, 3 + each % 5) for each in range(65)]  # adapter 0 is none

    sequences = [make_sequence(each, count + 1, [1 + each]) for each, (_, count) in enumerate(rows)]
    parts = [(seq, count, adapter) for seq, (adapter, count) in zip(sequences, rows, strict=True)]
    together = run(device, parts)
    decoded = run(device, [(seq, 1, adapter) for seq, _, adapter in parts])

    alone = make_device(model, name, num_threads=1, quantization=scheme)
    for row, (adapter, count) in enumerate(rows):
        sequence = make_sequence(row, count + 1, [1 + row])
        if adapter:
            pairs = make_adapter(device, adapter, rank=8 + adapter * 7 % 57, share=0.7)
            alone.set_adapter(3, alone.pack_adapter(pairs))
        for expected, size in ((together[row], count), (decoded[row], 1)):
            assert torch.equal(run(alone, [(sequence, size, 3 if adapter else 0)])[0], expected), (row, adapter)


def test_a_row_without_an_adapter_has_the_bits_of_a_step_without_adapters(name: str) -> None:
    model = AdaptedModel(SHAPES["group of 3, head_dim 64"])
    device = make_device(model, name)
    device.set_adapter(2, device.pack_adapter(make_adapter(device, 1, rank=200)))
    blocks = shuffled_blocks(1)

    plain = torch.from_numpy(device.forward(make_step([(make_sequence(1, 90, blocks[:6]), 90)])).copy())

    parts = [(make_sequence(1, 90, blocks[:6]), 90, 0), (make_sequence(2, 40, blocks[6:9]), 40, 2)]
    assert torch.equal(run(device, parts)[0], plain)


def test_bits_of_an_adapted_prompt_do_not_depend_on_chunks_and_threads(name: str) -> None:
    model = AdaptedModel(SHAPES["wide, bias"])
    outputs = []
    for num_threads, chunk in ((1, 512), (2, 512), (5, 37)):
        device = make_device(model, name, num_threads)
        device.set_adapter(1, device.pack_adapter(make_adapter(device, 1, rank=33)))
        sequence = make_sequence(1, 512, shuffled_blocks(1))
        pieces = []
        while sequence.computed < 512:
            pieces += run(device, [(sequence, min(chunk, 512 - sequence.computed), 1)])
        outputs.append(torch.cat(pieces))

    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_only_wanted_rows_of_an_adapted_prompt_are_computed_in_the_last_layer(name: str) -> None:
    device = make_device(AdaptedModel(SHAPES["plain"]), name)
    for each in (1, 2):
        device.set_adapter(each, device.pack_adapter(make_adapter(device, each, rank=8)))
    parts = [(make_sequence(1, 30, [1, 2]), 30), (make_sequence(2, 30, [3, 4]), 30)]
    step = replace(make_step(parts), adapter_ids=np.repeat(np.array([2, 1], np.int32), 30))
    everything = device.forward(step).copy()

    wanted = np.array([29, 57, 59], np.int32)

    assert (device.forward(replace(step, logits_rows=wanted)) == everything[wanted]).all()


@pytest.mark.parametrize("adapter_id", [-1, 1, 3, 100])
def test_an_adapter_that_is_not_there_is_refused_before_anything_is_written(adapter_id: int) -> None:
    device = make_device(AdaptedModel(SHAPES["plain"]), "")
    device.set_adapter(2, device.pack_adapter(make_adapter(device, 1, rank=8)))
    device.set_adapter(3, device.pack_adapter(make_adapter(device, 1, rank=8)))
    device.set_adapter(3, None)

    with pytest.raises(ValueError, match=f"adapter_ids\\[2\\] is {adapter_id}"):
        run(device, [(make_sequence(1, 2, [1]), 2, 2), (make_sequence(2, 2, [2]), 2, adapter_id)])
