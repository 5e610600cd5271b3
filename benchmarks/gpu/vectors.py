"""The same vectors from the `cuda` device as from the `reference` device: of an encoder, and of a decoder."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lab import Lab
from report import Row
from small_models import DENSE, headless_model

from octavo.common.v1 import common_pb2
from octavo.gpu_worker.devices.cuda.pooling_runner import CudaPoolingRunner
from octavo.gpu_worker.devices.reference.device import ReferenceDevice
from octavo.gpu_worker.models.bert import BertConfig, BertModel
from octavo.gpu_worker.steps.batch import Limits, Slots
from octavo.gpu_worker.steps.pooler import Pooling
from octavo.gpu_worker.steps.pooling_runner import PoolingRunner
from octavo.gpu_worker.steps.runner import Runner
from octavo.worker.v1 import worker_pb2

_SIZES = {
    "vocab_size": 320,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
}
_TINY = {**_SIZES, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 3}
_MAX_ERROR = 1e-4


def check_vectors(lab: Lab) -> Iterator[Row]:
    """Compare the devices on random models in float32, vectors scaled to length 1."""
    sizes = lab.pick(_SIZES, _TINY)
    models: dict[str, tuple[Any, int]] = {
        "an encoder": (_encoder(sizes), sizes["hidden_size"]),
        "a decoder": (headless_model(DENSE), DENSE["hidden_size"]),
    }
    for name, (model, hidden_size) in models.items():
        texts = _texts(lab.pick((8, 500), (2, 20)))
        found, expected = (_vectors(lab, device, model, hidden_size, texts) for device in ("cuda", "reference"))
        wrong = float(np.abs(found - expected).max())
        note = f"off by {wrong:.1e}" if not wrong <= _MAX_ERROR else ""
        yield Row("tokens", f"vectors of {name}: {len(texts)} texts, float32", passed=not note, note=note)


def _vectors(lab: Lab, device: str, model: Any, hidden_size: int, texts: list[list[int]]) -> npt.NDArray[np.float32]:
    """Compute texts in one step; return a row for each."""
    num_tokens, longest = sum(map(len, texts)), max(map(len, texts))
    per_sequence = -(-longest // 16)
    sizes = (num_tokens, len(texts), per_sequence)
    pooling = Pooling(common_pb2.MODEL_TASK_EMBED, "mean", hidden_size)
    runner: Runner
    if device == "cuda":
        runner = CudaPoolingRunner(model, *sizes, pooling, device=lab.device)
    else:
        runner = PoolingRunner(ReferenceDevice(model, *sizes), *sizes[1:], pooling)
    has_cache = runner.kv_block_bytes() > 0
    num_blocks = 1 + len(texts) * per_sequence if has_cache else 1
    runner.allocate_kv(num_blocks)
    slots = Slots(Limits(len(texts), num_tokens, per_sequence, num_blocks, _SIZES["vocab_size"], pooling, has_cache))
    plan = _plan(texts, per_sequence if has_cache else 0)
    vectors = runner.start(slots.apply(plan)).wait().vectors
    assert vectors is not None, "a model for vectors makes some"
    return vectors.values.reshape(len(texts), hidden_size)


def _plan(texts: list[list[int]], blocks_each: int) -> worker_pb2.StepPlan:
    def column(values: list[int]) -> bytes:
        return np.array(values, "<u4").tobytes()

    places = list(range(len(texts)))
    plan = worker_pb2.StepPlan(
        step_id=1,
        num_sequences=len(texts),
        num_tokens=sum(map(len, texts)),
        slot_indexes=column(places),
        query_lengths=column([len(text) for text in texts]),
        context_lengths=column([0] * len(texts)),
        token_ids=column([token for text in texts for token in text]),
        row_flags=bytes([1] * len(texts)),
        pooling_updates=[worker_pb2.PoolingUpdate(slot=slot) for slot in places],
    )
    if blocks_each:
        plan.block_table_rows, plan.block_table_counts = column(places), column([blocks_each] * len(texts))
        plan.block_ids = column(list(range(1, 1 + len(texts) * blocks_each)))
    return plan


def _texts(sizes: tuple[int, int]) -> list[list[int]]:
    count, longest = sizes
    random.seed(3)
    return [[random.randrange(_SIZES["vocab_size"]) for _ in range(random.randint(1, longest))] for _ in range(count)]


def _encoder(sizes: dict[str, int]) -> BertModel:
    config = BertConfig.from_json(sizes, "BertModel", 1, "here")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        for name, shape in config.tensor_shapes().items()
    }
    return config.build(tensors, config.max_position_embeddings)
