"""Embeds the workload with sentence-transformers or ONNX Runtime, once for each line on its input.

Run with the Python of an environment that has them, by benchmarks/embeddings.py:
embedders.py {sentence-transformers|onnxruntime} MODEL_FOLDER WORKLOAD WORK_FOLDER THREADS.
Prints "ready" and its batch size, then for each line a JSON object with seconds, the processor's seconds, and the
first 16 vectors.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_BATCH_SIZES = (8, 32)
Encode = Callable[[list[str], int], Any]


def sentence_transformers(folder: Path, threads: int) -> Encode:
    """Return the library's own encode, which sorts by length."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(str(folder), device="cpu")
    return lambda texts, batch_size: model.encode(texts, batch_size=batch_size, normalize_embeddings=True)


def onnxruntime(folder: Path, work: Path, threads: int) -> Encode:
    """Return the same over ONNX Runtime: sorted by length, padded to the longest of a batch, mean, normalized."""
    import numpy as np
    import onnxruntime as ort
    from tokenizers import Tokenizer

    path = work / "model.onnx"
    if not path.exists():
        _export(folder, path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)

    def encode(texts: list[str], batch_size: int) -> Any:
        encodings = tokenizer.encode_batch(texts)
        order = sorted(range(len(texts)), key=lambda index: -len(encodings[index].ids))
        vectors = np.empty((len(texts), 384), np.float32)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids = np.zeros((len(batch), len(encodings[batch[0]].ids)), np.int64)
            mask = np.zeros_like(ids)
            for row, index in enumerate(batch):
                ids[row, : len(encodings[index].ids)] = encodings[index].ids
                mask[row, : len(encodings[index].ids)] = 1
            inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
            (states,) = session.run(None, inputs)
            means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
            vectors[batch] = means / np.linalg.norm(means, axis=1, keepdims=True)
        return vectors

    return encode


def _export(folder: Path, path: Path) -> None:
    """Write the model with the same weights, float32."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()

    class States(torch.nn.Module):  # type: ignore[misc]  # torch is not in the checked environment
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
            return self.model(**inputs).last_hidden_state

    ids = torch.ones(2, 8, dtype=torch.long)
    names = ["input_ids", "attention_mask", "token_type_ids"]
    torch.onnx.export(
        States(),
        (ids, torch.ones_like(ids), torch.zeros_like(ids)),
        str(path),
        input_names=names,
        output_names=["states"],
        dynamic_axes={name: {0: "batch", 1: "length"} for name in (*names, "states")},
        opset_version=17,
        dynamo=False,
    )


def main(arguments: list[str]) -> None:
    """Measure when told to."""
    kind, folder, workload, work = arguments[0], *map(Path, arguments[1:4])
    texts = [json.loads(line)["text"] for line in workload.read_text().splitlines()]
    threads = int(arguments[4])
    if kind == "sentence-transformers":
        encode = sentence_transformers(folder, threads)
    else:
        encode = onnxruntime(folder, work, threads)
    times = {}
    for batch_size in _BATCH_SIZES:  # the best one for this machine
        encode(texts[:64], batch_size)
        started = time.process_time()
        encode(texts[:256], batch_size)
        times[batch_size] = time.process_time() - started
    best = min(times, key=lambda size: times[size])
    print(f"ready {best}", flush=True)
    for _ in sys.stdin:
        started, cpu = time.perf_counter(), time.process_time()
        vectors = encode(texts, best)
        result = {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}
        print(json.dumps({**result, "vectors": vectors[:16].tolist()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
