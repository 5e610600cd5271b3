"""Decides which worker loads which LoRA adapter, and what becomes of those that wait for it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

from google.rpc import code_pb2

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.adapter_names import name_of
from octavo.services.scheduler.core.effects import Effects
from octavo.services.scheduler.core.lifecycle import Lifecycle
from octavo.services.scheduler.core.metrics import SchedulerMetrics
from octavo.services.scheduler.groups.worker_group import WorkerGroup
from octavo.services.scheduler.queueing.waiting_queue import WaitingQueue
from octavo.services.scheduler.requests.sequence import Sequence, SequenceState
from octavo.worker.v1 import worker_pb2

MAX_CHECKS = 256  # that are not answered
MAX_KNOWN_SIZES = 10_000
NO_ADAPTERS = "the workers take no adapters: device cuda, a model over several processes and max_adapters 0 have none"


class AdapterLoads:
    """Loads what waiting sequences need, in the order in which they are served: what a tenant loads costs its share."""

    def __init__(
        self,
        groups: Mapping[str, WorkerGroup],
        waiting: WaitingQueue,
        effects: Effects,
        lifecycle: Lifecycle,
        metrics: SchedulerMetrics,
    ) -> None:
        self._groups = groups
        self._waiting = waiting
        self._effects = effects
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._sizes: dict[str, int] = {}  # bytes in memory, of adapters that were loaded or found no room
        self._checks: list[tuple[str, scheduler_pb2.CheckAdapter]] = []  # by whom
        self._unwanted: set[str] = set()

    def takes_any(self) -> bool:
        """Return whether a group takes adapters, or there is none to ask."""
        return not self._groups or any(group.adapters.max_adapters for group in self._groups.values())

    def check(self, gateway_id: str, check: scheduler_pb2.CheckAdapter) -> None:
        """Have an adapter loaded for a gateway that wants to know whether it can be."""
        self._unwanted.discard(check.adapter)
        if any(group.adapters.is_loaded(check.adapter) for group in self._groups.values()):
            self._answer(gateway_id, check, "")
        elif not self._groups:
            self._answer(gateway_id, check, "no worker is here to load it; try again")
        elif not self.takes_any():
            self._answer(gateway_id, check, NO_ADAPTERS)
        elif len(self._checks) >= MAX_CHECKS:
            self._answer(gateway_id, check, "too many adapters are being loaded; try again")
        else:
            self._checks.append((gateway_id, check))

    def gateway_lost(self, gateway_id: str) -> None:
        """Forget what a gateway asked."""
        self._checks = [each for each in self._checks if each[0] != gateway_id]

    def forget(self, key: str) -> None:
        """Let the workers forget an adapter as soon as nothing runs with it: its name is gone."""
        if any(key in group.adapters.held for group in self._groups.values()):
            self._unwanted.add(key)

    def plan(self) -> None:
        """Begin to load what is needed next, as far as workers take more."""
        if self._unwanted:
            self._drop_unwanted()
        if not self._waiting.adapters and not self._checks:
            self._close_none()
            return
        while any(group.adapters.can_load for group in self._groups.values()):
            wanted = self._next()
            if wanted is None:
                self._close_none()
                return
            if not self._load(*wanted):
                return

    def _close_none(self) -> None:
        for group in self._groups.values():
            group.adapters.closing = ""

    def _drop_unwanted(self) -> None:
        for key in list(self._unwanted):
            holders = [group for group in self._groups.values() if key in group.adapters.held]
            for group in holders:
                if group.adapters.held[key].is_idle and key not in self._waiting.adapters:
                    self._send(group, worker_pb2.WorkerFrame(adapter_drop=_drop(group.adapters.drop(key))))
            if not any(key in group.adapters.held for group in holders):
                self._unwanted.discard(key)

    def loaded(self, group: WorkerGroup, answer: worker_pb2.AdapterLoaded) -> None:
        """Take a worker's answer."""
        key = group.adapters.key_of(answer.adapter_id)
        if key is None or group.adapters.held[key].is_loaded:
            return  # of one that was dropped
        if answer.num_bytes:
            self._sizes.pop(key, None)
            self._sizes[key] = answer.num_bytes
            while len(self._sizes) > MAX_KNOWN_SIZES:
                del self._sizes[next(iter(self._sizes))]
        if not answer.problem:
            held = group.adapters.held[key]
            held.is_loaded, held.num_bytes = True, answer.num_bytes
            self._metrics.adapter_loads += 1
            self._answer_all(key, "")
            return
        group.adapters.drop(key)
        if not answer.is_full:  # else it is asked for again, with the size that is known now
            self._fail(key, answer.problem)

    def _fail(self, key: str, problem: str) -> None:
        """End what waits for an adapter that cannot be loaded."""
        self._answer_all(key, problem)
        waiting = [seq for seq in self._waiting if seq.request.adapter == key]
        for seq in waiting:
            if seq.state is not SequenceState.FINISHED:  # with its request, in this loop
                message = f"the adapter {name_of(key)!r} cannot be loaded: {problem}"
                self._lifecycle.fail(seq.request, code_pb2.FAILED_PRECONDITION, "ADAPTER_NOT_LOADED", message)

    def _next(self) -> tuple[str, str] | None:
        """Return key and path of the adapter that is needed next, and that a group can load now."""
        if any(not self._is_coming(key) for key in self._waiting.adapters):
            with closing(self._waiting.in_order(self._lacks)) as lacking:
                seq = next(lacking, None)
            if seq is not None:
                return seq.request.adapter, seq.request.submit.adapter_path
        return next(
            ((check.adapter, check.adapter_path) for _, check in self._checks if not self._is_coming(check.adapter)),
            None,
        )

    def _lacks(self, seq: Sequence) -> bool:
        return bool(seq.request.adapter) and not self._is_coming(seq.request.adapter)

    def _is_coming(self, key: str) -> bool:
        """Return whether a group that has a slot for it holds an adapter or loads it, or nobody else can."""
        holders = [group for group in self._groups.values() if key in group.adapters.held]
        others = [
            group
            for group in self._groups.values()
            if group.adapters.can_load and group not in holders and (group.free_slots or not holders)
        ]
        return not others or any(group.free_slots or not group.adapters.held[key].is_loaded for group in holders)

    def _load(self, key: str, path: str) -> bool:
        """Have the group that holds fewest load an adapter; False if none has room: then one begins to make it."""
        groups = [
            group for group in self._groups.values() if group.adapters.can_load and key not in group.adapters.held
        ]
        groups.sort(key=lambda group: (not group.free_slots, len(group.adapters.held)))
        for group in groups:
            begun = group.adapters.begin(key, self._sizes.get(key, 0), self._waiting.adapters)
            if begun is not None:
                dropped, adapter_id = begun
                for victim in dropped:
                    self._send(group, worker_pb2.WorkerFrame(adapter_drop=_drop(victim)))
                sha256 = key.rpartition("@")[2]
                load = worker_pb2.AdapterLoad(adapter_id=adapter_id, path=path, sha256=sha256)
                self._send(group, worker_pb2.WorkerFrame(adapter_load=load))
                return True
        groups[0].adapters.close_one()
        return False

    def _send(self, group: WorkerGroup, frame: worker_pb2.WorkerFrame) -> None:
        self._effects.send_frame(group, frame)

    def _answer_all(self, key: str, problem: str) -> None:
        """Answer those that asked for an adapter."""
        for gateway_id, check in [each for each in self._checks if each[1].adapter == key]:
            self._answer(gateway_id, check, problem)
        self._checks = [each for each in self._checks if each[1].adapter != key]

    def _answer(self, gateway_id: str, check: scheduler_pb2.CheckAdapter, problem: str) -> None:
        checked = scheduler_pb2.AdapterChecked(handle=check.handle, problem=problem)
        self._effects.send(gateway_id, scheduler_pb2.AttachResponse(adapter_checked=checked))


def _drop(adapter_id: int) -> worker_pb2.AdapterDrop:
    return worker_pb2.AdapterDrop(adapter_id=adapter_id)
