"""The cuda device makes the vectors that the reference device makes, of encoders and of decoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from driver import column
from guard import guarded
from tiny import make_checkpoint

from octavo.common.v1 import common_pb2
from octavo.gpu_worker.devices.cuda.pooling_runner import CudaPoolingRunner
from octavo.gpu_worker.devices.reference.device import ReferenceDevice
from octavo.gpu_worker.engine import Engine
from octavo.gpu_worker.loading.loading import LoadedModel, load_model
from octavo.gpu_worker.steps.batch import Limits
from octavo.gpu_worker.steps.pooler import Pooling, PoolingMode
from octavo.gpu_worker.steps.pooling_runner import PoolingRunner
from octavo.gpu_worker.steps.runner import Runner
from octavo.worker.v1 import worker_pb2

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 66,
    "initializer_range": 0.2,
}
ENCODERS: dict[str, tuple[PoolingMode, dict[str, Any]]] = {
    "Bert": ("mean", {}),
    "XLMRoberta": ("cls", {"type_vocab_size": 1, "pad_token_id": 1, "hidden_act": "gelu_new"}),
}
MAX_RUNNING, MAX_BATCH_TOKENS, MAX_BLOCKS = 4, 64, 6
Vectors = list[npt.NDArray[np.float32]]


def load_encoder(folder: Path, name: str, dtype: str = "auto") -> LoadedModel:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **ENCODERS[name][1])
    getattr(transformers, f"{name}Model")(config).save_pretrained(folder)
    return load_model(folder, dtype, 0, lambda *_: None)


def load_decoder(folder: Path) -> LoadedModel:
    make_checkpoint(folder, "qwen3", num_hidden_layers=1)
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    rows = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    return load_model(folder, "auto", 96, lambda *_: None)


def engine_of(loaded: LoadedModel, mode: PoolingMode | None, device: str) -> Engine:
    """Return an engine whose vectors are pooled by `mode`, or as the folder says."""
    model: Any = loaded.model
    limits = (MAX_BATCH_TOKENS, MAX_RUNNING, MAX_BLOCKS)
    assert loaded.pooling is not None
    pooling = loaded.pooling
    if mode is not None:
        pooling = Pooling(common_pb2.MODEL_TASK_EMBED, mode, loaded.pooling.hidden_size, normalize=False)
    runner: Runner
    if device == "cuda":
        runner = CudaPoolingRunner(model, *limits, pooling, device="cpu")
    else:
        runner = PoolingRunner(ReferenceDevice(model, *limits), MAX_RUNNING, MAX_BLOCKS, pooling)
    has_cache = runner.kv_block_bytes() > 0
    num_blocks = 20 if has_cache else 1
    runner.allocate_kv(num_blocks)
    sizes = (MAX_RUNNING, MAX_BATCH_TOKENS, MAX_BLOCKS, num_blocks, 320)
    return Engine(runner, Limits(*sizes, pooling=pooling, has_cache=has_cache), 64)


def plan_of(
    step: int, rows: list[tuple[int, list[int], int, bool]], updates: list[dict[str, Any]]
) -> worker_pb2.StepPlan:
    """Return a plan of rows (slot, tokens, tokens before, whether they end) and slots that are opened."""
    return worker_pb2.StepPlan(
        step_id=step,
        num_sequences=len(rows),
        num_tokens=sum(len(tokens) for _, tokens, _, _ in rows),
        slot_indexes=column(*(row[0] for row in rows)),
        query_lengths=column(*(len(row[1]) for row in rows)),
        context_lengths=column(*(row[2] for row in rows)),
        token_ids=column(*(token for row in rows for token in row[1])),
        row_flags=bytes(int(row[3]) for row in rows),
        pooling_updates=[worker_pb2.PoolingUpdate(**update) for update in updates],
    )


def vectors_of(result: worker_pb2.StepResult) -> Vectors:
    sizes = np.frombuffer(result.vector_sizes, "<u4")
    return np.split(np.frombuffer(result.vectors, "<f4"), np.cumsum(sizes)[:-1]) if len(sizes) else []


def tokens(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(5, 320, length).tolist()


TEXTS = [tokens(1, 1), tokens(33, 2), tokens(17, 3)]
OTHERS = [tokens(40, 4), tokens(2, 5)]


def run_encoder(engine: Engine) -> Vectors:
    """Start two steps before the first is collected; the second one opens a slot of the first again."""
    settings: list[dict[str, Any]] = [{}, {"second_segment_start": 9}, {"dimensions": 20, "normalize": True}]
    updates = [{"slot": slot, **fields} for slot, fields in enumerate(settings)]
    engine.start(plan_of(1, [(slot, text, 0, True) for slot, text in enumerate(TEXTS)], updates))
    again = [{"slot": 2}, {"slot": 3, "second_segment_start": 1}]
    engine.start(plan_of(2, [(slot + 2, text, 0, True) for slot, text in enumerate(OTHERS)], again))
    return [vector for _ in range(2) for vector in vectors_of(engine.collect())]


@pytest.mark.parametrize("name", ENCODERS)
def test_vectors_of_an_encoder_are_those_of_the_reference(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_encoder(tmp_path, name)
    mode = ENCODERS[name][0]
    cuda = engine_of(model, mode, "cuda")

    with guarded(monkeypatch) as guard:
        found = run_encoder(cuda)

    expected = run_encoder(engine_of(model, mode, "reference"))
    assert guard.num_operations > 50
    assert [len(vector) for vector in found] == [48, 48, 20, 48, 48]
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5)
    cuda.start(plan_of(3, [(0, TEXTS[1], 0, True)], [{"slot": 0, "second_segment_start": 9}]))
    (alone,) = vectors_of(cuda.collect())
    assert alone.tobytes() == found[1].tobytes()


def test_an_encoder_in_bfloat16_gives_about_the_same_vectors(tmp_path: Path) -> None:
    model = load_encoder(tmp_path, "Bert", "bfloat16")

    found, expected = (run_encoder(engine_of(model, "mean", device)) for device in ("cuda", "reference"))

    for one, two in zip(found, expected, strict=True):
        assert one @ two / np.sqrt((one @ one) * (two @ two)) > 0.999


def run_decoder(engine: Engine, size: int) -> Vectors:
    """Compute two sequences, beside each other, `size` tokens a step; return their vectors."""
    texts = {1: tokens(50, 6), 3: tokens(21, 7)}
    found: dict[int, npt.NDArray[np.float32]] = {}
    for step, start in enumerate(range(0, 50, size)):
        rows = [
            (slot, text[start : start + size], start, start + size >= len(text))
            for slot, text in texts.items()
            if start < len(text)
        ]
        plan = plan_of(step + 1, rows, [{"slot": slot} for slot in texts] if step == 0 else [])
        if step == 0:
            plan.block_table_rows, plan.block_table_counts = column(1, 3), column(4, 2)
            plan.block_ids = column(7, 3, 12, 5, 9, 1)
        engine.start(plan)
        ended = [slot for slot, _, _, is_end in rows if is_end]
        found |= dict(zip(ended, vectors_of(engine.collect()), strict=True))
    return [found[slot] for slot in texts]


@pytest.mark.parametrize("mode", ["last", "mean", "cls"])
def test_vectors_of_a_decoder_are_those_of_the_reference_in_any_chunks(
    mode: PoolingMode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_decoder(tmp_path)
    cuda = engine_of(model, mode, "cuda")

    with guarded(monkeypatch):
        found = run_decoder(cuda, 19)

    for one, two in zip(found, run_decoder(engine_of(model, mode, "reference"), 30), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5)
    for one, two in zip(found, run_decoder(engine_of(model, mode, "cuda"), 30), strict=True):
        assert one.tobytes() == two.tobytes()


def test_labels_of_an_encoder_are_those_of_transformers(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=3)).eval()
    model.save_pretrained(tmp_path)
    engine = engine_of(load_model(tmp_path, "auto", 0, lambda *_: None), None, "cuda")

    engine.start(plan_of(1, [(0, TEXTS[1], 0, True)], [{"slot": 0}]))

    with torch.no_grad():
        true = torch.softmax(model(torch.tensor([TEXTS[1]])).logits[0], -1)
    np.testing.assert_allclose(vectors_of(engine.collect())[0], true, atol=2e-5)


def test_a_score_of_two_words_is_that_of_their_logits_in_any_chunks(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "qwen3", num_hidden_layers=1, dtype="float32")
    rows = [{"path": path, "type": kind} for path, kind in {"": "a.Transformer", "1": "a.LogitScore"}.items()]
    (tmp_path / "modules.json").write_text(json.dumps(rows))
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "config.json").write_text(json.dumps({"true_token_id": 9, "false_token_id": 4}))
    loaded = load_model(tmp_path, "auto", 96, lambda *_: None)

    found = run_decoder(engine_of(loaded, None, "cuda"), 19)

    for text, score in zip((tokens(50, 6), tokens(21, 7)), found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([text])).logits[0, -1]
        np.testing.assert_allclose(score, torch.sigmoid(logits[9] - logits[4]), atol=2e-5)
