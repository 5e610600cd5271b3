"""What outputs must look like: a client's constraint is tried out beside the gateway, and becomes a grammar.

`Constraints.grammar_of` is the one way from an OutputConstraint to what schedulers and workers carry.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import importlib.util
import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from octavo.common.v1 import common_pb2
from octavo.services.common.errors import FieldViolation, Reason, ServingError
from octavo.services.gateway.constraints.process import TOO_LARGE, TOO_LONG
from octavo.services.gateway.offload.limited_process import LimitedProcess
from octavo.services.gateway.offload.limited_server import Outcome

FIELD = "generation.constraint"
_MAX_CACHED = 512
_MAX_CACHED_BYTES = 1 << 24  # of grammars and messages
_MAX_WAITING = 256
_MODULE = "octavo.services.gateway.constraints.process"
Vocabulary = tuple[list[bytes], list[int]]
"""Bytes of each token, and the ids of special tokens."""


def available() -> bool:
    """Return whether grammars can be tried out here."""
    return importlib.util.find_spec("llguidance") is not None


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What came of a trial: a grammar, or what is wrong where. No exception: it would keep each call that it ended."""

    grammar: str = ""
    field: str = ""
    message: str = ""
    place: str = ""

    def value(self) -> str:
        """Return the grammar. Raises INVALID_CONSTRAINT."""
        if self.message:
            raise _invalid(self.field, self.message, self.place)
        return self.grammar

    @property
    def num_bytes(self) -> int:
        return len(self.grammar) + len(self.message)


class _Outcomes:
    """What came of the last trials, by tenant: how long a constraint takes tells nothing about other tenants.

    Where all are too many, the tenant with the most forgets its oldest one.
    """

    def __init__(self) -> None:
        self._by_tenant: dict[str, dict[bytes, _Outcome]] = {}  # oldest first
        self._count = self._num_bytes = 0

    def get(self, tenant: str, key: bytes) -> _Outcome | None:
        """Return what is known, and count it as the newest."""
        own = self._by_tenant.get(tenant, {})
        outcome = own.pop(key, None)
        if outcome is not None:
            own[key] = outcome
        return outcome

    def add(self, tenant: str, key: bytes, outcome: _Outcome) -> None:
        """Remember what was not known."""
        own = self._by_tenant.setdefault(tenant, {})
        if key in own:
            return
        own[key] = outcome
        self._count += 1
        self._num_bytes += outcome.num_bytes
        while self._count > _MAX_CACHED or self._num_bytes > _MAX_CACHED_BYTES:
            self._forget_one()

    def _forget_one(self) -> None:
        tenant = max(self._by_tenant, key=lambda each: len(self._by_tenant[each]))
        own = self._by_tenant[tenant]
        self._num_bytes -= own.pop(next(iter(own))).num_bytes
        self._count -= 1
        if not own:
            del self._by_tenant[tenant]


class Constraints:
    """Tries constraints out, `num_processes` at a time, and remembers what came of the last ones."""

    def __init__(self, vocabulary: Callable[[], Vocabulary], num_processes: int) -> None:
        """vocabulary: called in a thread, once for each process that is started."""
        self._process = LimitedProcess(
            _MODULE, lambda: _vocabulary_frame(vocabulary), num_processes, _MAX_WAITING, _busy
        )
        self._known = _Outcomes()
        self._trials: dict[tuple[str, bytes], asyncio.Task[_Outcome]] = {}

    def start(self) -> None:
        """Start the process in the background, so that the first constraint need not wait for it."""
        self._process.start_soon()

    async def close(self) -> None:
        """End the process."""
        await self._process.close()

    async def grammar_of(
        self, constraint: common_pb2.OutputConstraint, continued: Sequence[int] = (), tenant: str = ""
    ) -> str:
        """Return a constraint as the grammar that the scheduler carries to the workers.

        continued: output that is there already, which must match. Raises INVALID_CONSTRAINT, or QUEUE_FULL.
        """
        if continued:
            return (await self._try_out(constraint, continued, tenant)).value()
        key = hashlib.sha256(constraint.SerializeToString(deterministic=True)).digest()
        outcome = self._known.get(tenant, key)
        if outcome is None:
            outcome = await self._try_once(tenant, key, constraint)
        return outcome.value()

    async def _try_once(self, tenant: str, key: bytes, constraint: common_pb2.OutputConstraint) -> _Outcome:
        """Try a constraint out that is not known; a tenant's equal ones at the same time share one trial."""
        trial = self._trials.get((tenant, key))
        if trial is None:
            trial = asyncio.create_task(self._try_out(constraint, (), tenant))
            self._trials[tenant, key] = trial
            trial.add_done_callback(lambda _: self._trials.pop((tenant, key), None))
        outcome = await asyncio.shield(trial)
        self._known.add(tenant, key, outcome)
        return outcome

    async def _try_out(
        self, constraint: common_pb2.OutputConstraint, continued: Sequence[int], tenant: str
    ) -> _Outcome:
        """Return what came of a trial. Raises QUEUE_FULL."""
        kind = constraint.WhichOneof("kind")
        assert kind is not None, "the rules of the field ask for one"
        value = list(constraint.choices.values) if kind == "choices" else getattr(constraint, kind)
        if kind == "any_json":
            value = ""
        tokens = await asyncio.to_thread(_in_base64, continued) if continued else ""
        request = json.dumps({"kind": kind, "value": value, "continued": tokens}).encode()
        outcome, data = await self._process.ask(tenant, request)
        field = f"{FIELD}.{kind}"
        if outcome is not Outcome.DONE:
            return _Outcome(field=field, message=TOO_LONG if outcome is Outcome.TOO_LONG else TOO_LARGE)
        answer = json.loads(data)
        if "grammar" in answer:
            return _Outcome(grammar=answer["grammar"])
        return _Outcome(field=field, message=answer["error"], place=answer["place"])


def _vocabulary_frame(vocabulary: Callable[[], Vocabulary]) -> bytes:
    tokens, special = vocabulary()
    return json.dumps({"tokens": [token.decode("latin-1") for token in tokens], "special": special}).encode()


def _in_base64(token_ids: Sequence[int]) -> str:
    """Return token ids as little-endian uint32: a list of numbers in JSON would stop the event loop."""
    return base64.b64encode(array("I", token_ids).tobytes()).decode()


def _invalid(field: str, message: str, place: str) -> ServingError:
    if place == "continue_output":
        field, place = "generation.continue_output.ids", ""
    at = f"{place}: " if place else ""
    violation = FieldViolation(field, at + message)
    return ServingError(Reason.INVALID_CONSTRAINT, f"{field}: {at}{message}", violations=[violation])


def _busy() -> ServingError:
    message = "this gateway is busy with trying out other constraints; try again"
    return ServingError(Reason.QUEUE_FULL, message, retry_after_ms=500)
