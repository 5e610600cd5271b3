"""The same tokens from the `cuda` device as from the `reference` device, through the whole worker."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from lab import Lab
from loop import make_engine, request, serve
from models import TINY, loaded_model, random_model
from report import Row

from octavo.gpu_worker.devices import make_runner
from octavo.gpu_worker.devices.cuda import CudaRunner
from octavo.gpu_worker.loading import LoadedModel
from octavo.scheduler.v1 import scheduler_pb2

_MAX_RUNNING, _MAX_BATCH_TOKENS, _BLOCKS = 8, 64, 300
_SAMPLED = {"temperature": 0.9, "top_k": 50, "top_p": 0.95}
_PENALTIES = {"temperature": 0.7, "min_p": 0.02, "repetition_penalty": 1.2, "presence_penalty": 0.5}


def check_tokens(lab: Lab) -> Iterator[Row]:
    """Compare the devices on a random model in float32, and on a real one if there is one."""
    # In 16 bits rounding decides near ties; in float32 the devices must agree.
    loaded = random_model(Lab(interpreted=True), TINY, 512, torch.float32)
    requests = _mixed_requests(TINY.vocab_size, lab.pick((12, 24), (3, 3)))
    on_device, expected = _on_device(lab, loaded, requests), _on_reference(loaded, requests)
    wrong = sorted(handle for handle in expected if on_device.get(handle) != expected[handle])
    name = f"{len(requests)} requests, greedy and sampled, float32"
    yield Row("tokens", name, passed=not wrong, note=f"requests {wrong} differ" if wrong else "")
    alone = [_on_device(lab, loaded, [submit]) for submit in requests[: lab.pick(4, 1)]]
    same = all(tokens.items() <= on_device.items() for tokens in alone)
    yield Row("tokens", "the same tokens alone and in the batch", passed=same)
    if lab.model is not None:
        yield _real_model(lab, lab.model)


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


def _mixed_requests(vocab_size: int, sizes: tuple[int, int]) -> list[scheduler_pb2.Submit]:
    count, num_new = sizes
    random.seed(0)
    kinds: list[dict[str, float]] = [{}, _SAMPLED, _PENALTIES]
    lengths = [random.randrange(1, 90) for _ in range(count)]
    return [
        request(handle, [random.randrange(vocab_size) for _ in range(length)], num_new, **kinds[handle % 3])
        for handle, length in enumerate(lengths, start=1)
    ]


def _on_device(lab: Lab, loaded: LoadedModel, requests: list[scheduler_pb2.Submit]) -> dict[int, list[int]]:
    runner = CudaRunner(
        loaded.model, _MAX_BATCH_TOKENS, _MAX_RUNNING, -(-loaded.max_model_len // 16), device=lab.device
    )
    return serve(make_engine(runner, loaded, _MAX_RUNNING, _MAX_BATCH_TOKENS, _BLOCKS), requests).tokens


def _on_reference(loaded: LoadedModel, requests: list[scheduler_pb2.Submit]) -> dict[int, list[int]]:
    limits = (_MAX_BATCH_TOKENS, _MAX_RUNNING, -(-loaded.max_model_len // 16))
    runner = make_runner("reference", loaded.model, *limits)
    return serve(make_engine(runner, loaded, _MAX_RUNNING, _MAX_BATCH_TOKENS, _BLOCKS), requests).tokens
