"""In which order the queue is served."""

from __future__ import annotations

import random
from array import array

import pytest

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.queueing.fair_share import FairShare
from octavo.services.scheduler.queueing.policy import ShortestFirst
from octavo.services.scheduler.queueing.waiting_queue import TokenCounts, WaitingQueue
from octavo.services.scheduler.requests.outbox import Outbox
from octavo.services.scheduler.requests.sequence import Request, Sequence

from .simulation import World

AGEING = 100.0


def make_sequence(
    arrival: int, num_tokens: int, tenant: str = "t", admitted_at: float = 0.0, priority: int = 0
) -> Sequence:
    submit = scheduler_pb2.Submit(handle=arrival, tenant=tenant, priority=priority)
    request = Request(submit, "gateway", arrival, arrival, admitted_at, 1e9, 1e9)
    seq = Sequence(request, 0, array("I", [1] * num_tokens), num_tokens + 8, num_tokens + 8, Outbox())
    request.sequences.append(seq)
    return seq


def make_queue(weights: dict[str, float] | None = None) -> WaitingQueue:
    return WaitingQueue(FairShare(weights or {}), ShortestFirst(AGEING))


def in_order(queue: WaitingQueue) -> list[Sequence]:
    return list(queue.in_order(lambda _: True))


def draw_sequences(rng: random.Random, count: int, tenants: str) -> list[Sequence]:
    sequences = []
    for arrival in range(1, count + 1):
        seq = make_sequence(
            arrival, rng.randrange(1, 400), rng.choice(tenants), arrival * rng.random(), rng.randrange(-1, 2)
        )
        seq.num_preemptions = rng.random() < 0.2
        seq.request.num_blames = rng.random() < 0.05
        sequences.append(seq)
    return sequences


def test_a_tenants_order_is_blame_loss_priority_and_remaining_work_less_age_at_any_time() -> None:
    queue = make_queue()
    sequences = draw_sequences(random.Random(1), 200, "t")
    for seq in sequences:
        queue.add(seq)
    for now in (200.0, 1e6):

        def rank(seq: Sequence, now: float = now) -> tuple[float, ...]:
            stage = -seq.request.num_blames or not (seq.num_preemptions or seq.num_recoveries)
            age = AGEING * (now - seq.admitted_at)
            return stage, -seq.request.submit.priority, seq.num_uncomputed_tokens - age, seq.request.arrival

        assert in_order(queue) == sorted(sequences, key=rank)


def test_between_tenants_each_sequence_counts_as_served_when_the_next_is_chosen() -> None:
    rng = random.Random(2)
    queue = make_queue({"a": 3.0, "b": 0.5})
    for seq in draw_sequences(rng, 300, "abcde"):
        queue.add(seq)
    queue._fair_share.charge("c", 5000)
    queue._fair_share.charge("d", 100)
    share = queue._fair_share
    counters = {tenant: share.counter(tenant) for tenant in queue.tenants()}
    joined = {tenant: n for n, tenant in enumerate(queue.tenants())}
    lines = {tenant: [seq for _, seq in queue._by_tenant[tenant].entries] for tenant in queue.tenants()}
    expected = []
    while lines:
        tenant = min(lines, key=lambda name: (counters[name], joined[name]))
        seq = lines[tenant].pop(0)
        expected.append(seq)
        counters[tenant] += len(seq.token_ids) / share.weight(tenant)
        if not lines[tenant]:
            del lines[tenant]

    assert in_order(queue) == expected
    assert in_order(queue) == expected, "a walk changes nothing"
    queue.check_invariants()


def test_what_is_removed_during_a_walk_is_gone_and_nothing_is_left_out() -> None:
    rng = random.Random(3)
    queue = make_queue()
    sequences = draw_sequences(rng, 300, "abcdefgh")
    for seq in sequences:
        queue.add(seq)
    expected, taken = in_order(queue), []
    walk = queue.in_order(lambda _: True)
    for seq in walk:
        assert seq is expected.pop(0)
        if rng.random() < 0.6:
            queue.serve(seq)
            taken.append(seq)
        if len(taken) == 120:
            break
    walk.close()
    queue.check_invariants()
    assert set(queue) == set(sequences) - set(taken)
    assert set(in_order(queue)) == set(queue)


def test_what_a_group_cannot_run_costs_its_tenant_no_turn() -> None:
    queue = make_queue()
    unable = [make_sequence(n, 100, "mixed") for n in range(1, 50)]
    able = make_sequence(50, 200, "mixed")
    others = [make_sequence(n, 300, "other") for n in range(51, 60)]
    for seq in (*unable, able, *others):
        queue.add(seq)
    assert next(queue.in_order(lambda seq: seq not in unable)) is able


def test_the_work_that_waits_is_counted_by_tenant_and_priority() -> None:
    rng = random.Random(4)
    queue = make_queue()
    sequences = draw_sequences(rng, 100, "ab")
    for seq in sequences:
        queue.add(seq)
    for seq in rng.sample(sequences, 40):
        queue.remove(seq)
        sequences.remove(seq)
    for tenant in ("a", "b", None):
        for priority in (-1, 0, 1, None):
            expected = TokenCounts()
            for seq in sequences:
                submit = seq.request.submit
                if tenant in (None, submit.tenant) and (priority is None or submit.priority >= priority):
                    expected.add(TokenCounts.of(seq))
            assert queue.work(tenant, priority) == expected
    assert len(queue) == 60
    queue.work().add(TokenCounts(1, 1))  # the caller's own
    queue.check_invariants()


def test_a_position_is_how_many_of_the_tenant_and_about_how_many_of_others_come_before() -> None:
    queue = make_queue()
    sequences = [make_sequence(n, 100, "ab"[n % 2], admitted_at=n) for n in range(1, 101)]
    for seq in sequences:
        queue.add(seq)
    places = {seq: at for at, seq in enumerate(in_order(queue))}
    assert all(abs(queue.position(seq) - places[seq]) <= 2 for seq in sequences)
    alone = make_queue()
    for seq in sequences[::2]:
        alone.add(seq)
    assert [alone.position(seq) for seq in in_order(alone)] == list(range(50))


@pytest.mark.parametrize("crashed", [True, False])
def test_who_lost_its_worker_or_is_blamed_for_that_is_served_first(crashed: bool) -> None:
    world = World(max_num_seqs=1)
    poison = world.submit([1] * 40, tenant="t")
    others = [world.submit([n] * 8, tenant="t") for n in range(2, 30)]
    world.lose("group-0", crashed)
    world.join("group-0")
    world.step()
    assert poison.tokens[0]
    assert not any(stream.tokens[0] for stream in others)
