"""The membership knows which workers belong to this scheduler. Pure: no socket, no clock, no schedule.

A worker says hello, gets a configuration with a new epoch, and is ready. From then on it gets
plans and answers with results, all in that epoch. A worker that breaks the protocol, owes a step
for too long, or cannot be reached is out: its epoch ends, and it has to say hello again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container
from dataclasses import dataclass

from octavo.services.common.logging import RateLimiter
from octavo.services.common.protocol import PROTOCOL_REVISION, is_spoken
from octavo.services.scheduler.config import BLOCK_SIZE, SchedulerConfig
from octavo.services.scheduler.workers.liveness import Liveness
from octavo.worker.v1 import worker_pb2

log = logging.getLogger("octavo.scheduler")

HEARTBEAT_S = 0.025  # a heartbeat that cannot be delivered is how a dead worker is noticed
PAUSE_S = (0.25, 5.0)  # before a group joins again that was lost twice without answering a step, and at most
FORGET_S = 60.0  # after its last loss a group is treated like a new one
CONFIG_REPEAT_S = 1.0  # a worker that is not ready may not have got its configuration, or its answer was lost
MAX_WORKERS = 256
MAX_KV_GROUPS = 8
MAX_KV_BLOCKS = 1 << 22  # of a worker, 67 million tokens: each block takes memory here
# Faults that say nothing about what was being computed.
BLAMELESS_FAULTS = frozenset(
    ("STEP_GAP", "PROTOCOL_REVISION", "CONFIG_REFUSED", "INVALID_PLAN", "OUT_OF_MEMORY", "RANK_LOST")
)


@dataclass(eq=False)
class Member:
    """One worker process that has said hello. `identity` is its routing id, `revision` what it speaks."""

    identity: bytes
    hello: worker_pb2.WorkerHello
    revision: int
    epoch: int
    pulse: Liveness
    is_ready: bool = False
    last_sent: float = 0.0
    configured_at: float = 0.0
    has_answered: bool = False


@dataclass(frozen=True, slots=True)
class Losses:
    """Memberships of a group in a row that answered no step, and when it may have the next one."""

    count: int
    not_before: float


@dataclass
class MemberEvents:
    """What is reported; each is called with `now` last.

    send        deliver a frame to a routing id; False if nobody is there, or does not read
    ready       a worker takes part: its group, epoch and limits
    lost        one that took part no longer does: its group, and whether it died or hung
    step_done   a worker answered a plan
    fenced      worker of this id was given up, for the reason given; it may still be alive
    cannot_compute  a worker goes on without what a step says about one slot: group, step, slot, why (no `now`)
    adapter_loaded  a worker has loaded an adapter, or says why not: its group, and the answer (no `now`)
    """

    send: Callable[[bytes, worker_pb2.WorkerFrame], bool]
    ready: Callable[[str, int, worker_pb2.WorkerReady, float], None]
    lost: Callable[[str, bool, float], None]
    step_done: Callable[[str, worker_pb2.StepResult, float], None]
    fenced: Callable[[str, str], None]
    cannot_compute: Callable[[str, int, int, str], None]
    adapter_loaded: Callable[[str, worker_pb2.AdapterLoaded], None] = lambda *_: None


class Membership:
    """The workers by group. Rank 0 speaks for its group: one member each."""

    def __init__(self, config: SchedulerConfig, first_epoch: int, events: MemberEvents) -> None:
        """Epochs are given out from `first_epoch` on."""
        self._config = config
        self._events = events
        self._epoch = first_epoch
        self._groups: dict[str, Member] = {}
        self._by_identity: dict[bytes, Member] = {}
        self._losses: dict[str, Losses] = {}  # by group, the latest last
        self._dropped = RateLimiter(log)
        self.model_version = ""
        self.tokenizer_sha256 = ""
        self.notes: tuple[str, ...] = ()  # of the worker that came last

    # -- frames ----------------------------------------------------------------------------------

    def send_plan(self, group_id: str, epoch: int, plan: worker_pb2.StepPlan, now: float) -> None:
        """Send a plan to a group. A group that cannot be reached is lost."""
        frame = worker_pb2.WorkerFrame()
        frame.step_plan.CopyFrom(plan)  # in the constructor it would be serialized and parsed
        self.send_frame(group_id, epoch, frame, now)

    def send_frame(self, group_id: str, epoch: int, frame: worker_pb2.WorkerFrame, now: float) -> None:
        """Send a frame to a group that takes part. A group that cannot be reached is lost."""
        member = self._groups.get(group_id)
        if member is None or member.epoch != epoch:
            return  # lost in the meantime: the core hears of it, or has heard
        if not self._send(member, frame, now):
            self.give_up(group_id, "cannot be reached", now)

    def handle(self, identity: bytes, frame: worker_pb2.WorkerFrame, now: float) -> None:
        """Handle one frame of a worker. Whatever is wrong with it costs its sender, never this process."""
        if not is_spoken(frame.protocol_revision):
            self._dropped.warning(
                "revision",
                "refused a worker with protocol revision %d; this scheduler has %d: run the same version on both",
                frame.protocol_revision,
                PROTOCOL_REVISION,
            )
            return
        kind = frame.WhichOneof("kind")
        if kind == "worker_hello":
            self._on_hello(identity, frame, now)
            return
        member = self._by_identity.get(identity)
        if member is None or frame.epoch != member.epoch:
            self._fence(identity, frame)
            return
        member.pulse.heard(now)
        group_id = member.hello.group_id
        if kind == "heartbeat":
            member.pulse.beat(frame.heartbeat.progress, frame.heartbeat.processor_time_us, now)
        elif kind == "step_result" and member.is_ready:
            member.pulse.answered()
            if not member.has_answered:
                member.has_answered = True
                self._losses.pop(group_id, None)
            self._events.step_done(group_id, frame.step_result, now)
        elif kind == "adapter_loaded" and member.is_ready:
            self._events.adapter_loaded(group_id, frame.adapter_loaded)
        elif kind == "worker_ready":
            self._on_ready(member, frame.worker_ready, now)
        elif kind == "worker_fault" and frame.worker_fault.HasField("slot"):
            fault = frame.worker_fault
            log.warning("worker %s cannot compute slot %d: %s", member.hello.worker_id, fault.slot, fault.message)
            if member.is_ready:
                self._events.cannot_compute(group_id, fault.step_id, fault.slot, fault.message)
        elif kind == "worker_fault":
            fault = frame.worker_fault
            self._lose(
                group_id,
                f"{fault.reason}: {fault.message}",
                now,
                crashed=fault.reason not in BLAMELESS_FAULTS,
                is_alive=not fault.fatal,
            )

    def _fence(self, identity: bytes, frame: worker_pb2.WorkerFrame) -> None:
        """Tell a worker whose epoch has ended, here or with an earlier scheduler."""
        self._dropped.warning("epoch", "dropped a frame of an ended epoch or an unknown worker")
        member = self._by_identity.get(identity)
        if frame.epoch and (member is None or frame.epoch < member.epoch):
            fenced = worker_pb2.Fenced(reason="its work goes on elsewhere")
            answer = worker_pb2.WorkerFrame(protocol_revision=frame.protocol_revision, epoch=frame.epoch, fenced=fenced)
            self._events.send(identity, answer)

    def _on_hello(self, identity: bytes, frame: worker_pb2.WorkerFrame, now: float) -> None:
        """Give a worker its configuration and a new epoch."""
        hello = frame.worker_hello
        group_id = hello.group_id or hello.worker_id
        refusal = self._refusal(identity, hello)
        if refusal:
            self._dropped.warning("hello", "refused worker %s: %s", hello.worker_id, refusal)
            return
        known = self._by_identity.get(identity)
        if known is not None and not known.is_ready and now - known.configured_at < CONFIG_REPEAT_S:
            return  # its configuration is on the way
        if known is not None and known.hello.group_id != group_id:
            self._lose(known.hello.group_id, "is in another group now", now, crashed=False)
        if group_id in self._groups:
            self._lose(group_id, "starts over", now, crashed=True, is_alive=False)
        if group_id in self._losses and now < self._losses[group_id].not_before:
            return  # it says hello again
        self._epoch += 1
        member = Member(identity, worker_pb2.WorkerHello(), frame.protocol_revision, self._epoch, Liveness(now))
        member.hello.CopyFrom(hello)
        member.hello.group_id = group_id
        self._groups[group_id] = self._by_identity[identity] = member
        if hello.model_version != self.model_version:
            self.model_version, self.tokenizer_sha256, self.notes = hello.model_version, "", ()
        self._configure(member, now)

    def _refusal(self, identity: bytes, hello: worker_pb2.WorkerHello) -> str:
        """Return why a worker cannot take part, or nothing."""
        if hello.world_size < 1 or hello.rank:
            return f"it is rank {hello.rank} of {hello.world_size}; rank 0 joins for its group"
        if len(self._by_identity) >= MAX_WORKERS and identity not in self._by_identity:
            return f"there are {MAX_WORKERS} workers, which is the limit"
        others = any(member.identity != identity for member in self._by_identity.values())
        if others and self.model_version and hello.model_version != self.model_version:
            return f"it has model version {hello.model_version}, the others have {self.model_version}"
        return ""

    def _configure(self, member: Member, now: float) -> None:
        member.configured_at = now
        worker_config = worker_pb2.WorkerConfig(
            kv_block_size=BLOCK_SIZE,
            max_batch_tokens=self._config.max_num_batched_tokens,
            max_running=self._config.max_num_seqs,
            token_counts=True,
            kv_groups=MAX_KV_GROUPS,
        )
        self._send(member, worker_pb2.WorkerFrame(worker_config=worker_config), now)

    def _on_ready(self, member: Member, ready: worker_pb2.WorkerReady, now: float) -> None:
        """Take a group into service."""
        if member.is_ready:
            return
        group_id, name = member.hello.group_id, member.hello.worker_id
        if problem := _problem(ready):
            self._lose(group_id, problem, now, crashed=False)
            return
        member.is_ready = True
        member.pulse = Liveness(now)  # how late it was while it prepared its device says nothing about later
        self.tokenizer_sha256, self.notes = ready.tokenizer_sha256, tuple(ready.notes)
        device, blocks, context = member.hello.device, ready.kv_blocks, ready.max_model_len
        log.info("worker %s joined: %s, %d KV blocks, context %d", name, device, blocks, context)
        self._events.ready(group_id, member.epoch, ready, now)

    def _send(self, member: Member, frame: worker_pb2.WorkerFrame, now: float) -> bool:
        """Send a frame in the epoch and the revision of a member."""
        frame.protocol_revision, frame.epoch = member.revision, member.epoch
        if not self._events.send(member.identity, frame):
            return False
        member.last_sent = now
        return True

    def dismiss(self, now: float) -> None:
        """Tell every worker that no plan will come: one that is to stop does, others wait for the next scheduler."""
        for member in self._groups.values():
            self._send(member, worker_pb2.WorkerFrame(fenced=worker_pb2.Fenced(reason="the scheduler stops")), now)

    # -- liveness --------------------------------------------------------------------------------

    def check(self, now: float, busy: Container[str]) -> None:
        """Send heartbeats where nothing else was sent, and give up workers that are gone or show too little life.

        The groups in `busy` owe a step.
        """
        for group_id, member in list(self._groups.items()):
            member.pulse.tick(now, group_id in busy)
            if problem := member.pulse.problem(member.is_ready, group_id in busy):
                self.give_up(group_id, problem, now)
            elif now - member.last_sent >= HEARTBEAT_S:
                is_there = self._send_heartbeat(group_id, member, now)
                if is_there and not member.is_ready and now - member.configured_at >= CONFIG_REPEAT_S:
                    self._configure(member, now)

    def tells_progress(self, group_id: str) -> bool:
        """Whether a group's worker counts what it does within a step: how long that takes says nothing more."""
        member = self._groups.get(group_id)
        return member is not None and member.pulse.tells_progress

    def probe(self, now: float) -> None:
        """Send all a heartbeat, and give up those that are gone."""
        for group_id, member in list(self._groups.items()):
            self._send_heartbeat(group_id, member, now)

    def _send_heartbeat(self, group_id: str, member: Member, now: float) -> bool:
        """Send a heartbeat; False, and the worker is given up, if it is gone."""
        if self._send(member, worker_pb2.WorkerFrame(heartbeat=worker_pb2.Heartbeat()), now):
            return True
        self.give_up(group_id, "is gone", now)  # or only its connection: one that hangs loses it too
        return False

    def give_up(self, group_id: str, reason: str, now: float, crashed: bool = True) -> None:
        """Take a group out of service because of what it did; its worker has to say hello again."""
        self._lose(group_id, reason, now, crashed)

    def evict(self, worker_id: str, hold_s: float, now: float) -> str:
        """Take a worker, or the group of this name, out of service for `hold_s`; return its group, empty if unknown."""
        for group_id, member in self._groups.items():
            if worker_id in (group_id, member.hello.worker_id):
                self._lose(group_id, "was evicted by an operator", now, crashed=False)
                self._losses.pop(group_id, None)
                self._losses[group_id] = Losses(1, now + hold_s)
                return group_id
        return ""

    def _lose(self, group_id: str, reason: str, now: float, crashed: bool, is_alive: bool = True) -> None:
        """Forget a group. `crashed`: what it computes may be why; `is_alive`: its process may still be there."""
        member = self._groups.pop(group_id, None)
        if member is None:
            return
        if self._by_identity.get(member.identity) is member:
            del self._by_identity[member.identity]
        log.warning("lost worker %s of group %s: %s", member.hello.worker_id, group_id, reason)
        if is_alive:
            self._events.fenced(member.hello.worker_id, reason)
        if member.is_ready:
            if not member.has_answered:
                self._delay_next(group_id, now)
            self._events.lost(group_id, crashed, now)

    def _delay_next(self, group_id: str, now: float) -> None:
        """Let a group wait longer each time that it joined and was lost without having answered a step."""
        before = self._losses.pop(group_id, None)
        count = 1 if before is None or now - before.not_before > FORGET_S else before.count + 1
        first, longest = PAUSE_S
        pause_s = min(first * 2 ** min(count - 2, 16), longest) if count > 1 else 0.0
        if pause_s:
            log.warning("group %s was lost %d times in a row and may join again in %g s", group_id, count, pause_s)
        self._losses[group_id] = Losses(count, now + pause_s)
        if len(self._losses) > MAX_WORKERS:
            del self._losses[next(iter(self._losses))]


def _problem(ready: worker_pb2.WorkerReady) -> str:
    """Return why a worker like this cannot be taken into service, or nothing."""
    num_groups = len(ready.kv_group_windows) or 1
    if num_groups > MAX_KV_GROUPS:
        return f"has {num_groups} KV groups; a scheduler keeps account of at most {MAX_KV_GROUPS}"
    if ready.kv_blocks < (1 if ready.whole_sequences else 1 + num_groups) or not ready.max_model_len:
        return "has no room for a KV cache"
    if ready.kv_blocks > MAX_KV_BLOCKS:
        return f"has {ready.kv_blocks} KV blocks; a scheduler keeps account of at most {MAX_KV_BLOCKS}"
    if ready.whole_sequences and not ready.vector_size:
        return "makes no vectors, and its model computes sequences as a whole only"
    if ready.whole_sequences and ready.kv_group_windows:
        return "has KV groups, and its model computes sequences as a whole only"
    if ready.max_row_tokens > BLOCK_SIZE:
        return f"makes up to {ready.max_row_tokens} tokens of a row in a step; at most {BLOCK_SIZE} are taken"
    return ""
