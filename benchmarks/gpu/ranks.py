"""A model that is split over two GPUs makes the tokens of one; in the interpreter, over two processes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from lab import Lab
from loop import Engine, plans_of, request
from report import Row
from small_models import DENSE, EXPERTS, save_small_model
from tokens import Settings, device_engine, tokens_of

from octavo.gpu_worker.devices.cuda.parallel import over_ranks
from octavo.gpu_worker.loading.loading import load_model
from octavo.gpu_worker.loading.sharding import Sharding
from octavo.worker.v1 import worker_pb2

_WORLD_SIZE = 2
_SECONDS = 25.0


def check_ranks(lab: Lab) -> Iterator[Row]:
    """Compute the same plans on one device and on two."""
    if not lab.interpreted and torch.cuda.device_count() < _WORLD_SIZE:
        yield Row("ranks", "a model over two GPUs", note="skipped: one GPU is here")
        return
    for name, settings in (("llama", DENSE), ("experts", EXPERTS)):
        with tempfile.TemporaryDirectory() as folder:
            save_small_model(Path(folder), settings)
            found = _in_children(lab, Path(folder))
            expected = run_rank(lab, Path(folder), 0, 1)
        wrong = [rank for rank, tokens in enumerate(found) if tokens != expected]
        note = "; ".join(f"rank {rank}: {_difference(found[rank], expected)}" for rank in wrong)
        yield Row("ranks", f"{name} over two: the tokens of one", passed=not wrong, note=note)


def _in_children(lab: Lab, folder: Path) -> list[list[list[int]] | str]:
    """Return what each rank made in a process of its own: its tokens, or the last that it said."""
    own = Path(__file__)
    flags = ["--interpret"] if lab.interpreted else []
    results: list[list[list[int]] | str] = []
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(_WORLD_SIZE):
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            command = [sys.executable, str(own), str(folder), str(rank), *flags]
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            stack.callback(_end, process)
            ranks.append((process, output))
        for process, output in ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS * (8 if lab.interpreted else 1))
            output.seek(0)
            last = (output.read().strip().splitlines() or ["nothing was said"])[-1]
            results.append(json.loads(last) if process.returncode == 0 else last)
    return results


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _difference(found: list[list[int]] | str, expected: list[list[int]]) -> str:
    if isinstance(found, str):
        return found
    return f"differs from step {[one == two for one, two in zip(found, expected, strict=False)].index(False)} on"


def run_rank(lab: Lab, folder: Path, rank: int, world_size: int) -> list[list[int]]:
    """Return the tokens of each step, as one rank of `world_size` draws them."""
    loaded = load_model(folder, "auto", 0, lambda *_: None, Sharding(rank, world_size))
    settings: Settings = {}
    if world_size > 1:
        from octavo.gpu_worker.distributed.collectives import Collectives
        from octavo.gpu_worker.distributed.rendezvous import open_store

        store = open_store(f"file:{folder / 'store'}", world_size, _SECONDS)
        collectives = Collectives(store, rank, world_size, "127.0.0.1", _SECONDS)
        settings["wrap"] = over_ranks(collectives, loaded.model.vocab_size)
        if not lab.interpreted:
            settings["device"] = f"cuda:{rank}"
    engine = device_engine(lab, loaded, **settings)
    return tokens_of(engine, _plans(lab, engine))


def _plans(lab: Lab, engine: Engine) -> list[worker_pb2.StepPlan]:
    """Return the same plans on every rank: no clock has a part in them."""
    num_requests, shortest, num_new = lab.pick((6, 9, 12), (2, 3, 2))
    prompts = [[(17 * row + 5 * place) % 320 for place in range(shortest + 11 * row)] for row in range(num_requests)]
    requests = [request(row + 1, prompt, num_new) for row, prompt in enumerate(prompts)]
    return plans_of(engine, requests)


def main() -> int:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    interpreted = "--interpret" in sys.argv[3:]
    print(json.dumps(run_rank(Lab(interpreted=interpreted, tiny=interpreted), folder, rank, _WORLD_SIZE)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
