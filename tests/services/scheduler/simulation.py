"""A fake worker and gateway around the real scheduler core, for tests and the simulator.

The fake model: the "key and value" of a token is a rolling hash of all tokens up to it, stored in
the block the plan names and read back through the block table. So a block given out twice, a stale
cache hit, a wrong position or a token fed wrongly changes the output at once. In a KV group with a window
all that a row sees is read.
"""

from __future__ import annotations

import random
from array import array
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.config import SchedulerConfig
from octavo.services.scheduler.core.effects import SendFrame, SendPlan, SendToGateway
from octavo.services.scheduler.core.metrics import SchedulerMetrics
from octavo.services.scheduler.core.scheduler import Scheduler
from octavo.services.scheduler.groups.worker_group import GroupLimits
from octavo.worker.v1 import worker_pb2

VOCAB = 50_000
EOS = 7
MASK = (1 << 61) - 1
NOT_FINITE, NOT_READY = 0xFFFFFFFF, 0xFFFFFFFE


def roll(state: int, token: int) -> int:
    """Extend a rolling hash by a token."""
    return (state * 1_000_003 + token * 7_919 + 12_345) & MASK


def next_token(state: int, seed: int, candidate: int) -> int:
    """The fake model's choice after a context."""
    mixed = (state ^ (seed * 0x9E3779B97F4A7C15) ^ (candidate * 0xC2B2AE3D27D4EB4F)) & MASK
    return (mixed * 2_862_933_555_777_941_757 >> 13) % VOCAB


def of_adapter(sha256: str) -> int:
    """What the fake model begins with in a sequence that has an adapter."""
    return int(sha256[:15], 16)


def expected_output(
    prompt: list[int], count: int, seed: int = 0, candidate: int = 0, eos: int | None = None, adapter: str = ""
) -> list[int]:
    """What the fake model makes of a prompt, computed alone; with the adapter of a SHA-256, if that is given."""
    state = of_adapter(adapter) if adapter else 0
    for token in prompt:
        state = roll(state, token)
    output: list[int] = []
    while len(output) < count:
        output.append(next_token(state, seed, candidate))
        if output[-1] == eos:
            break
        state = roll(state, output[-1])
    return output


@dataclass
class Slot:
    seed: int
    candidate: int
    width: int
    prompt: array[int]  # where its log probabilities are wanted
    prompt_width: int
    block_tables: list[list[int]]
    last_sampled: int | None = None
    position: int = 0  # of that token
    is_late: bool = False
    start: int = 0  # where its rolling hash begins

    @property
    def block_table(self) -> list[int]:
        return self.block_tables[0]


class FakeWorker:
    """Executes plans in order, like a worker, on the fake model."""

    def __init__(self, num_blocks: int, block_size: int = 16, windows: tuple[int, ...] = (0,)) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.windows = windows
        self.before: dict[int, int] = {}  # the rolling hash without the last token
        self.cells: dict[tuple[int, int], int] = {}
        self.slots: dict[int, Slot] = {}
        self.steps = 0
        self.largest_step = 0
        self.max_num_batched_tokens = 0  # of a step; 0: any number
        self.not_finite_after: int | None = None
        self.max_row_tokens = 1
        self.adapters: dict[int, str] = {}  # SHA-256 by number
        self.num_guessed: Callable[[], int] = lambda: 0  # asked for each row of one token: how many more it gets
        self.is_row_late: Callable[[], bool] = lambda: False  # asked for each row that could get a token

    def execute(self, plan: worker_pb2.StepPlan) -> worker_pb2.StepResult:
        """Run one plan; assert that it is well formed."""
        self.steps += 1
        assert plan.step_id == self.steps, (plan.step_id, self.steps)
        for slot in array("I", plan.freed_slots):
            del self.slots[slot]
        for update in plan.sampling_updates:
            assert update.slot not in self.slots, f"slot {update.slot} was not free"
            width = update.logprobs if update.chosen_logprob else -1
            prompt = array("I", update.history_token_ids)[: update.prompt_length if update.prompt_logprobs else 0]
            tables: list[list[int]] = [[] for _ in self.windows]
            self.slots[update.slot] = Slot(
                update.seed, update.candidate_index, width, prompt, update.prompt_logprobs, tables
            )
            if update.adapter_id:
                self.slots[update.slot].start = of_adapter(self.adapters[update.adapter_id])
        new_blocks = iter(array("I", plan.block_ids))
        for row, count in zip(array("I", plan.block_table_rows), array("I", plan.block_table_counts), strict=True):
            blocks = [next(new_blocks) for _ in range(count)]
            slot, group = divmod(row, len(self.windows))
            assert all(block or self.windows[group] for block in blocks)
            assert all(block < self.num_blocks for block in blocks)
            self.slots[slot].block_tables[group] += blocks
        assert next(new_blocks, None) is None
        return self._step(plan)

    def _step(self, plan: worker_pb2.StepPlan) -> worker_pb2.StepResult:
        slots, lengths = array("I", plan.slot_indexes), array("I", plan.query_lengths)
        contexts, known = array("I", plan.context_lengths), iter(array("I", plan.token_ids))
        assert len(slots) == len(set(slots)) == plan.num_sequences == len(lengths) == len(contexts)
        assert sum(lengths) == plan.num_tokens
        assert plan.num_tokens <= self.max_num_batched_tokens or not self.max_num_batched_tokens, plan.num_tokens
        self.largest_step = max(self.largest_step, plan.num_tokens)
        result = worker_pb2.StepResult(step_id=plan.step_id)
        sampled_slots, tokens, counts, logprobs, ranks, ids, values = (
            array("I"), array("I"), array("I"), array("f"), array("I"), array("I"), array("f"),
        )  # fmt: skip
        for row, index in enumerate(slots):
            slot = self.slots[index]
            for token in slot.prompt[contexts[row] + 1 : contexts[row] + lengths[row] + 1]:
                logprobs.append(-float(token))
                ranks.append(2)
                ids.extend([token] * slot.prompt_width)
                values.extend([-float(token)] * slot.prompt_width)
        for row, index in enumerate(slots):
            slot, flags = self.slots[index], plan.row_flags[row]
            query = [next(known) for _ in range(lengths[row] - bool(flags & 2))]
            context = contexts[row]
            if flags & 2:
                assert slot.last_sampled is not None
                query.append(slot.last_sampled)
                assert self.max_row_tokens > 1 or context == slot.position - len(query) + 1
                context = slot.position - len(query) + 1
            if not flags & 1:
                self._write(slot, context, query)
                continue
            sampled_slots.append(index)
            counts.append(0)
            room = len(slot.block_table) * self.block_size - context
            assert room >= len(query) or self.max_row_tokens > 1
            num_rounds = 1 + (self.num_guessed() if len(query) == 1 else 0)
            assert num_rounds <= self.max_row_tokens
            is_late = slot.is_late and bool(flags & 2)
            for _ in range(num_rounds if is_late else min(num_rounds, room - len(query) + 1)):
                state = 0 if is_late else self._write(slot, context, query)
                slot.last_sampled = next_token(state, slot.seed, slot.candidate)
                slot.position = context + len(query)
                slot.is_late = is_late or self.is_row_late()
                answer = slot.last_sampled
                if slot.is_late:  # a row that goes on from here computes nonsense
                    answer, slot.last_sampled = NOT_READY, 1
                if query[-1] == self.not_finite_after:
                    answer = NOT_FINITE
                tokens.append(answer)
                counts[-1] += 1
                if slot.width >= 0:
                    logprobs.append(-float(slot.last_sampled % 7))
                    ranks.append(1)
                    ids.extend(range(slot.width))
                    values.extend(-float(n) for n in range(slot.width))
                if answer in (NOT_READY, NOT_FINITE):
                    break
                context, query = slot.position, [slot.last_sampled]
        assert next(known, None) is None
        result.slot_indexes, result.token_ids = sampled_slots.tobytes(), tokens.tobytes()
        if any(count != 1 for count in counts):
            result.token_counts = counts.tobytes()
        result.logprobs, result.ranks = logprobs.tobytes(), ranks.tobytes()
        result.candidate_token_ids, result.candidate_logprobs = ids.tobytes(), values.tobytes()
        return result

    def _write(self, slot: Slot, context: int, query: list[int]) -> int:
        def cell(group: int, position: int) -> tuple[int, int]:
            return slot.block_tables[group][position // self.block_size], position % self.block_size

        state = self.cells[cell(0, context - 1)] if context else slot.start
        for group, window in enumerate(self.windows):
            expected: int | None = state
            for position in range(context - 1, max(context - window, -1) if window else context - 1, -1):
                if self.cells.get(cell(group, position)) != expected:
                    state ^= MASK
                expected = self.before.get(expected) if expected is not None else None
        for offset, token in enumerate(query):
            before, state = state, roll(state, token)
            for group, window in enumerate(self.windows):
                assert cell(group, context + offset)[0]
                self.cells[cell(group, context + offset)] = state
                if window:
                    self.before[state] = before
        return state


@dataclass
class Stream:
    """What a client has seen of one request."""

    submit: scheduler_pb2.Submit
    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    finished: dict[int, scheduler_pb2.Finished] = field(default_factory=dict)
    admitted: bool = False
    rejected: scheduler_pb2.Rejected | None = None
    failed: scheduler_pb2.Failed | None = None
    cancelled: bool = False
    prompt_logprobs: list[float] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        done = len(self.finished) == max(self.submit.candidate_count, 1)
        return self.rejected is not None or self.failed is not None or self.cancelled or done


class World:
    """A scheduler, fake workers, and what gateways saw. Time moves only by `run`."""

    def __init__(
        self,
        num_blocks: int = 64,
        groups: int = 1,
        max_model_len: int = 4096,
        metrics: SchedulerMetrics | None = None,
        check: bool = True,
        scores_prompts: bool = True,
        max_row_tokens: int = 1,
        windows: tuple[int, ...] = (0,),
        max_adapters: int = 0,
        adapter_memory: int = 1000,
        **settings: object,
    ) -> None:
        """Make groups; a worker's adapters take 100 bytes each, and those whose path is "broken" cannot be loaded.

        max_row_tokens: steps make so many tokens of a row, at random but always in the same way.
        """
        self.max_adapters, self.adapter_memory = max_adapters, adapter_memory
        self.frames: dict[str, list[tuple[int, worker_pb2.WorkerFrame]]] = {}  # of adapters: after which plan
        self.num_loads = 0
        self.scores_prompts = scores_prompts
        self.max_row_tokens = max_row_tokens
        self.windows = windows
        self.config = SchedulerConfig(**settings)  # type: ignore[arg-type]
        self.check = check
        self.now = 1000.0
        self.core = Scheduler(self.config, self.now, metrics=metrics)
        self.streams: dict[tuple[str, int], Stream] = {}
        self.workers: dict[str, FakeWorker] = {}
        self.epochs: dict[str, int] = {}
        self.queues: dict[str, list[worker_pb2.StepPlan]] = {}
        self.handles = 0
        self.num_blocks, self.max_model_len = num_blocks, max_model_len
        self.plans: list[worker_pb2.StepPlan] = []  # all of them
        self.not_finite_after: int | None = None  # a row that ends with this token has no finite logits
        self.messages: list[scheduler_pb2.AttachResponse] = []
        self.others: list[scheduler_pb2.AttachResponse] = []
        for index in range(groups):
            self.join(f"group-{index}")

    def join(self, group_id: str, max_num_batched_tokens: int = 0, num_blocks: int = 0, max_model_len: int = 0) -> None:
        """Let a worker join, of its own size if that is given."""
        num_blocks, max_model_len = num_blocks or self.num_blocks, max_model_len or self.max_model_len
        self.epochs[group_id] = self.epochs.get(group_id, 0) + 1
        worker = self.workers[group_id] = FakeWorker(num_blocks, windows=self.windows)
        worker.max_num_batched_tokens = max_num_batched_tokens or self.config.max_num_batched_tokens
        worker.max_row_tokens = self.max_row_tokens
        rng = random.Random(f"{group_id} {self.epochs[group_id]}")
        worker.num_guessed = lambda: rng.randrange(self.max_row_tokens)
        self.queues[group_id] = []
        self.frames[group_id] = []
        epoch = self.epochs[group_id]
        limits = GroupLimits(
            num_blocks,
            max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            scores_prompts=self.scores_prompts,
            max_row_tokens=self.max_row_tokens,
            max_adapters=self.max_adapters,
            adapter_memory=self.adapter_memory,
            kv_windows=self.windows,
        )
        self.core.worker_joined(group_id, epoch, limits, self.now)
        self.settle()

    def lose(self, group_id: str, crashed: bool = False) -> None:
        del self.workers[group_id], self.queues[group_id], self.frames[group_id]
        self.core.worker_lost(group_id, self.now, crashed)
        self.settle()

    def submit(self, prompt: list[int], max_new_tokens: int = 8, gateway: str = "g", **fields: object) -> Stream:
        self.handles += 1
        sampling = fields.pop("sampling", {})
        stop = fields.pop("stop", {})
        submit = scheduler_pb2.Submit(
            handle=self.handles,
            request_id=str(fields.pop("request_id", f"r{self.handles}")),
            prompt_token_ids=prompt,
            sampling=sampling,  # type: ignore[arg-type]
            stop={"max_new_tokens": max_new_tokens, **stop},  # type: ignore[dict-item]
            **fields,  # type: ignore[arg-type]
        )
        stream = self.streams[gateway, self.handles] = Stream(submit)
        self.core.submit(gateway, submit, self.now)
        self.settle()
        return stream

    def cancel(self, stream: Stream, gateway: str = "g") -> None:
        stream.cancelled = True
        self.core.cancel(gateway, scheduler_pb2.Cancel(handle=stream.submit.handle), self.now)
        self.settle()

    def reattach(
        self, stream: Stream, gateway: str, offsets: list[int], epoch: int = 0, tenant: str | None = None
    ) -> Stream:
        """Take a stream over under a new handle; what comes back is in the stream returned."""
        self.handles += 1
        taken = self.streams[gateway, self.handles] = Stream(stream.submit, admitted=True)
        reattach = scheduler_pb2.Reattach(
            handle=self.handles,
            request_id=stream.submit.request_id,
            epoch=epoch,
            next_token_offsets=offsets,
            tenant=stream.submit.tenant if tenant is None else tenant,
        )
        self.core.reattach(gateway, reattach, self.now)
        self.settle()
        return taken

    def settle(self) -> None:
        """Schedule, and deliver all effects."""
        self.core.tick(self.now)
        self.core.schedule(self.now)
        for effect in self.core.take_effects():
            if isinstance(effect, SendPlan):
                assert effect.epoch == self.epochs[effect.group_id]
                self.queues[effect.group_id].append(effect.plan)
                self.plans.append(effect.plan)
                assert len(self.queues[effect.group_id]) <= 2
            elif isinstance(effect, SendFrame):
                sent = [plan.step_id for plan in self.queues[effect.group_id]]
                after = max(sent, default=self.workers[effect.group_id].steps)
                self.frames[effect.group_id].append((after, effect.frame))
            else:
                self.deliver(effect)
        if self.check:
            self.core.check_invariants()

    def deliver(self, effect: SendToGateway) -> None:
        message = effect.message
        self.messages.append(message)
        kind = message.WhichOneof("kind")
        if kind == "step_outputs":
            outputs = message.step_outputs
            for row in outputs.prompt_logprobs:
                stream = self.streams[effect.gateway_id, row.handle]
                assert row.position == len(stream.prompt_logprobs) + 1, "a gap, or known already"
                assert 0 not in stream.tokens, "after the first token"
                stream.prompt_logprobs += row.columns.chosen
                width = stream.submit.prompt_logprobs
                assert list(row.columns.candidate_logprobs[::width]) == list(row.columns.chosen)
            candidates = outputs.candidate_indexes or [0] * len(outputs.handles)
            counts, tokens = outputs.token_counts or [1] * len(outputs.handles), iter(outputs.token_ids)
            for handle, candidate, count in zip(outputs.handles, candidates, counts, strict=True):
                stream = self.streams[effect.gateway_id, handle]
                assert stream.admitted
                assert not stream.ended, f"output after the end of {handle}"
                assert candidate not in stream.finished
                stream.tokens[candidate] += [next(tokens) for _ in range(count)]
            assert next(tokens, None) is None
            for finished in outputs.finished:
                stream = self.streams[effect.gateway_id, finished.handle]
                assert finished.candidate_index not in stream.finished, "ended twice"
                assert not stream.ended
                stream.finished[finished.candidate_index] = finished
        elif kind in ("admitted", "rejected", "failed"):
            stream = self.streams[effect.gateway_id, getattr(message, kind).handle]
            assert not stream.ended
            if kind == "admitted":
                stream.admitted = True
            else:
                setattr(stream, kind, getattr(message, kind))
        else:
            self.others.append(message)

    def step(self, group_id: str = "group-0") -> bool:
        """Let a group execute its oldest plan, and load an adapter that it was told to; False if it has neither."""
        self.load_adapter(group_id)
        if not self.queues.get(group_id):
            return bool(self.frames.get(group_id))
        self.now += 0.01
        self.answer(group_id)
        return True

    def load_adapter(self, group_id: str) -> None:
        """Let a group do what it was told of adapters before its oldest plan, up to the first one that it loads."""
        worker, frames = self.workers.get(group_id), self.frames.get(group_id)
        while worker is not None and frames and frames[0][0] <= worker.steps:
            frame = frames.pop(0)[1]
            if frame.HasField("adapter_drop"):
                del worker.adapters[frame.adapter_drop.adapter_id]
                continue
            load = frame.adapter_load
            assert load.adapter_id not in worker.adapters, "the number is in use"
            answer = worker_pb2.AdapterLoaded(adapter_id=load.adapter_id, num_bytes=100)
            if load.path == "broken":
                answer.problem = "it is broken"
            elif 100 * len(worker.adapters) + 100 > self.adapter_memory:
                answer.problem, answer.is_full = "no room", True
            else:
                worker.adapters[load.adapter_id] = load.sha256
                self.num_loads += 1
            self.core.adapter_loaded(group_id, answer)
            self.settle()
            return

    def answer(self, group_id: str) -> None:
        """Let a group execute its oldest plan now."""
        worker = self.workers[group_id]
        worker.not_finite_after = self.not_finite_after
        result = worker.execute(self.queues[group_id].pop(0))
        self.core.step_done(group_id, result, self.now)
        self.settle()

    def would_feed(self, group_id: str, token: int) -> bool:
        """Return whether a group's oldest plan computes `token`."""
        plan, worker = self.queues[group_id][0], self.workers[group_id]
        fed = zip(array("I", plan.slot_indexes), plan.row_flags, strict=True)
        last = [worker.slots[slot].last_sampled for slot, flags in fed if flags & 2 and slot in worker.slots]
        return token in array("I", plan.token_ids) or token in last

    def run(self, max_steps: int = 10_000) -> None:
        """Step until nothing is left to do."""
        for _ in range(max_steps):
            moved = [self.step(group_id) for group_id in list(self.workers)]
            if not any(moved):
                return
        raise AssertionError("the work does not end")


def random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(10, VOCAB) for _ in range(length)]
