"""The node is all of a scheduler process that is not a socket or a clock: the core, its workers, its gateways.

Pure, like the core: the engine runs it on real sockets, the simulation on simulated ones.
"""

from __future__ import annotations

from collections.abc import Callable

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.config import BLOCK_SIZE, SchedulerConfig
from octavo.services.scheduler.core.effects import SendFrame, SendPlan, SendToGateway
from octavo.services.scheduler.core.metrics import SchedulerMetrics
from octavo.services.scheduler.core.output_processor import WorkerMisbehavedError
from octavo.services.scheduler.core.scheduler import Scheduler
from octavo.services.scheduler.groups.worker_group import GroupLimits, ModelInfo
from octavo.services.scheduler.workers.membership import MemberEvents, Membership
from octavo.worker.v1 import worker_pb2

EPOCHS_OF_WORKERS = 16  # bits that number the workers of one start of a scheduler
MAX_ADAPTERS = 1 << 16  # of a worker
AWAY_S = 1.0  # without a look at the time, which is looked at every 25 ms: this machine was suspended, or busy


class Node:
    """Joins a Scheduler with the workers' membership. Call `pump` after each event, or after several.

    epoch   names this life of the scheduler, and is greater than that of any before
    send    delivers a frame to a worker; False if it cannot be
    deliver is given every message to a gateway, in order
    changed is called when a worker came or went
    metrics   counts what happens
    fenced  is told the id of a worker that was given up, and why; it may be alive
    """

    def __init__(
        self,
        config: SchedulerConfig,
        scheduler_id: str,
        epoch: int,
        now: float,
        *,
        send: Callable[[bytes, worker_pb2.WorkerFrame], bool],
        deliver: Callable[[SendToGateway], None],
        changed: Callable[[], None],
        fenced: Callable[[str, str], None],
        metrics: SchedulerMetrics | None = None,
    ) -> None:
        self._config = config
        self._scheduler_id = scheduler_id
        self._epoch = epoch
        self._deliver = deliver
        self._changed = changed
        self.core = Scheduler(config, now, epoch, metrics)
        events = MemberEvents(
            send, self._on_ready, self._on_lost, self._on_step_done, fenced, self.core.cannot_compute,
            self.core.adapter_loaded,
        )  # fmt: skip
        self.members = Membership(config, epoch << EPOCHS_OF_WORKERS, events)
        self.num_steps = 0
        self.num_plans = 0
        self._looked_at = now

    # -- gateways --------------------------------------------------------------------------------

    def welcome(self, revision: int, now: float) -> scheduler_pb2.Welcome:
        """Return the greeting for a gateway that speaks `revision`."""
        load = self.load(now)
        return scheduler_pb2.Welcome(
            scheduler_id=self._scheduler_id,
            epoch=self._epoch,
            kv_block_size=BLOCK_SIZE,
            kv_blocks_total=load.kv_blocks_total,
            max_running=self._config.max_num_seqs,
            protocol_revision=revision,
            load=load,
        )

    def load(self, now: float) -> scheduler_pb2.Load:
        """Describe the state of the scheduler."""
        load = self.core.load(now)
        load.model_version = self.members.model_version
        load.tokenizer_sha256 = self.members.tokenizer_sha256
        load.notes.extend(self.members.notes)
        return load

    def on_gateway_message(self, gateway_id: str, message: scheduler_pb2.AttachRequest, now: float) -> None:
        """Hand one message of a gateway to the scheduler."""
        kind = message.WhichOneof("kind")
        if kind == "submit":
            self.core.submit(gateway_id, message.submit, now)
        elif kind == "cancel":
            self.core.cancel(gateway_id, message.cancel, now)
        elif kind == "detach":
            self.core.detach(gateway_id, message.detach.handle, now)
        elif kind == "check_adapter":
            self.core.check_adapter(gateway_id, message.check_adapter)
        elif kind == "reattach":
            self.core.reattach(gateway_id, message.reattach, now)

    def gateway_lost(self, gateway_id: str, now: float) -> None:
        """Let go of a gateway whose stream broke."""
        self.core.gateway_lost(gateway_id, now)

    # -- workers ---------------------------------------------------------------------------------

    def on_frame(self, identity: bytes, frame: worker_pb2.WorkerFrame, now: float) -> None:
        """Handle one frame of a worker."""
        self._look(now)
        self.members.handle(identity, frame, now)

    def _on_ready(self, group_id: str, epoch: int, ready: worker_pb2.WorkerReady, now: float) -> None:
        limits = GroupLimits(
            num_blocks=ready.kv_blocks,
            max_model_len=ready.max_model_len,
            max_num_batched_tokens=ready.max_batch_tokens,
            takes_grammars=ready.structured_output,
            scores_prompts=ready.prompt_logprobs,
            max_row_tokens=ready.max_row_tokens or 1,
            max_adapters=min(ready.max_adapters, MAX_ADAPTERS),
            adapter_memory=ready.adapter_memory_bytes,
            kv_windows=tuple(ready.kv_group_windows) or (0,),
        )
        self.core.worker_joined(group_id, epoch, limits, now, ModelInfo.of(ready))
        self._changed()

    def _on_lost(self, group_id: str, crashed: bool, now: float) -> None:
        self.core.worker_lost(group_id, now, crashed)
        self._changed()

    def _on_step_done(self, group_id: str, result: worker_pb2.StepResult, now: float) -> None:
        try:
            self.core.step_done(group_id, result, now)
        except WorkerMisbehavedError as error:
            self.members.give_up(group_id, str(error), now, crashed=False)
            return
        self.num_steps += 1

    def probe(self, now: float) -> None:
        """Give up workers that cannot be reached now."""
        self.members.probe(now)

    # -- time ------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Watch time: workers that are gone, silent or hang, and requests whose time is up."""
        self._look(now)
        self.members.check(now, busy=self.core.busy_groups())
        for group_id, age_s in self.core.overdue_groups(now).items():
            if not self.members.tells_progress(group_id):
                self.members.give_up(group_id, f"hangs: a step is unanswered for {age_s:.1f} s", now)
        self.core.tick(now)

    def _look(self, now: float) -> None:
        """Hold no step for a hang because of time in which the workers may have stood still as well."""
        if now - self._looked_at > AWAY_S:
            self.core.was_away(now)
        self._looked_at = now

    def pump(self, now: float) -> None:
        """Plan what can be planned and deliver all effects."""
        self.core.schedule(now)
        for effect in self.core.take_effects():
            if isinstance(effect, SendPlan):
                self.num_plans += 1
                self.members.send_plan(effect.group_id, effect.epoch, effect.plan, now)
            elif isinstance(effect, SendFrame):
                self.members.send_frame(effect.group_id, effect.epoch, effect.frame, now)
            else:
                self._deliver(effect)
