"""What constraints cost a worker: time until the first mask of a new schema, and time of a mask for each token.

python -m benchmarks.constraints MODEL [--schemas N]

Schemas are drawn from a seed. Each is followed by a random walk: a token that the mask allows, again and
again. Where xgrammar is installed beside transformers, its compile time is measured on the same schemas.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from octavo.gpu_worker.grammars import Grammars
from octavo.gpu_worker.sampling_settings import read_sampling_update
from octavo.gpu_worker.vocabulary import read_vocabulary
from octavo.services.gateway.constraint_grammar import grammar_of_schema
from octavo.worker.v1 import worker_pb2

_TOKENS = 100
_STRINGS: list[dict[str, Any]] = [{}, {"maxLength": 30}, {"pattern": "^[A-Z]{2}-[0-9]{4}$"}, {"format": "date"}]


def draw_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """Return a schema with a handful of fields, up to three levels deep."""
    kind = rng.choice(["string", "integer", "boolean", "enum", "array", "object"]) if depth else "object"
    if kind == "enum":
        return {"enum": [f"value {rng.randrange(1000)}" for _ in range(rng.randint(1, 8))]}
    if kind == "object" and depth < 3:
        names = [f"{rng.choice(['name', 'size', 'kind', 'note'])}_{index}" for index in range(rng.randint(2, 7))]
        fields = {name: draw_schema(rng, depth + 1) for name in names}
        return {"type": "object", "properties": fields, "required": names[:2], "additionalProperties": False}
    if kind == "array" and depth < 3:
        return {"type": "array", "items": draw_schema(rng, depth + 1), "maxItems": rng.randint(1, 6)}
    if kind == "integer":
        return {"type": "integer", "minimum": rng.randint(-5, 5), "maximum": rng.randint(100, 9999)}
    return {"type": "boolean"} if kind == "boolean" else {"type": "string", **rng.choice(_STRINGS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--schemas", type=int, default=50)
    given = parser.parse_args()
    vocab_size = json.loads((given.model / "config.json").read_text())["vocab_size"]
    grammars = Grammars(lambda: read_vocabulary(given.model, vocab_size), vocab_size, patience_s=None)
    grammars._tokenizer.result()
    rng = random.Random(0)
    schemas = [draw_schema(rng) for _ in range(given.schemas)]
    first, each = [], []
    for schema in schemas:
        update = worker_pb2.SamplingUpdate(top_p=1.0, grammar=grammar_of_schema(schema))
        began = time.perf_counter()
        automaton = grammars.open(read_sampling_update(update, vocab_size))
        automaton.ready.result()
        first.append(time.perf_counter() - began)
        for _ in range(_TOKENS):
            allowed = np.flatnonzero(np.unpackbits(automaton.allowed.view(np.uint8), bitorder="little"))
            if automaton.refusal or not len(allowed):
                break
            began = time.perf_counter()
            automaton._advance(int(rng.choice(allowed)))
            each.append(time.perf_counter() - began)
    _report("llguidance: new schema to first mask, ms", first, 1e3)
    _report("llguidance: token to next mask, us", each, 1e6)
    if importlib.util.find_spec("xgrammar") is not None:
        _report("xgrammar: compiling, ms", _xgrammar(given.model, vocab_size, schemas), 1e3)


def _xgrammar(model: Path, vocab_size: int, schemas: list[dict[str, Any]]) -> list[float]:
    import xgrammar
    from transformers import AutoTokenizer

    info = xgrammar.TokenizerInfo.from_huggingface(AutoTokenizer.from_pretrained(model), vocab_size=vocab_size)
    compiler = xgrammar.GrammarCompiler(info, cache_enabled=False)
    took = []
    for schema in schemas:
        began = time.perf_counter()
        compiler.compile_json_schema(json.dumps(schema))
        took.append(time.perf_counter() - began)
    return took


def _report(what: str, times: list[float], scale: float) -> None:
    ordered = sorted(each * scale for each in times)
    mean, p99 = statistics.fmean(ordered), ordered[int(0.99 * (len(ordered) - 1))]
    print(f"{what}: mean {mean:.1f}, median {statistics.median(ordered):.1f}, p99 {p99:.1f}, of {len(ordered)}")


if __name__ == "__main__":
    main()
