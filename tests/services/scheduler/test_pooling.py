"""Requests for vectors: one sequence an input, whole where the model says so, and lost with no worker."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from google.rpc import code_pb2

from octavo.common.v1 import common_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.config import SchedulerConfig
from octavo.services.scheduler.core.effects import SendPlan
from octavo.services.scheduler.core.output_processor import WorkerMisbehavedError
from octavo.services.scheduler.core.scheduler import Scheduler
from octavo.services.scheduler.groups.worker_group import GENERATOR, GroupLimits, ModelInfo
from octavo.worker.v1 import worker_pb2

ENCODER = ModelInfo(common_pb2.MODEL_TASK_EMBED, vector_size=4, whole_sequences=True)
DECODER = ModelInfo(common_pb2.MODEL_TASK_EMBED, vector_size=4)


class Bench:
    """A scheduler with workers of one model; `plans` and `messages` are what it sent."""

    def __init__(self, model: ModelInfo = ENCODER, **settings: Any) -> None:
        self.now = 1.0
        self.core = Scheduler(SchedulerConfig(**settings), self.now)
        self.model = model
        self.plans: list[worker_pb2.StepPlan] = []
        self.messages: list[scheduler_pb2.AttachResponse] = []
        self.epoch = 0

    def join(self, max_model_len: int = 64) -> None:
        self.epoch += 1
        blocks = 1 if self.model.whole_sequences else 32
        self.core.worker_joined("w", self.epoch, GroupLimits(blocks, max_model_len), self.now, self.model)
        self.settle()

    def submit(self, *inputs: list[int], handle: int = 1, **fields: Any) -> None:
        pooling = scheduler_pb2.Pooling(input_lengths=map(len, inputs), **fields)
        submit = scheduler_pb2.Submit(handle=handle, request_id=f"r{handle}", candidate_count=len(inputs))
        submit.prompt_token_ids.extend(token for tokens in inputs for token in tokens)
        submit.pooling.CopyFrom(pooling)
        self.core.submit("g", submit, self.now)
        self.settle()

    def settle(self) -> None:
        self.core.tick(self.now)
        self.core.schedule(self.now)
        for effect in self.core.take_effects():
            if isinstance(effect, SendPlan):
                self.plans.append(effect.plan)
            else:
                self.messages.append(effect.message)
        self.core.check_invariants()

    @property
    def num_open(self) -> int:
        """Plans that were not answered yet."""
        return sum(len(group.in_flight) for group in self.core._groups.values())

    def answer(self, plan: worker_pb2.StepPlan, **changes: Any) -> None:
        """Answer a plan: a row's vector is its length and first token."""
        rows = rows_of(plan)
        done = [tokens for tokens, flag in zip(rows, plan.row_flags, strict=True) if flag & 1]
        vectors = array("f", [value for tokens in done for value in (len(tokens), tokens[0], 0, 0)])
        fields = {"vectors": vectors.tobytes(), "vector_sizes": array("I", [4] * len(done)).tobytes(), **changes}
        self.now += 0.01
        self.core.step_done("w", worker_pb2.StepResult(step_id=plan.step_id, **fields), self.now)
        self.settle()

    def vectors(self) -> dict[tuple[int, int], tuple[float, float]]:
        """What came back, by handle and candidate."""
        found = {}
        for message in self.messages:
            outputs = message.step_outputs
            values, at = array("f", outputs.vectors), 0
            columns = (outputs.vector_handles, outputs.vector_candidate_indexes, outputs.vector_sizes)
            for handle, index, size in zip(*columns, strict=True):
                assert (handle, index) not in found, "sent twice"
                found[handle, index] = (values[at], values[at + 1])
                at += size
        return found


def rows_of(plan: worker_pb2.StepPlan) -> list[list[int]]:
    tokens, rows = array("I", plan.token_ids).tolist(), []
    for length in array("I", plan.query_lengths):
        rows.append(tokens[:length])
        tokens = tokens[length:]
    assert not tokens
    return rows


def test_each_input_is_a_sequence_and_gets_its_vector() -> None:
    bench = Bench()
    bench.join()
    bench.submit([5, 6, 7], [8], [9, 9], dimensions=3, second_segment_starts=[0, 0, 1])

    (plan,) = bench.plans
    assert sorted(rows_of(plan)) == [[5, 6, 7], [8], [9, 9]]
    assert plan.block_ids == b""
    assert {update.dimensions for update in plan.pooling_updates} == {3}
    assert [update.second_segment_start for update in plan.pooling_updates].count(1) == 1
    assert not plan.sampling_updates
    bench.answer(plan)

    assert bench.vectors() == {(1, 0): (3, 5), (1, 1): (1, 8), (1, 2): (2, 9)}
    assert bench.core.num_requests == 0


def test_an_encoder_never_computes_a_part_of_a_sequence_and_fills_its_steps() -> None:
    bench = Bench(max_num_batched_tokens=64, max_num_seqs=8)
    bench.join()
    bench.submit(*([7] * length for length in (40, 30, 20, 10, 60)))

    for plan in bench.plans:
        assert plan.num_tokens <= 64
        bench.answer(plan)

    assert sorted(len(row) for plan in bench.plans for row in rows_of(plan)) == [10, 20, 30, 40, 60]
    assert len(bench.plans) == 3  # 160 tokens in steps of 64: no step was left half empty
    assert len(bench.vectors()) == 5


def test_a_decoder_computes_long_inputs_in_chunks_with_blocks() -> None:
    bench = Bench(DECODER, max_num_batched_tokens=32, max_num_seqs=8)
    bench.join(max_model_len=512)
    bench.submit([7] * 80)
    for plan in bench.plans:
        bench.answer(plan)

    assert [plan.num_tokens for plan in bench.plans] == [32, 32, 16]
    assert [plan.row_flags for plan in bench.plans] == [b"\0", b"\0", b"\1"]
    assert len(array("I", bench.plans[0].block_ids)) == 5
    assert bench.vectors() == {(1, 0): (16, 7)}
    assert bench.core.load(bench.now).kv_blocks_free == 31


def test_a_prefix_is_computed_once_where_the_last_token_makes_the_vector() -> None:
    """The pairs of a ranking begin with the same query; with other vectors all hidden states are needed."""
    query = list(range(100, 140))  # two whole blocks, and a part
    documents = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    computed = {}
    for of_last_token in (False, True):
        model = ModelInfo(common_pb2.MODEL_TASK_SCORE, vector_size=4, of_last_token=of_last_token)
        bench = Bench(model, max_num_batched_tokens=256, max_num_seqs=8)
        bench.join(max_model_len=256)
        bench.submit(*(query + document for document in documents))
        for plan in bench.plans:
            bench.answer(plan)
        computed[of_last_token] = sum(plan.num_tokens for plan in bench.plans)
        assert len(bench.vectors()) == 3

    assert computed == {False: 3 * 43, True: 43 + 2 * 11}


def test_what_waits_for_a_worker_follows_its_model() -> None:
    """Whether prefixes are cached is known when the model is."""
    bench = Bench(ModelInfo(common_pb2.MODEL_TASK_SCORE, vector_size=4, of_last_token=True))
    bench.submit(list(range(40)), [*range(39), 50])
    bench.join()
    for plan in bench.plans:
        bench.answer(plan)

    assert sum(plan.num_tokens for plan in bench.plans) == 40 + 8


def test_a_lost_worker_costs_no_vector() -> None:
    bench = Bench()
    bench.join()
    bench.submit([1, 2], [3])
    bench.core.worker_lost("w", bench.now, crashed=True)
    bench.settle()
    bench.join()
    while len(bench.vectors()) < 2:  # the suspects run alone first
        bench.answer(bench.plans[-1])

    assert bench.vectors() == {(1, 0): (2, 1), (1, 1): (1, 3)}


def test_a_cancelled_request_is_not_computed_and_a_late_vector_is_dropped() -> None:
    bench = Bench()
    bench.join()
    bench.submit([1, 2])
    bench.core.cancel("g", scheduler_pb2.Cancel(handle=1), bench.now)
    bench.settle()
    bench.answer(bench.plans[0])

    assert bench.vectors() == {}
    assert bench.core.is_idle


def test_a_deadline_ends_what_waits() -> None:
    bench = Bench()
    bench.join()
    bench.core.submit(
        "g",
        scheduler_pb2.Submit(
            handle=1,
            prompt_token_ids=[1],
            candidate_count=1,
            remaining_ms=100,
            pooling=scheduler_pb2.Pooling(input_lengths=[1]),
        ),
        bench.now,
    )
    bench.now += 1
    bench.settle()

    assert bench.messages[-1].failed.code == code_pb2.DEADLINE_EXCEEDED


def test_a_vector_that_is_not_finite_ends_its_request_with_an_error() -> None:
    bench = Bench()
    bench.join()
    bench.submit([1, 2])
    bench.answer(bench.plans[0], vectors=b"", vector_sizes=array("I", [0]).tobytes())

    assert bench.messages[-1].failed.reason == "WORKER_FAULT"


@pytest.mark.parametrize(
    "changes", [{"vectors": b""}, {"vector_sizes": b""}, {"vector_sizes": array("I", [3]).tobytes()}]
)
def test_an_answer_that_does_not_fit_costs_the_worker(changes: dict[str, bytes]) -> None:
    bench = Bench()
    bench.join()
    bench.submit([1, 2])

    with pytest.raises(WorkerMisbehavedError):
        bench.answer(bench.plans[0], **changes)


def test_what_a_model_does_not_make_is_refused() -> None:
    generator = Bench(GENERATOR)
    generator.core.worker_joined("w", 1, GroupLimits(32, 64), generator.now)
    generator.submit([1])
    encoder = Bench()
    encoder.join()
    encoder.core.submit("g", scheduler_pb2.Submit(handle=2, prompt_token_ids=[1]), encoder.now)
    encoder.settle()

    for bench in (generator, encoder):
        rejected = bench.messages[-1].rejected
        assert (rejected.code, rejected.reason) == (code_pb2.FAILED_PRECONDITION, "FEATURE_DISABLED")


def test_what_came_before_the_first_worker_is_refused_when_that_one_says_what_it_makes() -> None:
    bench = Bench()
    bench.core.submit("g", scheduler_pb2.Submit(handle=1, prompt_token_ids=[1]), bench.now)
    bench.submit([1, 2], handle=2)
    bench.join()

    assert [m.failed.reason for m in bench.messages if m.HasField("failed")] == ["FEATURE_DISABLED"]
    bench.answer(bench.plans[0])
    assert bench.vectors() == {(2, 0): (2, 1)}


@pytest.mark.parametrize(
    ("inputs", "fields", "reason"),
    [
        ([[1] * 65], {}, "KV_CAPACITY_EXCEEDED"),
        ([[1]], {"dimensions": 5}, "INVALID_FIELD"),
        ([[1], []], {}, "INVALID_FIELD"),
    ],
)
def test_a_wrong_request_is_refused(inputs: list[list[int]], fields: dict[str, Any], reason: str) -> None:
    bench = Bench()
    bench.join(max_model_len=64)
    bench.now += 60.0  # no larger worker has joined by now
    bench.submit(*inputs, **fields)
    bench.submit([1] * 64, handle=2)

    assert bench.messages[0].rejected.reason == reason
    assert bench.messages[1].HasField("admitted")


def in_time(bench: Bench, handle: int, num_tokens: int, remaining_ms: int) -> bool:
    """Submit an input with a deadline; return whether it was let in."""
    submit = scheduler_pb2.Submit(handle=handle, request_id=f"r{handle}", candidate_count=1, remaining_ms=remaining_ms)
    submit.prompt_token_ids.extend([5] * num_tokens)
    submit.pooling.input_lengths.append(num_tokens)
    bench.core.submit("g", submit, bench.now)
    bench.settle()
    return bench.messages[-1].HasField("admitted")


def run(bench: Bench, fixed_s: float = 0.005, token_s: float = 0.0001) -> None:
    """Let steps take their time until nothing is left to do."""
    done = len(bench.plans) - bench.num_open
    while done < len(bench.plans):
        plan = bench.plans[done]
        done += 1
        bench.now += fixed_s + token_s * plan.num_tokens - 0.01
        bench.answer(plan)


@pytest.mark.parametrize("model", [ENCODER, DECODER], ids=["whole", "chunked"])
def test_inputs_are_let_in_while_steps_can_compute_them_in_time(model: ModelInfo) -> None:
    bench = Bench(model, max_num_batched_tokens=512, max_num_seqs=256)
    bench.join(max_model_len=512)
    handles = iter(range(1, 10_000))
    for num_tokens in (8, 64, 8, 64, 128, 8) * 4:  # the steps' times are known
        assert in_time(bench, next(handles), num_tokens, 600_000)
        run(bench)
    # A full step of 512 tokens takes 56 ms: a second has room for about 90 inputs of 100 tokens.
    admitted = sum(in_time(bench, next(handles), 100, 1000) for _ in range(200))
    before = bench.core.num_requests
    run(bench)

    assert 60 <= admitted <= 95
    assert before == admitted
    assert not [message for message in bench.messages if message.HasField("failed")], "all of them were in time"


def test_an_inputs_deadline_keeps_no_other_input_from_its_step() -> None:
    bench = Bench(max_num_batched_tokens=512, max_num_seqs=64)
    bench.join(max_model_len=512)
    for handle in range(1, 30):
        assert in_time(bench, handle, 16 * (1 + handle % 2), 600_000)
        run(bench)
    before = len(bench.plans)
    for handle in range(100, 132):
        assert in_time(bench, handle, 16, 12 if handle == 100 else 600_000)
    assert len(bench.plans) - before == 2, "one runs, the next waits beside the worker"
    assert len(rows_of(bench.plans[-1])) == 1
    bench.answer(bench.plans[-2])
    assert len(rows_of(bench.plans[-1])) == 30, "all others"
