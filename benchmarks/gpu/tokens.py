"""The same tokens from the `cuda` device as from the `reference` device, through the whole worker."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from lab import Lab
from loop import make_engine, request, serve
from models import loaded_model
from report import Row
from small_models import DENSE, EXPERTS, small_model
from vectors import check_vectors

from octavo.gpu_worker.devices import make_runner
from octavo.gpu_worker.devices.cuda.runner import CudaRunner
from octavo.gpu_worker.engine import Engine
from octavo.gpu_worker.loading.loading import LoadedModel
from octavo.gpu_worker.ops import Ops
from octavo.gpu_worker.steps.runner import MAX_STEPS_IN_FLIGHT
from octavo.scheduler.v1 import scheduler_pb2
from octavo.worker.v1 import worker_pb2

Tokens = dict[int, list[int]]
_MAX_RUNNING, _MAX_BATCH_TOKENS, _BLOCKS = 8, 64, 300
_SAMPLED = {"temperature": 0.9, "top_k": 50, "top_p": 0.95}
_PENALTIES = {"temperature": 0.7, "min_p": 0.02, "repetition_penalty": 1.2, "presence_penalty": 0.5}


class Settings(TypedDict, total=False):
    """Settings of a `CudaRunner`."""

    device: str
    quantization: str
    wrap: Callable[[Ops], Ops]


def check_tokens(lab: Lab) -> Iterator[Row]:
    """Compare the devices on random models in float32, and on a real one if there is one."""
    # In 16 bits rounding decides near ties; in float32 the devices must agree.
    for name, settings in (("llama", DENSE), ("experts", EXPERTS)):
        yield from _same_tokens(lab, name, settings)
    for scheme in (scheme for scheme in ("int8", "fp8") if scheme in lab.linear_kinds):
        requests = _mixed_requests(DENSE["vocab_size"], lab.pick((12, 24, 90), (2, 2, 20)))
        on_device = _on_device(lab, small_model(DENSE), requests, quantization=scheme)
        expected = _on_reference(small_model(DENSE, stands_for=scheme), requests)
        yield _equal(f"llama with {scheme} weights", on_device, expected)
    yield from check_vectors(lab)
    if lab.model is not None:
        yield _real_model(lab, lab.model)


def _same_tokens(lab: Lab, name: str, settings: Mapping[str, Any]) -> Iterator[Row]:
    loaded = small_model(settings)
    requests = _mixed_requests(settings["vocab_size"], lab.pick((12, 24, 90), (3, 2, 20)))
    on_device = _on_device(lab, loaded, requests)
    yield _equal(name, on_device, _on_reference(loaded, requests))
    alone = [_on_device(lab, loaded, [submit]) for submit in requests[: lab.pick(4, 1)]]
    same = all(tokens.items() <= on_device.items() for tokens in alone)
    yield Row("tokens", f"{name}: the same tokens alone and in the batch", passed=same)


def _equal(name: str, found: Tokens, expected: Tokens) -> Row:
    wrong = sorted(handle for handle in expected if found.get(handle) != expected[handle])
    name = f"{name}: {len(expected)} requests, greedy and sampled, float32"
    return Row("tokens", name, passed=not wrong, note=f"requests {wrong} differ" if wrong else "")


def _real_model(lab: Lab, path: Path) -> Row:
    """Force a real model's own continuation on it, and count how often both devices choose the same next token."""
    loaded = loaded_model(path)
    random.seed(1)
    start = [random.randrange(5, 300) for _ in range(8)]
    (continuation,) = _on_reference(loaded, [request(1, start, lab.pick(48, 2))]).values()
    prefixes = [start + continuation[:length] for length in range(len(continuation))]
    requests = [request(index + 1, prefix, 1) for index, prefix in enumerate(prefixes)]
    chosen = _on_device(lab, loaded, requests)
    same = sum(chosen[index + 1] == [token] for index, token in enumerate(continuation))
    share = 100 * same / len(continuation)
    return Row(
        "tokens", f"{path.name}, next token as the reference", share, "%", at_least=90.0, note="near ties may differ"
    )


def _mixed_requests(vocab_size: int, sizes: tuple[int, int, int]) -> list[scheduler_pb2.Submit]:
    """Return so many requests for so many tokens, with prompts of at most so many."""
    count, num_new, longest = sizes
    random.seed(0)
    kinds: list[dict[str, float]] = [{}, _SAMPLED, _PENALTIES]
    lengths = [random.randrange(1, longest) for _ in range(count)]
    return [
        request(handle, [random.randrange(vocab_size) for _ in range(length)], num_new, **kinds[handle % 3])
        for handle, length in enumerate(lengths, start=1)
    ]


def device_engine(lab: Lab, loaded: LoadedModel, **settings: Unpack[Settings]) -> Engine:
    """Return an engine with the `cuda` device."""
    settings = {"device": lab.device, **settings}
    runner = CudaRunner(loaded.model, *_limits(loaded), **settings)
    return make_engine(runner, loaded, _MAX_RUNNING, _MAX_BATCH_TOKENS, _BLOCKS)


def tokens_of(engine: Engine, plans: Sequence[worker_pb2.StepPlan]) -> list[list[int]]:
    """Compute plans that were made beforehand; return the tokens of each."""
    made = []
    for plan in plans:
        if engine.num_in_flight == MAX_STEPS_IN_FLIGHT:
            made.append(engine.collect().token_ids)
        engine.start(plan)
    while engine.num_in_flight:
        made.append(engine.collect().token_ids)
    return [array("I", token_ids).tolist() for token_ids in made]


def _on_device(
    lab: Lab, loaded: LoadedModel, requests: list[scheduler_pb2.Submit], **settings: Unpack[Settings]
) -> Tokens:
    return serve(device_engine(lab, loaded, **settings), requests).tokens


def _on_reference(loaded: LoadedModel, requests: list[scheduler_pb2.Submit]) -> Tokens:
    runner = make_runner("reference", loaded.model, *_limits(loaded))
    return serve(make_engine(runner, loaded, _MAX_RUNNING, _MAX_BATCH_TOKENS, _BLOCKS), requests).tokens


def _limits(loaded: LoadedModel) -> tuple[int, int, int]:
    return _MAX_BATCH_TOKENS, _MAX_RUNNING, -(-loaded.max_model_len // 16)
