"""A request that the workers' model cannot compute costs itself only: not a worker, and no other request."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from octavo.common.v1 import common_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.admission.validation import vocabulary_mismatch as mismatch
from octavo.services.scheduler.config import SchedulerConfig
from octavo.services.scheduler.workers.membership import PAUSE_S, MemberEvents, Membership
from octavo.worker.v1 import worker_pb2

from .simulation import expected_output
from .test_engine import PROMPT, running, until

VOCAB = 50_000


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("prompt", {"prompt_token_ids": [5, VOCAB]}),
        ("continue_output", {"continue_token_ids": [VOCAB]}),
        ("sampling.logit_bias", {"sampling": common_pb2.SamplingParams(logit_bias={VOCAB: 1.0})}),
        ("sampling.allowed_token_ids", {"sampling": common_pb2.SamplingParams(allowed_token_ids=[VOCAB])}),
        ("sampling.bad_words", {"sampling": common_pb2.SamplingParams(bad_words_token_ids=[{"ids": [5, VOCAB]}])}),
        ("stop.stop_token_ids", {"stop": common_pb2.StopCriteria(stop_token_ids=[VOCAB])}),
        ("end_of_sequence_ids", {"end_of_sequence_ids": [VOCAB]}),
        ("logprobs", {"logprobs": VOCAB + 1}),
        ("prompt_logprobs", {"prompt_logprobs": VOCAB + 1}),
    ],
)
def test_every_token_id_of_a_request_is_held_against_the_vocabulary(name: str, fields: dict[str, Any]) -> None:
    submit = scheduler_pb2.Submit(**{"prompt_token_ids": [5], **fields})
    assert mismatch(submit, VOCAB).startswith(f"{name}: ")
    assert mismatch(submit, VOCAB + 1) == ""
    assert mismatch(submit, 0) == "", "the vocabulary is not known yet"


async def test_a_request_with_ids_that_the_model_lacks_is_refused_and_others_go_on(tmp_path: Path) -> None:
    async with running(tmp_path) as process:
        worker, gateway = process.worker(), process.gateway()
        await gateway.hello()
        await gateway.submit(1, sampling=common_pb2.SamplingParams(logit_bias={VOCAB: 1.0}))  # no worker: it waits
        await gateway.receive("admitted")
        await worker.join(vocab_size=VOCAB, tokenizer_sha256="json:ab")
        worker.work()
        assert (await gateway.receive("failed")).failed.reason == "INVALID_FIELD"

        await gateway.submit(2, end_of_sequence_ids=[VOCAB])
        rejected = (await gateway.receive("rejected")).rejected
        await gateway.submit(3)

        assert await gateway.finish(3) == expected_output(PROMPT, 8)
        assert (rejected.handle, rejected.code, rejected.reason) == (2, 3, "INVALID_FIELD")
        load = process.engine.load()
        assert (load.workers_ready, load.vocab_size, load.tokenizer_sha256) == (1, VOCAB, "json:ab")
        worker.close()


async def test_a_fault_of_one_slot_ends_its_request_and_not_the_worker(tmp_path: Path) -> None:
    async with running(tmp_path) as process:
        worker, gateway = await process.connect()
        await gateway.submit(2)
        await gateway.submit(1, cache_salt="bad")
        await until(lambda: process.engine.core.num_requests == 2)  # else the first may be through before it is there
        plan = (await worker.receive("step_plan")).step_plan
        while 1 not in [update.slot for update in plan.sampling_updates]:
            await worker.send(step_result=worker.model.execute(plan))
            plan = (await worker.receive("step_plan")).step_plan
        assert plan.num_sequences == 2
        fault = worker_pb2.WorkerFault(step_id=plan.step_id, reason="INVALID_PLAN", message="no such token", slot=1)
        await worker.send(worker_fault=fault)
        await worker.send(step_result=worker.model.execute(plan))
        worker.work()

        failed = (await gateway.receive("failed")).failed
        assert (failed.handle, failed.code, failed.reason) == (1, 13, "WORKER_FAULT")
        assert "no such token" in failed.message
        assert await gateway.finish(2) == expected_output(PROMPT, 8)
        assert 1 not in gateway.tokens
        assert process.engine.load().workers_ready == 1
        process.engine.core.check_invariants()

        late = worker_pb2.WorkerFault(step_id=plan.step_id, reason="INVALID_PLAN", slot=1)  # about what has ended
        await worker.send(worker_fault=late)
        await gateway.submit(3)
        assert await gateway.finish(3) == expected_output(PROMPT, 8)
        worker.close()


class Members:
    """The membership of one group, and what it was sent."""

    def __init__(self) -> None:
        self.sent: list[worker_pb2.WorkerFrame] = []
        nothing = lambda *_: None  # noqa: E731
        events = MemberEvents(self._send, nothing, nothing, nothing, nothing, nothing)
        self.members = Membership(SchedulerConfig(), 1, events)

    def _send(self, identity: bytes, frame: worker_pb2.WorkerFrame) -> bool:
        self.sent.append(frame)
        return True

    def handle(self, now: float, epoch: int = 0, **kind: Any) -> None:
        self.members.handle(b"w", worker_pb2.WorkerFrame(protocol_revision=2, epoch=epoch, **kind), now)

    def join(self, now: float, until: float, answers: bool = False) -> float:
        """Say hello five times a second until there is an epoch; join, and break it at once. Return when it was."""
        while now < until:
            before = len(self.sent)
            self.handle(now, worker_hello=worker_pb2.WorkerHello(worker_id="w", world_size=1))
            if len(self.sent) > before:
                epoch = self.sent[-1].epoch
                self.handle(now, epoch, worker_ready=worker_pb2.WorkerReady(kv_blocks=9, max_model_len=99))
                if answers:
                    self.handle(now, epoch, step_result=worker_pb2.StepResult(step_id=1))
                self.handle(now, epoch, worker_fault=worker_pb2.WorkerFault(reason="INVALID_PLAN"))
                return now
            now += 0.2
        raise AssertionError("it never joined")


def test_a_worker_that_is_lost_again_and_again_joins_after_growing_pauses() -> None:
    world, now, joins = Members(), 1000.0, []
    while now < 1060:
        now = world.join(now, 1100)
        joins.append(now)
        now += 0.001

    assert joins[1] - joins[0] < 0.1, "one loss is nothing"
    pauses = [later - earlier for earlier, later in pairwise(joins[1:])]
    assert pauses[0] < pauses[1] < pauses[2], pauses
    assert max(pauses) <= PAUSE_S[1] + 0.4
    assert len(joins) < 25, "without pauses there were 60,000"


def test_an_answered_step_ends_the_pauses() -> None:
    world, now = Members(), 1000.0
    for _ in range(6):
        now = world.join(now, 1100) + 0.001

    now = world.join(now, 1100, answers=True)

    first = world.join(now + 0.001, 1100)
    second = world.join(first + 0.001, 1100)
    third = world.join(second + 0.001, 1100)
    assert second - now < 0.01
    assert third - second < 2 * PAUSE_S[0], "they begin anew"
