"""Quotas and weights change while a scheduler runs, and nothing that runs is disturbed."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from octavo.services.scheduler.__main__ import serve
from octavo.services.scheduler.config import Quota, SchedulerConfig
from octavo.services.scheduler.engine import Engine
from octavo.services.scheduler.queueing.tenants import Tenants, parse_tenants

from .simulation import World

PROMPT = list(range(100, 140))
NONE = Tenants(Quota(), {}, {})


def changed(world: World, **quotas: Quota) -> None:
    world.core.change_tenants(Tenants(Quota(), quotas, {}), world.now)


def test_a_quota_counts_from_when_it_is_set_and_what_runs_counts_for_it() -> None:
    world = World()
    running = [world.submit(PROMPT, tenant="a") for _ in range(3)]

    changed(world, a=Quota(max_requests=3))

    assert world.submit(PROMPT, tenant="a").rejected.reason == "QUOTA_EXCEEDED"  # type: ignore[union-attr]
    assert world.submit(PROMPT, tenant="b").admitted
    world.cancel(running[0])
    assert world.submit(PROMPT, tenant="a").admitted
    assert world.submit(PROMPT, tenant="a").rejected


def test_a_quota_that_is_lifted_and_set_again_counts_nothing_twice() -> None:
    world = World(tenant_quotas=("a=1:0",))
    first = world.submit(PROMPT, tenant="a")
    changed(world)
    others = [world.submit(PROMPT, tenant="a") for _ in range(4)]
    for each in (first, *others[:-1]):
        world.cancel(each)

    changed(world, a=Quota(max_requests=2))

    assert world.submit(PROMPT, tenant="a").admitted
    assert world.submit(PROMPT, tenant="a").rejected


def test_a_weight_counts_from_when_it_is_set() -> None:
    world = World()
    for tenant in "ab":
        world.submit(PROMPT, tenant=tenant)
    world.core.change_tenants(Tenants(Quota(), {}, {"a": 3.0}), world.now)
    assert world.core._fair_share.weight("a") == 3.0
    world.core.check_invariants()  # the weights of those that wait are added up


def test_a_file_says_what_differs_from_the_settings() -> None:
    config = SchedulerConfig(
        tenant_max_requests=9, tenant_quotas=("a=1:5", "b=2:0"), tenant_weights=("a=4",), trusted_network=True
    )
    text = b"default: {tokens_per_s: 7}\ntenants: {a: {max_requests: 3}, c: {weight: 2}, d: {tokens_per_s: 1}}"
    assert parse_tenants(text, Tenants.of(config)) == Tenants(
        Quota(9, 7.0), {"a": Quota(3, 5.0), "b": Quota(2, 0.0), "d": Quota(9, 1.0)}, {"a": 4.0, "c": 2.0}
    )
    assert parse_tenants(b"", Tenants.of(config)) == Tenants.of(config)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "the file must be a mapping"),
        ("{tenant: {}}", "the file has 'tenant'"),
        ("tenants: [a]", "tenants must be a mapping"),
        ("tenants: {a: {max_request: 1}}", "tenants: a has 'max_request'"),
        ("tenants: {a: {max_requests: -1}}", "max_requests must be a whole number"),
        ("tenants: {a: {max_requests: 1.5}}", "max_requests must be a whole number"),
        ("tenants: {a: {tokens_per_s: .inf}}", "tokens_per_s must be a number"),
        ("tenants: {a: {weight: 0}}", "a weight must lie between 0 and 1,000,000"),
        ("default: {weight: 2}", "default has 'weight'"),
        ("default: {max_requests: yes}", "max_requests must be a number"),
        ("{", "is not YAML"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_tenants(text.encode(), NONE)


async def test_a_scheduler_follows_the_file_and_keeps_the_last_good_one(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text("tenants: {a: {max_requests: 3}}")
    engine = Engine(SchedulerConfig(worker_endpoint=f"ipc://{tmp_path}/w.sock", tenants_file=file))
    engine.start()
    try:
        assert engine.core.tenants.quotas == {"a": Quota(3)}
        for number, (text, quota) in enumerate(
            (("tenants: {a: {max_requests: 1}}", Quota(1)), ("tenants: {a: {max", Quota(1)), ("", None))
        ):
            file.write_text(text)
            os.utime(file, (number, number))
            async with asyncio.timeout(20):
                while engine.core.tenants.quotas.get("a") != quota:  # noqa: ASYNC110 - what a file does is no event
                    await asyncio.sleep(0.05)
    finally:
        await engine.stop()


async def test_a_file_that_is_wrong_at_the_start_ends_the_process_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text("tenants: 1")
    assert await serve(SchedulerConfig(worker_endpoint=f"ipc://{tmp_path}/w.sock", tenants_file=file)) == 1
    assert "tenants.yaml: tenants must be a mapping" in caplog.messages[-1]
