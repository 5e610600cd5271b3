"""Encoders and their heads give what transformers gives, whatever else is in the step."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.common.v1 import common_pb2
from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.engine import Engine, make_engine
from octavo.gpu_worker.errors import ModelError, PlanError
from octavo.gpu_worker.loading.loading import load_for_device
from octavo.worker.v1 import worker_pb2

from .tiny import make_checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 130,
    "initializer_range": 0.2,
}
# The second and third layers see 12 tokens to either side; the initializer of each kind of layer is small by itself.
MODERN: dict[str, Any] = {"local_attention": 24, "pad_token_id": 0, "initializer_cutoff_factor": 3.0}
ENCODERS = {
    "bert": ("BertConfig", "BertModel", {}),
    "bert_tanh": ("BertConfig", "BertModel", {"hidden_act": "gelu_new"}),
    "xlm_roberta": ("XLMRobertaConfig", "XLMRobertaModel", {"type_vocab_size": 1, "pad_token_id": 1}),
    "nomic_bert": ("NomicBertConfig", "NomicBertModel", {}),
    "modernbert": ("ModernBertConfig", "ModernBertModel", MODERN),
    "modernbert_masked": ("ModernBertConfig", "ModernBertForMaskedLM", MODERN),
    "modernbert_biased": (
        "ModernBertConfig",
        "ModernBertModel",
        {**MODERN, "attention_bias": True, "mlp_bias": True, "norm_bias": True, "intermediate_size": 88},
    ),
}
SCORERS = {
    "bert": ("BertConfig", "BertForSequenceClassification", {}),
    "xlm_roberta": (
        "XLMRobertaConfig",
        "XLMRobertaForSequenceClassification",
        {"type_vocab_size": 1, "pad_token_id": 1},
    ),
    "nomic_bert": ("NomicBertConfig", "NomicBertForSequenceClassification", {"type_vocab_size": 1}),
    "modernbert": ("ModernBertConfig", "ModernBertForSequenceClassification", MODERN),
    "modernbert_mean": (
        "ModernBertConfig",
        "ModernBertForSequenceClassification",
        {**MODERN, "classifier_pooling": "mean", "classifier_bias": True, "norm_bias": True},
    ),
}
DEVICES = ["reference", "cpu"]
Vector = npt.NDArray[np.float32]


def make_encoder(folder: Path, kind: tuple[str, str, dict[str, Any]], **settings: Any) -> Any:
    """Save a random encoder; return transformers' model."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, kind[0])(**{**SIZES, **kind[2]}, **settings)
    model = getattr(transformers, kind[1])(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() or name.endswith("bias"):  # which are one and zero at first
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def modules(folder: Path, *kinds: str, **pooling: Any) -> None:
    """Make a folder one of sentence-transformers."""
    rows = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for index, kind in enumerate(kinds, 1):
        rows.append({"idx": index, "path": f"{index}_{kind}", "type": f"sentence_transformers.models.{kind}"})
        (folder / f"{index}_{kind}").mkdir()
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def engine_of(folder: Path, device: str, max_batch_tokens: int = 512, dtype: str = "auto") -> Engine:
    config = WorkerConfig(model=str(folder), device=device, num_threads=2, dtype=dtype)
    wanted = worker_pb2.WorkerConfig(max_batch_tokens=max_batch_tokens, max_running=8)
    return make_engine(load_for_device(config, lambda *_: None), config, wanted)


def column(values: Sequence[int]) -> bytes:
    return array("I", values).tobytes()


def run(
    engine: Engine, step: int, rows: Sequence[Sequence[int]], starts: Sequence[int] = (), **fields: Any
) -> list[Vector]:
    """Compute whole sequences in one step of a model without a cache."""
    updates = [
        worker_pb2.PoolingUpdate(slot=slot, second_segment_start=starts[slot] if starts else 0, **fields)
        for slot in range(len(rows))
    ]
    plan = worker_pb2.StepPlan(
        step_id=step,
        num_sequences=len(rows),
        num_tokens=sum(map(len, rows)),
        slot_indexes=column(range(len(rows))),
        query_lengths=column([len(row) for row in rows]),
        context_lengths=column([0] * len(rows)),
        token_ids=column([token for row in rows for token in row]),
        row_flags=bytes([1] * len(rows)),
        pooling_updates=updates,
    )
    engine.start(plan)
    return vectors_of(engine.collect())


def vectors_of(result: worker_pb2.StepResult) -> list[Vector]:
    sizes = array("I", result.vector_sizes)
    return np.split(np.frombuffer(result.vectors, "<f4"), np.cumsum(sizes)[:-1])


def tokens(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(5, 320, length).tolist()


def hidden_states(model: Any, token_ids: list[int], start: int = 0) -> torch.Tensor:
    types = torch.tensor([[int(start > 0 and place >= start) for place in range(len(token_ids))]])
    given = {} if model.config.model_type == "modernbert" else {"token_type_ids": types}
    with torch.no_grad():
        return model.base_model(torch.tensor([token_ids]), **given).last_hidden_state[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ENCODERS)
def test_vectors_are_those_of_transformers_and_the_same_bits_alone(name: str, device: str, tmp_path: Path) -> None:
    model = make_encoder(tmp_path, ENCODERS[name])
    engine = engine_of(tmp_path, device)
    rows = [tokens(length, length) for length in (1, 2, 17, 128, 33)]

    together = run(engine, 1, rows, normalize=False)

    for place, row in enumerate(rows):
        true = hidden_states(model, row).mean(0).numpy()
        np.testing.assert_allclose(together[place], true, atol=2e-5)
        (alone,) = run(engine, place + 2, [row], normalize=False)
        assert alone.tobytes() == together[place].tobytes()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SCORERS)
def test_a_cross_encoder_scores_pairs_as_transformers_does(name: str, device: str, tmp_path: Path) -> None:
    model = make_encoder(tmp_path, SCORERS[name], num_labels=1)
    engine = engine_of(tmp_path, device)
    rows, starts = [tokens(20, 1), tokens(9, 2), tokens(50, 3)], [7, 3, 11]

    scores = run(engine, 1, rows, starts)

    for row, start, score in zip(rows, starts, scores, strict=True):
        types = torch.tensor([[int(place >= start) for place in range(len(row))]])
        with torch.no_grad():
            given = {"token_type_ids": types} if name == "bert" else {}
            true = torch.sigmoid(model(torch.tensor([row]), **given).logits[0, 0])
        assert score.shape == (1,)
        assert abs(score[0] - true) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_the_modules_of_sentence_transformers_are_run_in_their_order(device: str, tmp_path: Path) -> None:
    model = make_encoder(tmp_path, ENCODERS["bert"])
    modules(tmp_path, "Pooling", "Dense", "Normalize", word_embedding_dimension=48, pooling_mode_cls_token=True)
    weight, bias = torch.randn(20, 48), torch.randn(20)
    dense = {"in_features": 48, "out_features": 20, "bias": True}
    dense["activation_function"] = "torch.nn.modules.activation.Tanh"  # type: ignore[assignment]
    (tmp_path / "2_Dense" / "config.json").write_text(json.dumps(dense))
    save_file({"linear.weight": weight, "linear.bias": bias}, tmp_path / "2_Dense" / "model.safetensors")
    row = tokens(12, 1)
    true = torch.tanh(weight @ hidden_states(model, row)[0] + bias)

    engine = engine_of(tmp_path, device)

    (vector,) = run(engine, 1, [row])
    np.testing.assert_allclose(vector, torch.nn.functional.normalize(true, dim=0), atol=1e-5)
    (cut,) = run(engine, 2, [row], dimensions=8)
    np.testing.assert_allclose(cut, torch.nn.functional.normalize(true[:8], dim=0), atol=1e-5)
    (plain,) = run(engine, 3, [row], normalize=False)
    np.testing.assert_allclose(plain, true, atol=1e-5)


DECODERS = {"qwen3": {}, "qwen2": {}, "mistral": {}, "llama": {}, "llama_biased": {"head_dim": 16}}


@pytest.mark.parametrize("mode", ["lasttoken", "mean_tokens", "cls_token"])
def test_a_decoder_makes_vectors_the_same_in_chunks(mode: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "qwen3")
    modules(tmp_path, "Pooling", word_embedding_dimension=64, **{f"pooling_mode_{mode}": True})
    row = tokens(75, 4)

    whole, chunked = (in_chunks(engine_of(tmp_path, "reference"), row, size) for size in (75, 31))

    np.testing.assert_allclose(whole, decoded(model, row, mode), atol=1e-4)
    assert whole.tobytes() == chunked.tobytes()


@pytest.mark.parametrize("mode", ["lasttoken", "mean_tokens"])
@pytest.mark.parametrize("name", DECODERS)
def test_the_cpu_makes_vectors_of_decoders_in_float32(name: str, mode: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, name, dtype="bfloat16", **DECODERS[name]).float()
    modules(tmp_path, "Pooling", word_embedding_dimension=64, **{f"pooling_mode_{mode}": True})
    engine = engine_of(tmp_path, "cpu")
    rows = [tokens(length, length) for length in (1, 130, 2, 75)]

    together = run(engine, 1, rows, normalize=False)

    assert engine.max_model_len == 512  # a step: a sequence is computed whole
    for place, row in enumerate(rows):
        np.testing.assert_allclose(together[place], decoded(model, row, mode), atol=1e-4)
        (alone,) = run(engine, place + 2, [row], normalize=False)
        assert alone.tobytes() == together[place].tobytes()


def test_the_cpu_makes_vectors_of_decoders_in_bfloat16_the_same_in_chunks(tmp_path: Path) -> None:
    """Like any prompt, with a cache: then an input may be longer than a step."""
    model = make_checkpoint(tmp_path, "qwen3", dtype="bfloat16").float()
    modules(tmp_path, "Pooling", word_embedding_dimension=64, pooling_mode_mean_tokens=True)
    row = tokens(75, 4)

    whole, chunked = (in_chunks(engine_of(tmp_path, "cpu", dtype="bfloat16"), row, size) for size in (75, 31))

    true = decoded(model, row, "mean_tokens")
    assert whole @ true / np.linalg.norm(whole) / np.linalg.norm(true) > 0.9999
    assert whole.tobytes() == chunked.tobytes()


def decoded(model: Any, row: list[int], mode: str) -> Vector:
    """Return what transformers' decoder gives, pooled."""
    with torch.no_grad():
        states = model.model(torch.tensor([row])).last_hidden_state[0]
    pooled: Vector = {"lasttoken": states[-1], "mean_tokens": states.mean(0), "cls_token": states[0]}[mode].numpy()
    return pooled


def in_chunks(engine: Engine, row: list[int], size: int) -> Vector:
    """Compute one sequence of a model with a cache, `size` tokens a step; return its vector."""
    result = worker_pb2.StepResult()
    for step, start in enumerate(range(0, len(row), size)):
        part = row[start : start + size]
        is_last = start + size >= len(row)
        plan = worker_pb2.StepPlan(
            step_id=step + 1,
            num_sequences=1,
            num_tokens=len(part),
            slot_indexes=column([3]),
            query_lengths=column([len(part)]),
            context_lengths=column([start]),
            token_ids=column(part),
            row_flags=bytes([is_last]),
        )
        if step == 0:
            plan.pooling_updates.add(slot=3)
            plan.block_table_rows, plan.block_table_counts = column([3]), column([5])
            plan.block_ids = column(range(1, 6))
        engine.start(plan)
        result = engine.collect()
        assert bool(result.vectors) is is_last
    (vector,) = vectors_of(result)
    return vector


def test_a_worker_says_what_it_makes_and_takes_no_other_plans(tmp_path: Path) -> None:
    make_encoder(tmp_path, ENCODERS["bert"])
    engine = engine_of(tmp_path, "reference", max_batch_tokens=64)
    limits = engine.limits

    assert (limits.num_blocks, limits.has_cache, engine.max_model_len) == (1, False, 64)
    assert limits.pooling is not None
    assert (limits.pooling.task, limits.pooling.vector_size) == (common_pb2.MODEL_TASK_EMBED, 48)
    with pytest.raises(PlanError, match="makes vectors"):
        engine.start(worker_pb2.StepPlan(step_id=1, sampling_updates=[worker_pb2.SamplingUpdate(slot=0)]))
    with pytest.raises(PlanError, match="whole sequence"):
        engine.start(
            worker_pb2.StepPlan(
                step_id=1,
                num_sequences=1,
                num_tokens=1,
                slot_indexes=column([0]),
                query_lengths=column([1]),
                context_lengths=column([5]),
                token_ids=column([5]),
                row_flags=b"\1",
                pooling_updates=[worker_pb2.PoolingUpdate(slot=0)],
            )
        )


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ({"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "supported is one of"),
        ({"pooling_mode_cls_token": True, "word_embedding_dimension": 47}, "47"),
        ({"pooling_mode_cls_token": True, "include_prompt": False}, "include_prompt"),
    ],
)
def test_a_folder_that_pools_otherwise_is_refused(pooling: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_encoder(tmp_path, ENCODERS["bert"])
    modules(tmp_path, "Pooling", **{"word_embedding_dimension": 48, **pooling})

    with pytest.raises(ModelError, match=message):
        engine_of(tmp_path, "reference")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SCORERS)
def test_a_classifier_gives_the_probabilities_of_its_labels(name: str, device: str, tmp_path: Path) -> None:
    model = make_encoder(tmp_path, SCORERS[name], num_labels=3)
    row = tokens(20, 1)
    with torch.no_grad():
        logits = model(torch.tensor([row])).logits[0]

    engine = engine_of(tmp_path, device)

    assert engine.limits.pooling is not None
    assert (engine.limits.pooling.task, engine.limits.pooling.vector_size) == (common_pb2.MODEL_TASK_CLASSIFY, 3)
    np.testing.assert_allclose(run(engine, 1, [row])[0], torch.softmax(logits, -1), atol=1e-5)


@pytest.mark.parametrize(
    ("problem_type", "of_logits"),
    [
        ("single_label_classification", lambda logits: torch.softmax(logits, -1)),
        ("multi_label_classification", torch.sigmoid),
        ("regression", lambda logits: logits),
    ],
)
def test_the_problem_type_says_what_is_made_of_logits(problem_type: str, of_logits: Any, tmp_path: Path) -> None:
    model = make_encoder(tmp_path, SCORERS["bert"], num_labels=4, problem_type=problem_type)
    row = tokens(9, 5)
    with torch.no_grad():
        true = of_logits(model(torch.tensor([row])).logits[0])

    np.testing.assert_allclose(run(engine_of(tmp_path, "reference"), 1, [row])[0], true, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"problem_type": "ranking"}, "problem_type is 'ranking'"),
        ({"num_labels": 1 << 40}, "1099511627776 labels, expected 1 to 65536"),
        ({"num_labels": "3"}, "'3' labels"),
        ({"num_labels": 4}, r"classifier.* has shape \[3, 48\], the config asks for \[4, 48\]"),
    ],
)
def test_a_damaged_classifier_is_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_encoder(tmp_path, SCORERS["bert"], num_labels=3)
    change_config(tmp_path, changed)

    with pytest.raises(ModelError, match=message):
        engine_of(tmp_path, "reference")


PUBLISHED_NOMIC = {
    "activation_function": "swiglu",
    "n_embd": 48,
    "n_head": 3,
    "n_inner": 80,
    "n_layer": 3,
    "n_positions": 130,
    "layer_norm_epsilon": 1e-12,
    "rotary_emb_base": 1000,
    "rotary_emb_fraction": 1.0,
    "rotary_scaling_factor": None,
    "prenorm": False,
    "qkv_proj_bias": False,
    "type_vocab_size": 2,
    "vocab_size": 320,
}


def change_config(folder: Path, changed: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def test_nomic_bert_is_read_with_the_names_that_its_published_config_has(tmp_path: Path) -> None:
    model = make_encoder(tmp_path, ENCODERS["nomic_bert"])
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["NomicBertModel"], **PUBLISHED_NOMIC}))
    row = tokens(33, 2)

    (vector,) = run(engine_of(tmp_path, "reference"), 1, [row], normalize=False)

    np.testing.assert_allclose(vector, hidden_states(model, row).mean(0), atol=2e-5)


@pytest.mark.parametrize("changed", [{"moe_every_n_layers": 2}, {"qkv_proj_bias": True}, {"hidden_act": "gelu"}])
def test_another_nomic_bert_is_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    make_encoder(tmp_path, ENCODERS["nomic_bert"])
    change_config(tmp_path, changed)

    with pytest.raises(ModelError, match=f"{next(iter(changed))} is .*not supported for NomicBert"):
        engine_of(tmp_path, "reference")


def make_embedding_gemma(folder: Path) -> Any:
    """Save a Gemma 3 whose tokens see each other, in windowed layers 6 to either side; return transformers' model."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        **{**SIZES, "num_attention_heads": 4, "num_hidden_layers": 4},
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=12,
        sliding_window_pattern=2,
        use_bidirectional_attention=True,
    )
    model = transformers.Gemma3TextModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("device", DEVICES)
def test_a_bidirectional_gemma_gives_the_vectors_of_transformers(device: str, tmp_path: Path) -> None:
    model = make_embedding_gemma(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["sliding_window"] == 12
    modules(tmp_path, "Pooling", word_embedding_dimension=48, pooling_mode_mean_tokens=True)
    engine = engine_of(tmp_path, device)
    rows = [tokens(length, length) for length in (1, 2, 17, 90, 33)]

    together = run(engine, 1, rows, normalize=False)

    assert not engine.limits.has_cache
    for place, row in enumerate(rows):
        with torch.no_grad():
            true = model(torch.tensor([row])).last_hidden_state[0].mean(0).numpy()
        assert np.abs(together[place] - true).max() <= 1e-4 * np.abs(true).max()
        (alone,) = run(engine, place + 2, [row], normalize=False)
        assert alone.tobytes() == together[place].tobytes()


def test_a_bidirectional_decoder_writes_no_text(tmp_path: Path) -> None:
    make_embedding_gemma(tmp_path)
    change_config(tmp_path, {"architectures": ["Gemma3ForCausalLM"]})
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({f"model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")

    with pytest.raises(ModelError, match="use_bidirectional_attention is of a model for vectors"):
        engine_of(tmp_path, "reference")


def logit_score(folder: Path, **settings: Any) -> None:
    """Make a folder one whose score is made of the logits of words, as sentence-transformers saves it."""
    kinds = ("base.modules.transformer.Transformer", "cross_encoder.modules.logit_score.LogitScore")
    paths = ("", "1_LogitScore")
    rows = [
        {"idx": index, "path": path, "type": f"sentence_transformers.{kind}"}
        for index, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "1_LogitScore").mkdir(exist_ok=True)
    (folder / "1_LogitScore" / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama", "gemma3"])
def test_a_score_of_two_words_is_that_of_their_logits(name: str, device: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, name, dtype="float32")
    rows = [tokens(length, length) for length in (1, 40, 17)]
    for true_id, false_id in ((31, 7), (31, None)):
        logit_score(tmp_path, true_token_id=true_id, false_token_id=false_id)
        engine = engine_of(tmp_path, device)
        assert engine.limits.pooling is not None
        assert engine.limits.pooling.task == common_pb2.MODEL_TASK_SCORE
        has_cache = device == "reference"
        scores = [in_chunks(engine, row, 64) for row in rows] if has_cache else run(engine, 1, rows)
        for row, score in zip(rows, scores, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([row])).logits[0, -1]
            true = logits[true_id] if false_id is None else logits[true_id] - logits[false_id]
            assert abs(score[0] - torch.sigmoid(true)) < 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"true_token_id": 1 << 20}, "expected two below"),
        ({"false_token_id": 3}, "expected two below"),
        ({"true_token_id": "yes"}, "a token id is 'yes'"),
        ({"true_token_id": -1}, "expected two below"),
    ],
)
def test_a_damaged_score_of_two_words_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3")
    logit_score(tmp_path, **settings)

    with pytest.raises(ModelError, match=message):
        engine_of(tmp_path, "reference")


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("device", DEVICES)
def test_a_decoder_with_a_classifier_labels_the_last_token(device: str, num_labels: int, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 64, "num_attention_heads": 4}
    config = transformers.Qwen3Config(**sizes, num_key_value_heads=2, head_dim=16, num_labels=num_labels)
    config.pad_token_id = 0
    model = transformers.Qwen3ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    row = tokens(30, 3)
    with torch.no_grad():
        logits = model(torch.tensor([row])).logits[0]
    engine = engine_of(tmp_path, device)

    result = in_chunks(engine, row, 13) if device == "reference" else run(engine, 1, [row])[0]

    true = torch.sigmoid(logits) if num_labels == 1 else torch.softmax(logits, -1)
    np.testing.assert_allclose(result, true, atol=1e-4)
