"""Runs steps on a GPU: Triton kernels and torch's matrix products, over buffers that are allocated once.

What plans refer to lives on the device. The host checks a plan and makes its work list; it sends the changes and
the columns of the step in one copy, launches, and goes on with the next plan. What was sampled stays on the
device for the next step; its copy for the scheduler is made on a second stream.

The same code runs on the CPU's memory, with `device="cpu"`, in Triton's interpreter: for tests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch

from octavo.gpu_worker.batch import Step
from octavo.gpu_worker.devices.cuda_accelerator import Accelerator, Event, make_accelerator
from octavo.gpu_worker.devices.cuda_graphs import Graphs, graph_sizes
from octavo.gpu_worker.devices.cuda_memory import MemoryReport, kv_memory_bytes
from octavo.gpu_worker.devices.cuda_ops import AttentionWork, CudaOps, StepTensors
from octavo.gpu_worker.devices.cuda_products import find_unstable_products, padded_rows
from octavo.gpu_worker.devices.cuda_sampling import Changes, DeviceSampler, TableWords, Wanted, advance, unpack
from octavo.gpu_worker.devices.cuda_step import Columns, Int32Array, Layout, Planner, Sizes, Staging, aligned
from octavo.gpu_worker.devices.cuda_weights import Buffers, Weights
from octavo.gpu_worker.errors import DeviceError
from octavo.gpu_worker.grammars import Automaton, Grammars
from octavo.gpu_worker.ops import Model, Ops
from octavo.gpu_worker.protocol import BLOCK_SIZE
from octavo.gpu_worker.quantization import Quantization
from octavo.gpu_worker.runner import MAX_STEPS_IN_FLIGHT, Outcome
from octavo.kernels.configs import LINEAR_KINDS, attention_config
from octavo.kernels.paged_attention import partial_buffers, tile_queries
from octavo.kernels.step_inputs import prepare_rows

log = logging.getLogger("octavo.worker")

_PARTIAL_BYTES = 256 << 20
_CHANGE_WORDS = 1 << 18
_HOST_KV_BYTES = 512 << 20


class CudaRunner:
    """A `Runner`. Its weights, buffers and graphs are ready when `allocate_kv` returns; some graphs follow when idle.

    memory  where the memory went, from `allocate_kv` on
    """

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
        grammars: Grammars | None = None,
    ) -> None:
        """Move the weights and run a step of padding, which allocates every buffer.

        device          "cuda" or "cuda:1"; "cpu" for tests
        kv_cache_dtype  "auto", the type of the weights, or "fp8" (float8_e4m3fn)
        quantization    a value of `Quantization`: how the weights of linear layers are kept
        wrap            called with the operations of each step that is launched or captured; what it returns is
                        what the model's `forward` gets
        grammars        what reads those of slots; None: no slot may have one

        Raises DeviceError if there is no such GPU, or it cannot do what is asked.
        """
        self.name = "cuda"
        self._accelerator = accelerator = make_accelerator(device)
        self._model = model
        self._wrap = wrap
        self._max_batch_tokens, self._max_running = max_batch_tokens, max_running
        heads, target = model.heads, accelerator.target
        self._dtype = model.dtype
        self._cache_dtype = _cache_dtype(kv_cache_dtype, self._dtype, target)
        self._attention = attention_config(target, "mixed", heads.head_dim, is_float32=self._dtype == torch.float32)
        where = accelerator.device
        with torch.no_grad(), accelerator.computing():
            self._weights = Weights(where, self._dtype, _quantization(quantization, target))
            self._buffers = Buffers(padded_rows(max_batch_tokens), where)
            self._sampler = DeviceSampler(max_running, model.vocab_size, where, target, grammars)
            self._block_tables = _words(where, max_running, max_blocks_per_sequence)
            self._row_tables = _words(where, max_running, max_blocks_per_sequence)
            self._tokens = _words(where, 3, aligned(max_batch_tokens))
            self._held_rows = _words(where, 2, max_running)  # of a step that waits for masks
            self._max_slots = self._count_partial_slots(max_blocks_per_sequence)
            self._partial, self._stats = partial_buffers(
                self._attention, self._max_slots, heads.num_kv_heads, heads.head_dim, where
            )
            self.kv_cache = self._make_cache(1)
            windows, self._dry_logits = self._dry_run()
        queries = tile_queries(self._attention, heads.num_heads, heads.num_kv_heads)
        self._planner = Planner(self._attention, queries, windows, max_blocks_per_sequence, self._max_slots)
        num_words = self._planner.max_words(max_batch_tokens, max_running) + _CHANGE_WORDS
        with torch.no_grad(), accelerator.computing():
            self._staging = Staging(accelerator, num_words)
            num_words = self._sampler.max_result_words()
            self._results = [_Result(accelerator, num_words) for _ in range(MAX_STEPS_IN_FLIGHT)]
        self._num_started = 0
        self._unsampled: _RunningStep | None = None
        self._sizes = graph_sizes(min(max_running, max_batch_tokens))
        self._graphs = Graphs(self._sizes, self._capture)
        self._launched: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self.memory = MemoryReport(weights=self._weights.num_bytes, buffers=self._buffer_bytes())

    def kv_block_bytes(self) -> int:
        """Bytes that one block of 16 tokens takes, over all layers, keys and values."""
        heads = self._model.heads
        per_token = 2 * self._model.num_layers * heads.num_kv_heads * heads.head_dim * self._cache_dtype.itemsize
        return per_token * BLOCK_SIZE

    def kv_memory_bytes(self) -> int:
        """All that is left, but for graphs and a reserve."""
        if self._accelerator.device.type == "cpu":
            return _HOST_KV_BYTES
        return kv_memory_bytes(self._accelerator.free_bytes(), len(self._sizes))

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocate the zeroed cache, and capture the common graphs."""
        accelerator = self._accelerator
        with torch.no_grad(), accelerator.computing():
            self.kv_cache = self._make_cache(num_blocks)
            before = accelerator.free_bytes()
            self._check_products()
            self._sampler.warm_up(self._dry_logits, self._results[0].on_device)
            self._graphs.capture_common()
            accelerator.synchronize()
        self.memory.kv_cache, self.memory.kv_blocks = self.kv_cache.nbytes, num_blocks
        self.memory.free = accelerator.free_bytes()
        self.memory.graphs = max(before - self.memory.free, 0)
        log.info("device memory: %s", self.memory)

    def memory_used_bytes(self) -> int:
        """Memory of the device in use."""
        return self._accelerator.used_bytes()

    def reset(self) -> None:
        """Wait for what is under way. Slots that are opened again are written anew."""
        self._accelerator.synchronize()
        self._unsampled = None
        self._sampler.reset()

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
            self._send(self._changes(step), columns)
            for source, target in step.copy_pairs.tolist():
                self.kv_cache[:, target].copy_(self.kv_cache[:, source])
            if columns is None:
                running = _RunningStep(self, step, Wanted(0, []), result, began, began)
            else:
                launched = self._launch(columns.sizes) if graph_size is None else self._replay(graph_size)
                wanted = self._sampler.wanted(step.sampled_slots, columns.sizes.num_samples)
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
                logits, slots, positions = running.launched
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
                    self._send(changes, None)
                self._sampler.launch(logits, slots, positions, wanted, result.on_device[: wanted.num_words])
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

    # -- what the host sends ---------------------------------------------------------------------

    def _columns(self, step: Step) -> tuple[Columns | None, int | None]:
        """Return the columns of a step, if it has rows, and the size of the graph that runs it, if one does."""
        if not len(step.slots):
            return None, None
        columns = self._planner.columns(step)
        size = self._graphs.size_for(columns.sizes.num_rows)
        if size is None or not self._planner.fits(columns, size):
            return columns, None
        return self._planner.pad(columns, size), size

    def _changes(self, step: Step) -> Changes:
        """Return what a step changes in the tables on the device."""
        changes = Changes()
        for slot, settings in step.opened:
            self._sampler.open_slot(slot, settings, changes)
        counts = step.block_counts
        before = np.cumsum(counts) - counts
        rows = step.block_slots * self._block_tables.shape[1] + step.first_blocks
        places = np.arange(len(step.block_ids)) + np.repeat(rows - before, counts)
        changes.add(self._block_tables, places, step.block_ids.astype(np.int32))
        return changes

    def _send(self, changes: Changes, columns: Columns | None) -> None:
        """Copy columns and changes to the device, and launch the writing of the changes."""
        *early, last = changes.pieces(_CHANGE_WORDS)
        for piece in early:  # more than has room beside a step
            self._send_piece(piece, self._staging.begin(), 0)
        words, end = self._staging.begin(), 0
        if columns is not None:
            layout = Layout(columns.sizes)
            layout.fill(words, columns)
            end = layout.end
        self._send_piece(last, words, end)

    def _send_piece(self, piece: list[TableWords], words: Int32Array, start: int) -> None:
        """Send words, the first `start` of which are filled, with changes behind them."""
        launches = []
        for table, places, values in piece:
            count, width = len(places), aligned(len(places))
            words[start : start + count] = places
            words[start + width : start + width + count] = values
            launches.append((table, start, start + width, count))
            start += 2 * width
        self._staging.send(start)
        for table, first, second, count in launches:
            self._sampler.write(
                table, self._staging.words[first : first + count], self._staging.words[second : second + count]
            )

    # -- what a step launches --------------------------------------------------------------------

    def _launch(self, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Launch the forward pass; return the logits [R, vocab_size], and slot and position of each row."""
        views = Layout(sizes).views(self._staging.words)
        slots, query_start_loc, seq_lens, sent, logits_rows, sampled_slots, positions = views[:7]
        lists = iter(views[7:])
        attention = {
            window: [AttentionWork(next(lists), next(lists)) for _ in launches] for window, launches in sizes.attention
        }
        step = self._step_tensors(sizes.num_rows, sizes.num_tokens, query_start_loc, seq_lens, logits_rows, attention)
        prepare_rows(
            sent,
            slots,
            query_start_loc,
            seq_lens,
            self._sampler.last_tokens,
            self._block_tables,
            step.token_ids,
            step.positions,
            step.slot_mapping,
            step.block_tables,
        )
        logits: torch.Tensor = self._model.forward(self._wrap(self._ops(step)))
        return logits, sampled_slots, positions

    def _step_tensors(
        self,
        num_rows: int,
        num_tokens: int,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        logits_rows: torch.Tensor,
        attention: dict[int, list[AttentionWork]],
    ) -> StepTensors:
        token_ids, positions, slot_mapping = (self._tokens[row, :num_tokens] for row in range(3))
        return StepTensors(
            token_ids,
            positions,
            slot_mapping,
            query_start_loc,
            seq_lens,
            self._row_tables[:num_rows],
            logits_rows,
            attention,
        )

    def _ops(self, step: StepTensors) -> CudaOps:
        return CudaOps(
            step,
            self._weights,
            self._buffers,
            self.kv_cache,
            self._partial,
            self._stats,
            self._attention,
            self._accelerator.target,
            self._dtype,
            self._max_running,
        )

    def _capture(self, size: int) -> Callable[[], None]:
        """Capture the step of `size` rows, with nothing but padding in it."""
        self._send(Changes(), self._planner.padding(size))
        sizes = self._planner.graph_sizes(size)

        def run() -> None:
            self._launched[size] = self._launch(sizes)

        return self._accelerator.capture(run)

    def _replay(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self._graphs.replay(size)
        return self._launched[size]

    # -- memory ----------------------------------------------------------------------------------

    def _make_cache(self, num_blocks: int) -> torch.Tensor:
        heads = self._model.heads
        shape = (self._model.num_layers, num_blocks, 2, BLOCK_SIZE, heads.num_kv_heads, heads.head_dim)
        return torch.zeros(shape, dtype=self._cache_dtype, device=self._accelerator.device)

    def _count_partial_slots(self, max_blocks: int) -> int:
        """Return how many partial results of attention get memory: at least those of one tile."""
        heads, config = self._model.heads, self._attention
        slot_bytes = 4 * heads.num_kv_heads * config.block_m * (max(heads.head_dim, 16) + 2)
        pieces = -(-max_blocks * BLOCK_SIZE // config.split_keys)
        return max(pieces, min(self._max_running * pieces, _PARTIAL_BYTES // slot_bytes))

    def _dry_run(self) -> tuple[list[int], torch.Tensor]:
        """Run a step of one padding token: it moves every weight and makes every buffer.

        Returns the windows of the model's layers, and the logits [1, vocab_size].
        """
        device = self._accelerator.device
        self._tokens[2].fill_(-1)  # no place in the cache
        zero, one = _words(device, 1), _words(device, 1) + 1
        ends = torch.cat([zero, one])
        ops = self._ops(self._step_tensors(1, 1, ends, one, zero, {}))
        logits: torch.Tensor = self._model.forward(self._wrap(ops))
        return sorted(ops.windows), logits

    def _buffer_bytes(self) -> int:
        own = (self._block_tables, self._row_tables, self._tokens, self._partial, self._stats, self._staging.words)
        results = (result.on_device for result in self._results)
        tensors = sum(tensor.nbytes for tensor in (*own, *results))
        return tensors + self._buffers.num_bytes + self._sampler.num_bytes

    def _check_products(self) -> None:
        """Warn if this GPU's library gives a row other bits in another place."""
        if unstable := find_unstable_products(self._weights.matrices()):
            log.warning("matrix products of %s give a row bits that depend on its place in a step", unstable)


class _Result:
    """Where a step's result lies on the device, and where it is copied to."""

    def __init__(self, accelerator: Accelerator, num_words: int) -> None:
        self.on_device = _words(accelerator.device, num_words)
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
        launched: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """launched: the logits, and slot and position of each row; None without rows."""
        self._runner = runner
        self.slots = step.sampled_slots
        self.follows = step.sampled_follow
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


def _words(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32, device=device)


def _cache_dtype(name: str, dtype: torch.dtype, target: str) -> torch.dtype:
    if name == "auto":
        return dtype
    if target == "cuda:80":
        raise DeviceError("kv_cache_dtype fp8 needs a GPU of compute capability 9.0 or above; use auto")
    return torch.float8_e4m3fn


def _quantization(name: str, target: str) -> Quantization:
    scheme = Quantization(name)
    if scheme is not Quantization.NONE and scheme.value not in LINEAR_KINDS[target]:
        raise DeviceError(f"quantization {name} needs a GPU of compute capability 9.0 or above; use none or int8")
    return scheme
