"""A device whose layers are cut into KV groups gives the tokens of transformers, in so few blocks that they are reused.

The real scheduler plans: prompts share prefixes, lose their blocks to others, and their worker dies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.engine import Engine, make_engine
from octavo.gpu_worker.loading.loading import load_for_device
from octavo.gpu_worker.ops import kv_groups_of
from octavo.worker.v1 import worker_pb2
from tests.services.scheduler.simulation import World

from .tiny import make_checkpoint


class EngineWorker:
    """Executes plans like the simulation's worker, on a real engine."""

    not_finite_after: int | None = None

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.steps = 0
        engine.reset()

    def execute(self, plan: worker_pb2.StepPlan) -> worker_pb2.StepResult:
        self.steps += 1
        assert not self._engine.start(plan)
        return self._engine.collect()


def use(world: World, engine: Engine) -> None:
    world.workers["group-0"] = EngineWorker(engine)  # type: ignore[assignment]


def alone(model: Any, prompt: list[int], count: int) -> list[int]:
    """Return the tokens that transformers produces."""
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("name", "num_blocks"), [("gemma3", 27), ("gpt_oss", 20)])
def test_tokens_are_those_of_transformers_while_blocks_behind_windows_are_reused(
    name: str, num_blocks: int, tmp_path: Path
) -> None:
    model = make_checkpoint(tmp_path, name)
    config = WorkerConfig(model=str(tmp_path), device="reference")
    wanted = worker_pb2.WorkerConfig(max_batch_tokens=64, max_running=4, kv_groups=8, kv_blocks=num_blocks)
    engine = make_engine(load_for_device(config, lambda *_: None), config, wanted)
    windows = engine.limits.kv_windows
    assert sorted(windows)[0] == 0
    assert max(windows) > 0
    assert sum(windows) < 128
    whole = len(windows) * 12  # of the longest sequence, if nothing was given back
    assert whole > num_blocks - 1

    world = World(num_blocks=num_blocks, windows=windows, max_num_batched_tokens=64, max_num_seqs=4)
    use(world, engine)
    shared = torch.randint(0, 320, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [shared + [n] * 4 for n in (1, 2)] + [shared[:40] + [3] * 8, [4, 5, 6], [*shared, *shared[:60]]]
    first = world.submit(prompts[0], 30)
    world.run()
    streams = [first, *(world.submit(prompt, 30) for prompt in prompts[1:])]
    for number in range(60):
        world.step()
        if number == 12:
            world.lose("group-0", crashed=True)
            world.join("group-0")
            use(world, engine)
    world.run()
    for prompt, stream in zip(prompts, streams, strict=True):
        assert stream.tokens[0] == alone(model, prompt, 30)
    assert streams[1].finished[0].usage.cached_prompt_tokens > 0
    assert world.core._metrics.preemptions > 0 or name == "gpt_oss"  # whose windows are too short to be in the way


def test_layers_are_cut_into_groups_of_equal_size(tmp_path: Path) -> None:
    make_checkpoint(
        tmp_path, "gemma3", num_hidden_layers=6, layer_types=["sliding_attention"] * 4 + ["full_attention"] * 2
    )
    loaded = load_for_device(WorkerConfig(model=str(tmp_path), device="reference"), lambda *_: None)
    model: Any = loaded.model
    groups = kv_groups_of(model, 8)
    assert [bool(window) for window in groups.windows] == [False, True, True]
    assert groups.num_layers == 2
    assert groups.places == ((1, 0), (1, 1), (2, 0), (2, 1), (0, 0), (0, 1))
    assert kv_groups_of(model, 1).windows == (0,)
