"""Runs steps on a GPU: Triton kernels and torch's matrix products, over buffers that are allocated once.

What plans refer to lives on the device. The host checks a plan and makes its work list; it sends the changes and
the columns of the step in one copy, launches, and goes on with the next plan. What was sampled stays on the
device for the next step; its copy for the scheduler is made on a second stream.

The same code runs on the CPU's memory, with `device="cpu"`, in Triton's interpreter: for tests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from octavo.gpu_worker.devices.cuda.accelerator import (
    Accelerator,
    Event,
    MemoryReport,
    kv_memory_bytes,
    make_accelerator,
)
from octavo.gpu_worker.devices.cuda.changes import Changes
from octavo.gpu_worker.devices.cuda.graphs import Graphs, graph_sizes
from octavo.gpu_worker.devices.cuda.model import DeviceModel, Launched, Limits, warn_of_unstable_products, words
from octavo.gpu_worker.devices.cuda.sampling import DeviceSampler, Wanted, advance, unpack
from octavo.gpu_worker.devices.cuda.step import Columns, Int32Array, aligned
from octavo.gpu_worker.devices.cuda.weights import Largest
from octavo.gpu_worker.ops import Model, NoAdapters, Ops
from octavo.gpu_worker.quantization import Quantization
from octavo.gpu_worker.sampling.grammars import Automaton, Grammars
from octavo.gpu_worker.steps.batch import Step
from octavo.gpu_worker.steps.runner import MAX_STEPS_IN_FLIGHT, Outcome

log = logging.getLogger("octavo.worker")


class CudaRunner(NoAdapters):
    """A `Runner`. Its weights, buffers and graphs are ready when `allocate_kv` returns; some graphs follow when idle.

    memory  where the memory went, from `allocate_kv` on
    """

    scores_prompts = False
    kv_windows: tuple[int, ...] = (0,)
    max_row_tokens = 1

    def __init__(
        self,
        model: Model,
        max_batch_tokens: int,
        max_running: int,
        max_blocks_per_sequence: int,
        *,
        device: str = "cuda",
        kv_cache_dtype: str = "auto",
        quantization: str = Quantization.NONE,
        wrap: Callable[[Ops], Ops] = lambda ops: ops,
        largest: Largest | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        """Move the weights and run a step of padding, which allocates every buffer.

        device          "cuda" or "cuda:1"; "cpu" for tests
        kv_cache_dtype  "auto", the type of the weights, or "fp8" (float8_e4m3fn)
        quantization    a value of `Quantization`: how the weights of linear layers are kept
        wrap            called with the operations of each step that is launched or captured; what it returns is
                        what the model's `forward` gets
        largest         as in `Weights`; None: the model is whole
        grammars        what reads those of slots; None: no slot may have one

        Raises DeviceError if there is no such GPU, or it cannot do what is asked.
        """
        self.name = "cuda"
        self._accelerator = accelerator = make_accelerator(device)
        limits = Limits(max_batch_tokens, max_running, max_blocks_per_sequence)
        self._model = DeviceModel(
            model,
            limits,
            accelerator,
            kv_cache_dtype=kv_cache_dtype,
            quantization=quantization,
            wrap=wrap,
            largest=largest,
        )
        with torch.no_grad(), accelerator.computing():
            self._sampler = DeviceSampler(self._model.last_tokens, model.vocab_size, accelerator.target, grammars)
            self._held_rows = words(accelerator.device, 2, aligned(max_running))  # of a step that waits for masks
            num_words = self._sampler.max_result_words()
            self._results = [_Result(accelerator, num_words) for _ in range(MAX_STEPS_IN_FLIGHT)]
        self._num_started = 0
        self._unsampled: _RunningStep | None = None
        self._sizes = graph_sizes(min(max_running, max_batch_tokens))
        self._graphs = Graphs(self._sizes, self._capture)
        self._launched: dict[int, Launched] = {}
        self.memory = MemoryReport(weights=self._model.weights.num_bytes, buffers=self._buffer_bytes())

    @property
    def kv_cache(self) -> torch.Tensor:
        """The cache of all layers, see `ops.CudaOps`."""
        return self._model.kv_cache

    def kv_block_bytes(self) -> int:
        """Bytes that one block of 16 tokens takes, over all layers, keys and values."""
        return self._model.kv_block_bytes()

    def kv_memory_bytes(self) -> int:
        """All that is left, but for graphs and a reserve."""
        return kv_memory_bytes(self._accelerator, len(self._sizes))

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocate the zeroed cache, and capture the common graphs."""
        accelerator = self._accelerator
        with torch.no_grad(), accelerator.computing():
            self._model.allocate_kv(num_blocks)
            before = accelerator.free_bytes()
            warn_of_unstable_products(self._model.weights)
            self._sampler.warm_up(self._model.dry_output, self._results[0].on_device)
            self._graphs.capture_common()
            accelerator.synchronize()
        self.memory.kv_cache, self.memory.kv_blocks = self.kv_cache.nbytes, num_blocks
        self.memory.free = accelerator.free_bytes()
        self.memory.graphs = max(before - self.memory.free, 0)
        log.info("device memory: %s", self.memory)

    def memory_used_bytes(self) -> int:
        """Memory of the device in use."""
        return self._accelerator.used_bytes()

    def progress(self) -> int:
        """0: what a GPU has done of a step cannot be seen from outside."""
        return 0

    def reset(self) -> None:
        """Wait for what is under way. Slots that are opened again are written anew."""
        self._accelerator.synchronize()
        self._unsampled = None
        self._sampler.reset()

    def close(self) -> None:
        """Wait for what is under way, and free weights, buffers and cache, and the graphs."""
        accelerator = self._accelerator
        accelerator.synchronize()
        vars(self).clear()  # also what refers to itself: a captured step knows its runner
        accelerator.release()

    def use_idle_time(self) -> bool:
        """Capture one more graph."""
        with torch.no_grad(), self._accelerator.computing():
            return self._graphs.capture_next()

    def start(self, step: Step) -> _RunningStep:
        """Launch a step. Does not wait for the device, unless masks of the step before are missing."""
        for _, settings in step.opened:
            self._sampler.check(settings)
        if self._unsampled is not None:  # the next step needs its tokens
            self._unsampled.sample()
        result = self._results[self._num_started % MAX_STEPS_IN_FLIGHT]
        self._num_started += 1
        for slot in step.freed_slots.tolist():
            self._sampler.free_slot(slot)
        with torch.no_grad(), self._accelerator.computing():
            began = self._accelerator.event()
            columns, graph_size = self._columns(step)
            self._model.send(self._changes(step), columns)
            self._model.copy_blocks(step.copy_pairs)
            if columns is None:
                running = _RunningStep(self, step, Wanted(0, []), result, began, began)
            else:
                launched = self._model.launch(columns.sizes) if graph_size is None else self._replay(graph_size)
                wanted = self._sampler.wanted(step.rows.sampled_slots, columns.sizes.num_samples)
                running = _RunningStep(self, step, wanted, result, began, self._accelerator.event(), launched)
        if running.constrained:
            self._unsampled = running
        else:
            running.sample()
        return running

    def sample(self, running: _RunningStep) -> dict[int, int]:
        """Launch the sampling of a step that was launched; return its rows that get no token, and why."""
        refused: dict[int, int] = {}
        self._unsampled = None
        wanted, result = running.wanted, running.result
        with torch.no_grad(), self._accelerator.computing():
            if wanted.num_rows and running.launched is not None:
                launched = running.launched
                slots, positions = launched.sampled_slots, launched.sampled_positions
                if running.constrained:
                    held = self._held_rows[:, : wanted.num_rows]
                    held[0].copy_(slots)  # they lie where the masks are sent to
                    held[1].copy_(positions)
                    slots, positions = held[0], held[1]
                    changes = Changes()
                    refused = self._sampler.refuse(
                        running.constrained,
                        running.slots,
                        running.follows,
                        lambda: not running.computed.is_past(),
                        changes,
                    )
                    self._model.send(changes, None)
                on_device = result.on_device[: wanted.num_words]
                self._sampler.launch(launched.output, slots, positions, wanted, on_device)
            running.ended = self._accelerator.event()
            running.copied = result.download(self._accelerator, wanted.num_words) if wanted.num_rows else running.ended
        return refused

    def outcome(self, running: _RunningStep) -> Outcome:
        """Return what a step has made; with its tokens, grammars advance."""
        assert running.ended is not None, "not sampled"
        sampled = unpack(running.result.on_host, running.wanted)
        if running.constrained:
            sampled = advance(running.constrained, sampled, running.wanted, running.refused)
        return Outcome(sampled, running.computed.us_since(running.began), running.ended.us_since(running.computed))

    def constrained(self, slots: Int32Array) -> list[tuple[int, Automaton]]:
        """Return the rows of a step that samples `slots` that have a grammar."""
        return self._sampler.constrained(slots)

    def _columns(self, step: Step) -> tuple[Columns | None, int | None]:
        """Return the columns of a step, if it has rows, and the size of the graph that runs it, if one does."""
        if not len(step.rows.slots):
            return None, None
        columns = self._model.planner.columns(step)
        size = self._graphs.size_for(columns.sizes.num_rows)
        if size is None or not self._model.planner.fits(columns, size):
            return columns, None
        return self._model.planner.pad(columns, size), size

    def _changes(self, step: Step) -> Changes:
        """Return what a step changes in the tables on the device."""
        changes = self._model.changes(step)
        for slot, settings in step.opened:
            self._sampler.open_slot(slot, settings, changes)
        return changes

    def _capture(self, size: int) -> Callable[[], None]:
        """Capture the step of `size` rows, with nothing but padding in it."""
        self._model.send(Changes(), self._model.planner.padding(size))
        sizes = self._model.planner.graph_sizes(size)

        def run() -> None:
            self._launched[size] = self._model.launch(sizes)

        return self._accelerator.capture(run)

    def _replay(self, size: int) -> Launched:
        self._graphs.replay(size)
        return self._launched[size]

    def _buffer_bytes(self) -> int:
        results = sum(result.on_device.nbytes for result in self._results)
        return self._model.num_bytes + self._sampler.num_bytes + results


class _Result:
    """Where a step's result lies on the device, and where it is copied to."""

    def __init__(self, accelerator: Accelerator, num_words: int) -> None:
        self.on_device = words(accelerator.device, num_words)
        self._pinned = accelerator.pinned(num_words)
        self.on_host: Int32Array = self._pinned.numpy()

    def download(self, accelerator: Accelerator, num_words: int) -> Event:
        """Launch the copy of the first words."""
        return accelerator.download(self.on_device[:num_words], self._pinned[:num_words])


class _RunningStep:
    """A step that was launched. It is sampled at once, or, if a row has a grammar, when the masks are known.

    Those follow from the tokens of the steps before, which must have been collected. `is_done` and `wait` are
    only called then, and so is `CudaRunner.start`, which needs this step to be sampled.
    """

    def __init__(
        self,
        runner: CudaRunner,
        step: Step,
        wanted: Wanted,
        result: _Result,
        began: Event,
        computed: Event,
        launched: Launched | None = None,
    ) -> None:
        """launched: the forward pass; None without rows."""
        self._runner = runner
        self.slots = step.rows.sampled_slots
        self.follows = step.rows.sampled_follow
        self.wanted = wanted
        self.result = result
        self.began = began
        self.computed = computed
        self.launched = launched
        self.ended: Event | None = None
        self.copied: Event | None = None
        self.refused: dict[int, int] = {}
        self.constrained = runner.constrained(self.slots)

    def sample(self) -> None:
        """Launch the sampling, once."""
        if self.copied is None:
            self.refused = self._runner.sample(self)

    def is_done(self) -> bool:
        """Tell whether what was sampled is here."""
        self.sample()
        assert self.copied is not None, "sampled"
        return self.copied.is_past()

    def wait(self) -> Outcome:
        """Wait for it."""
        self.sample()
        assert self.copied is not None, "sampled"
        self.copied.wait()
        return self._runner.outcome(self)
