"""When a worker is ready every kernel was compiled: no step waits for a compiler."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from driver import LIMITS, VOCABULARY, Driver, cuda_runner, load
from test_constrained import SETTINGS, STOP, TOKENS
from test_tokens import FEATURES
from test_vectors import engine_of, load_decoder, load_encoder, run_decoder, run_encoder
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

from octavo.gpu_worker.devices.cuda import runner as cuda
from octavo.gpu_worker.engine import Engine
from octavo.gpu_worker.sampling.grammars import Grammars
from octavo.gpu_worker.sampling.vocabulary import Vocabulary
from octavo.gpu_worker.steps.pooler import PoolingMode


class Compiler:
    """Takes the place of launches: notes by what Triton would look a kernel up, and computes nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.known: set[tuple[str, ...]] = set()
        self.late: set[tuple[str, ...]] = set()
        self.is_ready = False
        self._backend = make_backend(GPUTarget("cuda", 90, 32))
        self._binders: dict[str, Any] = {}
        monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **kwargs: self._launch(*args, **kwargs))

    def _launch(self, function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        name = function.__name__
        if name not in self._binders:
            compiled = JITFunction(function.fn, **function.kwargs)
            self._binders[name] = create_function_from_signature(compiled.signature, compiled.params, self._backend)
        _, specialization, options = self._binders[name](*args, **kwargs)
        key = (name, str(specialization), str(options))
        if self.is_ready and key not in self.known:
            self.late.add(key)
        self.known.add(key)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    # The host's accelerator captures nothing; a GPU's runs a step before it records it.
    def capture(_: object, run: Any) -> Any:
        run()
        return run

    monkeypatch.setattr("octavo.gpu_worker.devices.cuda.accelerator.HostAccelerator.capture", capture)
    return Compiler(monkeypatch)


MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "windows and biases": ("qwen2", {"sliding_window": 12}, {}),
    "norms of heads, int8": ("qwen3", {}, {"quantization": "int8"}),
    "experts": ("qwen2_moe", {}, {}),
}


@pytest.mark.parametrize(("name", "max_running"), [*((name, 5) for name in MODELS), ("llama", 3), ("llama", 4)])
def test_no_step_of_a_decoder_launches_a_kernel_that_was_not_compiled_before(
    name: str, max_running: int, tmp_path: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, config, options = MODELS[name]
    limits = replace(LIMITS, max_running=max_running)
    monkeypatch.setattr("driver.LIMITS", limits)
    grammars = Grammars(lambda: Vocabulary(TOKENS, [STOP]), VOCABULARY, patience_s=None)
    runner = cuda_runner(load(tmp_path, kind, **config), limits, grammars=grammars, **options)
    compiler.is_ready = True

    # What is sampled is always token 0, which no grammar allows.
    monkeypatch.setattr(cuda, "advance", lambda _, sampled, *__: sampled)
    for settings in (FEATURES, SETTINGS):
        driver = Driver(Engine(runner, limits, 96), seed=5)
        driver.run(settings, num_steps=16)
        driver.engine.reset()

    assert len(compiler.known) > 12
    assert compiler.late == set()


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("mode", ["cls", "last", "mean"])
def test_no_step_of_a_model_for_vectors_launches_a_kernel_that_was_not_compiled_before(
    kind: str, mode: PoolingMode, tmp_path: Path, compiler: Compiler
) -> None:
    loaded = load_encoder(tmp_path, "Bert") if kind == "encoder" else load_decoder(tmp_path)
    engine = engine_of(loaded, mode, "cuda")
    compiler.is_ready = True

    if kind == "encoder":
        run_encoder(engine)
    else:
        run_decoder(engine, 19)

    assert len(compiler.known) > 3
    assert compiler.late == set()


def test_a_runner_that_was_closed_is_gone_at_once(tmp_path: Path) -> None:
    """Its weights, cache and graphs: the next one takes as much memory."""
    model = load(tmp_path, "llama", num_hidden_layers=1)
    runner = cuda_runner(model)
    driver = Driver(Engine(runner, LIMITS, 96), seed=1)
    driver.run([{}, {}], num_steps=2)
    parts = (runner, runner.kv_cache, runner._model.weights, runner._sampler, runner._graphs, runner._results[0])
    gone = [weakref.ref(part) for part in parts]
    del parts
    gc.collect()
    gc.disable()
    try:
        driver.engine.close()
        assert [part() for part in gone[1:]] == [None] * 5
        del driver, runner
        assert gone[0]() is None
    finally:
        gc.enable()
