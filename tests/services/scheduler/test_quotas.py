"""Tenants have quotas, and what they are refused says when to come back."""

from __future__ import annotations

import pytest
from google.rpc import code_pb2

from octavo.common.v1 import common_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.admission import estimators
from octavo.services.scheduler.config import Quota, SchedulerConfig
from octavo.services.scheduler.queueing.quotas import BURST_S, Quotas

from .simulation import World

PROMPT = list(range(100, 140))


def test_a_tenant_has_only_so_many_requests_in_flight() -> None:
    world = World(tenant_max_requests=2, tenant_quotas=("big=0:0",))
    running = [world.submit(PROMPT, tenant="a") for _ in range(2)]
    refused = world.submit(PROMPT, tenant="a").rejected
    assert refused is not None
    assert (refused.code, refused.reason) == (code_pb2.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
    assert refused.retry_after_ms
    assert world.submit(PROMPT, tenant="b").admitted
    assert all(world.submit(PROMPT, tenant="big").admitted for _ in range(5))
    world.cancel(running[0])
    assert world.submit(PROMPT, tenant="a").admitted


def test_a_tenant_that_used_its_tokens_waits_until_the_bucket_fills() -> None:
    rate = 10.0
    world = World(tenant_tokens_per_s=rate)
    size = int(BURST_S * rate)
    first = world.submit(PROMPT, tenant="a", max_new_tokens=size)  # into debt by its prompt
    refused = world.submit(PROMPT, tenant="a").rejected
    assert refused is not None
    assert refused.reason == "QUOTA_EXCEEDED"
    assert refused.retry_after_ms == pytest.approx(1000 * len(PROMPT) / rate, rel=0.01)
    world.now += refused.retry_after_ms / 1000
    assert world.submit(PROMPT, tenant="a").admitted
    assert world.submit(PROMPT, tenant="a").rejected
    world.cancel(first)  # what it did not produce is given back
    assert world.submit(PROMPT, tenant="a").admitted


def test_a_request_that_goes_on_elsewhere_is_not_refused_for_its_quota() -> None:
    world = World(tenant_max_requests=1)
    world.submit(PROMPT, tenant="a")
    assert world.submit(PROMPT, tenant="a", continue_token_ids=[5], is_failover=True).admitted


def test_output_to_go_on_from_lifts_no_quota() -> None:
    world = World(tenant_max_requests=1)
    world.submit(PROMPT, tenant="a")
    refused = world.submit(PROMPT, tenant="a", continue_token_ids=[5]).rejected
    assert refused is not None
    assert refused.reason == "QUOTA_EXCEEDED"


@pytest.mark.parametrize("entry", ["a", "a=1", "a=x:1", "a=-1:1", "a=1:nan"])
def test_quotas_that_are_none_are_refused_at_the_start(entry: str) -> None:
    with pytest.raises(ValueError, match="tenant_quotas"):
        SchedulerConfig(tenant_quotas=(entry,))


def test_the_wait_is_estimated_by_how_fast_the_queue_moves() -> None:
    world = World(max_num_seqs=1, max_waiting=100, num_blocks=100)
    for n in range(20):
        world.submit([n + 1000] * 32, max_new_tokens=10)
    for _ in range(100):
        world.step()  # about ten steps of 10 ms for each of 32 tokens
    load = world.core.load(world.now)
    assert load.estimated_queue_ms == pytest.approx(load.waiting * 100, rel=0.3)
    late = world.submit([5] * 32, max_new_tokens=10, remaining_ms=load.estimated_queue_ms // 2)
    assert late.rejected is not None
    assert late.rejected.reason == "DEADLINE_UNREACHABLE"
    through_ms = (late.rejected.retry_after_ms + load.estimated_queue_ms // 2) / estimators.FIRST_MARGIN
    rest_and_own_ms = through_ms - load.estimated_queue_ms  # of who runs, and what it takes itself
    assert 100 <= rest_and_own_ms <= 260


def test_each_candidate_may_produce_its_output_and_is_charged_for_it() -> None:
    rate = 10.0
    world = World(tenant_tokens_per_s=rate)
    world.submit(PROMPT, tenant="a", candidate_count=4, max_new_tokens=200)

    refused = world.submit(PROMPT, tenant="a").rejected

    assert refused is not None
    assert refused.retry_after_ms == pytest.approx(1000 * ((len(PROMPT) + 4 * 200) / rate - BURST_S), rel=0.01)


def test_who_owes_tokens_owes_them_still_when_other_tenants_are_forgotten() -> None:
    quotas = Quotas(Quota(tokens_per_s=1.0), {})
    quotas._most_kept = 2
    for tenant, max_new_tokens in (("debtor", 1000), ("quiet", 1), ("third", 1)):
        submit = scheduler_pb2.Submit(tenant=tenant, stop=common_pb2.StopCriteria(max_new_tokens=max_new_tokens))
        quotas.charge(submit, 0.0)
        quotas.ended(submit, max_new_tokens)

    assert quotas.shortage("debtor", 0.0)[1] > 0
    assert quotas.shortage("quiet", 0.0)[1] == 0
    assert set(quotas._accounts) == {"debtor", "third"}
