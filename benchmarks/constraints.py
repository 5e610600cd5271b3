"""What constraints cost a worker: time until the first mask of a new schema, time of a mask for each token, and stalls.

python -m benchmarks.constraints MODEL [--schemas N]

Schemas are drawn from a seed. Each is followed by a random walk: a token that the mask allows, again and
again. Then 16 sequences at a time make steps, as in a worker: their automata advance in threads while a forward
pass of 5 ms runs (nothing does, here), and what the step waits for masks after it is its stall. Where xgrammar is
installed beside transformers, its compile time is measured on the same schemas.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import time
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import schemas
from octavo.gpu_worker.protocol import NOT_READY_TOKEN
from octavo.gpu_worker.sampling.grammars import Grammars, refusals
from octavo.gpu_worker.sampling.settings import read_sampling_update
from octavo.gpu_worker.sampling.vocabulary import read_vocabulary
from octavo.services.gateway.constraints.grammar import grammar_of_schema
from octavo.worker.v1 import worker_pb2

_TOKENS = 100
_SEQUENCES = 16
_FORWARD_S = 0.005


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--schemas", type=int, default=50)
    given = parser.parse_args()
    vocab_size = json.loads((given.model / "config.json").read_text())["vocab_size"]
    grammars = Grammars(lambda: read_vocabulary(given.model, vocab_size), vocab_size, patience_s=None)
    grammars._tokenizer.result()
    rng = random.Random(0)
    drawn = [schemas.typical(rng) for _ in range(given.schemas)]
    first, each = [], []
    for schema in drawn:
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
    _measure_stalls(given.model, vocab_size, drawn)
    if importlib.util.find_spec("xgrammar") is not None:
        _report("xgrammar: compiling, ms", _xgrammar(given.model, vocab_size, drawn), 1e3)


def _measure_stalls(model: Path, vocab_size: int, drawn: list[schemas.Schema]) -> None:
    """Print what steps wait for masks after their forward pass, with the worker's own patience."""
    grammars = Grammars(lambda: read_vocabulary(model, vocab_size), vocab_size)
    grammars._tokenizer.result()
    rng = random.Random(0)
    stalls, num_late, num_rows = [], 0, 0
    for at in range(0, len(drawn), _SEQUENCES):
        updates = [
            worker_pb2.SamplingUpdate(top_p=1.0, grammar=grammar_of_schema(schema))
            for schema in drawn[at : at + _SEQUENCES]
        ]
        automata = [grammars.open(read_sampling_update(update, vocab_size)) for update in updates]
        wait([automaton.ready for automaton in automata])
        for _ in range(_TOKENS):
            for automaton in automata:
                allowed = np.flatnonzero(np.unpackbits(automaton.allowed.view(np.uint8), bitorder="little"))
                if not automaton.refusal and not automaton.is_late and len(allowed):
                    automaton.advance(int(rng.choice(allowed)))
            time.sleep(_FORWARD_S)
            began = time.perf_counter()
            codes = refusals(automata, [False] * len(automata), grammars.patience_s)
            stalls.append(time.perf_counter() - began)
            num_rows += len(codes)
            num_late += codes.count(NOT_READY_TOKEN)
    _report(f"stall of a step of {_SEQUENCES} rows, us", stalls, 1e6)
    print(f"rows whose mask was late: {num_late} of {num_rows}")


def _xgrammar(model: Path, vocab_size: int, drawn: list[dict[str, Any]]) -> list[float]:
    import xgrammar
    from transformers import AutoTokenizer

    info = xgrammar.TokenizerInfo.from_huggingface(AutoTokenizer.from_pretrained(model), vocab_size=vocab_size)
    compiler = xgrammar.GrammarCompiler(info, cache_enabled=False)
    took = []
    for schema in drawn:
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
