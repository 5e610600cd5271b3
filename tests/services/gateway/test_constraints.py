"""Constraints become grammars, or are refused with the place that is wrong; hostile ones harm nobody."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import weakref
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import psutil
import pytest
import pytest_asyncio

from octavo.common.v1 import common_pb2
from octavo.services.common.errors import ServingError
from octavo.services.gateway.config import GatewayConfig
from octavo.services.gateway.constraints import checker as module
from octavo.services.gateway.constraints.checker import Constraints
from octavo.services.gateway.constraints.grammar import grammar_of

from .conftest import until

VOCABULARY = ([*(bytes([byte]) for byte in range(256)), b"he", b'{"', b"<|end|>"], [258])


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def constraints() -> AsyncIterator[Constraints]:
    made = Constraints(lambda: VOCABULARY, num_processes=2)
    made.start()
    yield made
    await made.close()


pytestmark = pytest.mark.asyncio(loop_scope="module")


def schema(**fields: Any) -> common_pb2.OutputConstraint:
    return common_pb2.OutputConstraint(json_schema=json.dumps(fields))


def is_constraint_process(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):  # a zombie: what other tests left
        return "octavo.services.gateway.constraints.process" in process.cmdline()
    return False


async def refusal(constraints: Constraints, constraint: common_pb2.OutputConstraint) -> str:
    with pytest.raises(ServingError) as caught:
        await constraints.grammar_of(constraint)
    assert caught.value.reason == "INVALID_CONSTRAINT"
    return caught.value.message


@pytest.mark.parametrize(
    ("constraint", "grammar"),
    [
        (common_pb2.OutputConstraint(regex="a/b"), r"start: /a\/b/"),
        (common_pb2.OutputConstraint(choices={"values": ["yes", 'n"o', "yes"]}), r'start: "yes" | "n\"o"'),
        (common_pb2.OutputConstraint(grammar='start: "a"'), 'start: "a"'),
        (common_pb2.OutputConstraint(grammar='root ::= "a" | "b"'), '\nstart: "a"\n     | "b"\n\n'),
    ],
)
async def test_each_kind_becomes_a_grammar(
    constraints: Constraints, constraint: common_pb2.OutputConstraint, grammar: str
) -> None:
    assert await constraints.grammar_of(constraint) == '%llguidance {"no_forcing": true}\n' + grammar


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (common_pb2.OutputConstraint(json_schema='{"type": '), "json_schema: line 1, column 10: not JSON"),
        (common_pb2.OutputConstraint(json_schema="[1]"), "a schema must be an object"),
        (common_pb2.OutputConstraint(json_schema='{"a":' * 5000 + "1" + "}" * 5000), "nested too deeply"),
        (schema(type="strin"), "#: Invalid type: strin"),
        (
            schema(properties={"a/b": {"items": {"uniqueItems": True}}}),
            "#/properties/a~1b/items: uniqueItems cannot be kept to while tokens are drawn; leave it out",
        ),
        (schema(anyOf=[{"type": "string"}, {"type": "string", "pattern": "("}]), "#/anyOf/1: regex parse error"),
        (schema(**{"$ref": "#/$defs/gone"}), "does not exist"),
        (common_pb2.OutputConstraint(regex="(a"), "regex: invalid regex"),
        (common_pb2.OutputConstraint(regex=r"(a)\1"), "backreference"),
        (common_pb2.OutputConstraint(grammar='start: "a"\n  | c'), "grammar: line 1, column 8: unknown name"),
        (common_pb2.OutputConstraint(grammar="start: start"), "no text matches it"),
        (common_pb2.OutputConstraint(choices={"values": ["a\0"]}), "U+0000"),
    ],
)
async def test_what_cannot_be_kept_to_is_refused_with_its_place(
    constraints: Constraints, constraint: common_pb2.OutputConstraint, words: str
) -> None:
    assert words in await refusal(constraints, constraint)


@pytest.mark.parametrize(
    "constraint",
    [
        schema(properties={f"p{index}": {"type": "string", "pattern": f"^.{{{index}}}x.*$"} for index in range(9000)}),
        schema(allOf=[{"anyOf": [{"properties": {f"a{i}{j}": {"minimum": j}}} for j in range(7)]} for i in range(8)]),
    ],
    ids=["wide", "product"],
)
async def test_a_hostile_constraint_is_refused_and_the_next_one_works(
    constraints: Constraints, constraint: common_pb2.OutputConstraint
) -> None:
    with pytest.raises(ServingError) as caught:
        await constraints.grammar_of(constraint)

    # Where the processor is somebody else's, a trial may not even get the time that it may take.
    assert caught.value.reason in ("INVALID_CONSTRAINT", "QUEUE_FULL")
    assert await constraints.grammar_of(schema(type="integer", title=constraint.WhichOneof("kind")))


async def test_json_has_a_space_at_most_between_its_parts_unless_it_may_have_more() -> None:
    flexible, one_line, default = (
        grammar_of("json_schema", json.dumps({"type": "array", **options}))
        for options in (
            {"x-guidance": {"whitespace_flexible": True}},
            {"x-guidance": {"whitespace_flexible": False}},
            {},
        )
    )

    assert r'"whitespace_pattern": "[ \\n\\r\\t]{0,24}"' in flexible
    assert '"whitespace_pattern": " ?"' in one_line
    assert default == one_line
    assert '"whitespace_pattern": " ?"' in grammar_of("any_json", "")


async def test_a_format_that_nobody_knows_is_no_constraint(constraints: Constraints) -> None:
    fields = {"type": "object", "properties": {"format": {"type": "string", "format": "int32"}}}

    grammar = await constraints.grammar_of(schema(**fields))

    assert json.loads(grammar.split("%json ")[1])["properties"] == {"format": {"type": "string"}}


async def test_output_that_is_continued_must_match(constraints: Constraints) -> None:
    constraint = common_pb2.OutputConstraint(regex="hello|help")
    await constraints.grammar_of(constraint, list(b"hel"))

    with pytest.raises(ServingError, match="continued does not match") as caught:
        await constraints.grammar_of(constraint, list(b"ha"))
    assert caught.value.violations[0].field == "generation.continue_output.ids"


async def test_the_process_is_started_again_when_it_was_killed(constraints: Constraints) -> None:
    await constraints.grammar_of(schema(title="before"))
    (process,) = filter(is_constraint_process, psutil.Process().children())
    os.kill(process.pid, signal.SIGKILL)
    psutil.wait_procs([process])

    with contextlib.suppress(ServingError):  # it may not have been noticed yet: then the client is told to try again
        await constraints.grammar_of(schema(title="meanwhile"))
    assert "after" in await constraints.grammar_of(schema(title="after"))


async def test_nothing_is_left_of_a_process_that_was_not_ready_when_it_was_no_longer_wanted() -> None:
    before = set(psutil.Process().children())
    made = Constraints(lambda: VOCABULARY, num_processes=1)
    made.start()
    await until(lambda: bool(set(psutil.Process().children()) - before))

    await made.close()

    assert set(psutil.Process().children()) <= before


async def test_a_vocabulary_that_knows_no_json_has_constraints_too() -> None:
    made = Constraints(lambda: ([b"a", b"b", b"<|end|>"], [2]), num_processes=1)

    assert "start: /a+/" in await made.grammar_of(common_pb2.OutputConstraint(regex="a+"))

    await made.close()


async def test_equal_constraints_are_tried_out_once(constraints: Constraints, monkeypatch: pytest.MonkeyPatch) -> None:
    trials: list[str] = []
    try_out = Constraints._try_out

    async def counted(self: Constraints, constraint: common_pb2.OutputConstraint, *more: Any) -> Any:
        trials.append(constraint.json_schema)
        return await try_out(self, constraint, *more)

    monkeypatch.setattr(Constraints, "_try_out", counted)

    made = await asyncio.gather(*(constraints.grammar_of(schema(title="many")) for _ in range(8)))

    assert len(set(made)) == len(trials) == 1
    assert await constraints.grammar_of(schema(title="many")) == made[0]
    assert len(trials) == 1


async def test_refusals_keep_nothing_of_the_calls_that_they_end(constraints: Constraints) -> None:
    wrong = common_pb2.OutputConstraint(regex="(never closed")

    class Prompt:
        """Stands for what is in a call's frames."""

    prompts: list[weakref.ref[Prompt]] = []

    async def call() -> None:
        prompt = Prompt()
        prompts.append(weakref.ref(prompt))
        await constraints.grammar_of(wrong)
        del prompt

    for _ in range(1000):
        with pytest.raises(ServingError, match="invalid regex"):
            await call()

    gc.collect()
    assert not [prompt for prompt in prompts if prompt() is not None]


async def test_what_is_remembered_tells_nothing_to_another_tenant(
    constraints: Constraints, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials: list[str] = []
    try_out = Constraints._try_out

    async def counted(self: Constraints, constraint: Any, continued: Any, tenant: str) -> Any:
        trials.append(tenant)
        return await try_out(self, constraint, continued, tenant)

    monkeypatch.setattr(Constraints, "_try_out", counted)

    for tenant in ("a", "b", "a", "b"):
        await constraints.grammar_of(schema(title="secret"), tenant=tenant)

    assert trials == ["a", "b"]


async def test_many_constraints_of_one_tenant_push_out_its_own() -> None:
    outcomes = module._Outcomes()
    outcomes.add("small", b"kept", module._Outcome(grammar="g"))

    for index in range(2 * module._MAX_CACHED):
        outcomes.add("large", index.to_bytes(4), module._Outcome(grammar="g"))

    known = [index for index in range(2 * module._MAX_CACHED) if outcomes.get("large", index.to_bytes(4))]
    assert outcomes.get("small", b"kept") is not None
    assert known == list(range(module._MAX_CACHED + 1, 2 * module._MAX_CACHED))


async def test_what_is_remembered_has_a_limit_in_bytes() -> None:
    outcomes = module._Outcomes()

    for index in range(300):
        outcomes.add("tenant", index.to_bytes(4), module._Outcome(grammar="g" * (1 << 16)))

    known = [index for index in range(300) if outcomes.get("tenant", index.to_bytes(4))]
    assert known == list(range(300 - (module._MAX_CACHED_BYTES >> 16), 300))


# -- through a gateway -----------------------------------------------------------------------------


@pytest.fixture
def config(config: GatewayConfig) -> GatewayConfig:
    return replace(config, constraint_processes=1)


@pytest.mark.asyncio(loop_scope="function")
async def test_the_scheduler_gets_the_grammar(harness: Any, scheduler: Any) -> None:
    call = harness.stream(constraint={"choices": {"values": ["a", "b"]}})
    submit = await scheduler.next("submit")

    assert submit.constraint.grammar.endswith('start: "a" | "b"')
    call.cancel()


@pytest.mark.asyncio(loop_scope="function")
async def test_a_constraint_decides_where_the_output_ends(harness: Any, tools: Any) -> None:
    call = harness.stream(constraint={"any_json": True}, stop={"ignore_end_of_sequence": True})

    failure = await tools.rejection(call)

    assert list(failure.fields) == ["generation.stop.ignore_end_of_sequence"]
