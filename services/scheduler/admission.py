"""Which requests may enter the queue."""

from __future__ import annotations

import math
from collections.abc import Collection

from google.rpc import code_pb2

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.config import SchedulerConfig
from octavo.services.scheduler.expected_output import ExpectedOutput
from octavo.services.scheduler.forecast import Forecast
from octavo.services.scheduler.resume import MAX_STATE_BYTES
from octavo.services.scheduler.sequence_states import SequenceStates
from octavo.services.scheduler.work import Work
from octavo.services.scheduler.worker_group import WorkerGroup

LONG_OUTPUT = 3.0  # averages: of outputs whose lengths are those of a memoryless process, one in twenty is longer
MIN_RETRY_MS, MAX_RETRY_MS = 50, 60_000


class Admission:
    """Checks requests against limits and the forecast. Holds no requests."""

    def __init__(self, config: SchedulerConfig, states: SequenceStates, forecast: Forecast) -> None:
        self._config = config
        self._states = states
        self._forecast = forecast
        self.outputs = ExpectedOutput()

    def expected_tokens(self, submit: scheduler_pb2.Submit, max_tokens: int) -> int:
        """Return how long a candidate will get, prompt and output, that never gets longer than `max_tokens`."""
        num_prompt = len(submit.prompt_token_ids)
        return num_prompt + self.outputs.tokens(submit, max_tokens - num_prompt)

    def refuse(
        self, submit: scheduler_pb2.Submit, groups: Collection[WorkerGroup], max_model_len: int, now: float
    ) -> scheduler_pb2.Rejected | None:
        """Return why `submit` cannot enter the queue, or None if it can.

        `max_model_len` is what the workers can hold, 0 if there are none, nor soon will be.
        """
        return self._refuse_for_good(submit, groups, max_model_len) or self._refuse_for_now(submit, max_model_len, now)

    def _refuse_for_good(
        self, submit: scheduler_pb2.Submit, groups: Collection[WorkerGroup], max_model_len: int
    ) -> scheduler_pb2.Rejected | None:
        """Return why the workers there are cannot do what is asked for."""
        num_tokens = len(submit.prompt_token_ids) + len(submit.continue_token_ids)
        is_generation = not submit.HasField("pooling")  # which adds a token at least
        longest = num_tokens + 1 if is_generation else max(submit.pooling.input_lengths, default=0)
        if max_model_len == 0:
            return reject(
                submit, code_pb2.UNAVAILABLE, "NO_WORKERS", "no worker is ready; try again shortly", retry_ms=1000
            )
        if submit.HasField("constraint") and groups and not any(group.takes_grammars for group in groups):
            message = "the workers take no constraints: they need the package llguidance, and the model's tokenizer"
            return reject(submit, code_pb2.FAILED_PRECONDITION, "FEATURE_DISABLED", message)
        if submit.prompt_logprobs and groups and not any(group.scores_prompts for group in groups):
            message = "the workers' device gives no log probabilities of prompts"
            return reject(submit, code_pb2.FAILED_PRECONDITION, "FEATURE_DISABLED", message)
        if not submit.prompt_token_ids:
            return reject(submit, code_pb2.INVALID_ARGUMENT, "INVALID_FIELD", "the prompt is empty")
        if len(submit.gateway_state) > MAX_STATE_BYTES:
            message = f"gateway_state has {len(submit.gateway_state)} bytes; the limit is {MAX_STATE_BYTES}"
            return reject(submit, code_pb2.INVALID_ARGUMENT, "INVALID_FIELD", message)
        if longest > max_model_len:
            return reject(
                submit,
                code_pb2.INVALID_ARGUMENT,
                "KV_CAPACITY_EXCEEDED",
                f"prompt and output so far have {num_tokens} tokens; "
                f"the cache holds at most {max_model_len} of a sequence: shorten the prompt"
                if is_generation
                else f"an input has {longest} tokens; the workers take at most {max_model_len}: shorten it",
                tokens=longest - is_generation,
                limit=max_model_len,
            )
        return None

    def _refuse_for_now(
        self, submit: scheduler_pb2.Submit, max_model_len: int, now: float
    ) -> scheduler_pb2.Rejected | None:
        """Return why there is no room or no time for a request now."""
        waiting, num_waiting = self._states.waiting, self._states.num_waiting
        num_tokens = len(submit.prompt_token_ids) + len(submit.continue_token_ids)
        if num_waiting >= self._config.max_waiting:
            message = f"{num_waiting} requests are waiting, which is the limit"
        elif self._has_its_share(submit.tenant, now):
            of_tenant = waiting.num_waiting(submit.tenant)
            message = f"{of_tenant} requests of the tenant are waiting, which is its share of the queue"
        elif waiting.num_tokens and waiting.num_tokens + num_tokens > self._config.max_waiting_tokens:
            message = (
                f"{waiting.num_tokens} tokens are waiting; {num_tokens} more would pass the limit of "
                f"{self._config.max_waiting_tokens}"
            )
        else:
            return self._refuse_for_deadline(submit, max_model_len, now)
        self._forecast.turned_away(submit.tenant, now)
        retry_ms = int(500 * self._forecast.queue_s(now)) + 1
        return reject(submit, code_pb2.RESOURCE_EXHAUSTED, "QUEUE_FULL", message, retry_ms=retry_ms)

    def _has_its_share(self, tenant: str, now: float) -> bool:
        """Return whether as many sequences of a tenant wait as it may have in the queue."""
        count = self._states.waiting.num_waiting(tenant)
        return count > 0 and count >= self._forecast.share(tenant, now) * self._config.max_waiting

    def _refuse_for_deadline(
        self, submit: scheduler_pb2.Submit, max_model_len: int, now: float
    ) -> scheduler_pb2.Rejected | None:
        """Return why a request would not be through by its deadline."""
        if not submit.remaining_ms:
            self._forecast.came(math.inf, 1)
            return None
        num_sequences = max(submit.candidate_count, 1)
        if submit.HasField("pooling"):  # all inputs fill steps together, and a vector takes the place of one token
            least = mean = longest = Work(len(submit.prompt_token_ids), 1)
        else:
            num_prompt, num_continued = len(submit.prompt_token_ids), len(submit.continue_token_ids)
            room = max_model_len - num_prompt
            limit = min(room, submit.stop.max_new_tokens or room)
            longest, mean, least = (
                Work(num_prompt + num_continued, max(self.outputs.tokens(submit, limit, averages) - num_continued, 1))
                for averages in (LONG_OUTPUT, 1.0, 0.0)
            )
            if 0 < submit.stop.soft_time_limit_ms < submit.remaining_ms:  # what is made by then is enough
                longest = least = Work(num_prompt + num_continued, 1)
        margin = self._forecast.margin(now)
        self._forecast.came(submit.remaining_ms / 1000 / margin, longest.output)
        wait_s = self._forecast.wait_s(submit.tenant, submit.priority, num_sequences, now)
        num_ahead = len(self._states.waiting)
        # Nobody is kept from anything if it gets longer than it might, where there is room for all.
        expected = longest if wait_s or num_ahead else least
        num_others = self._forecast.num_beside(num_ahead, now) + num_sequences - 1
        wait_ms, run_ms = int(1000 * wait_s), int(1000 * self._forecast.run_s(expected, num_others))
        late_ms = int(margin * (wait_ms + run_ms)) - submit.remaining_ms
        is_its_turn = self._forecast.has_its_turn(submit.tenant, mean, num_sequences, now) or submit.is_failover
        if (is_its_turn and late_ms <= 0) or self._forecast.may_try(submit, now):
            return None
        if 1000 * margin * self._forecast.run_alone_s(least) <= submit.remaining_ms:
            self._forecast.turned_away(submit.tenant, now)  # else it would have no time on an idle machine either
        if late_ms <= 0:
            message = "the tenant asks for more than its part of the machine: its requests are let in by turns"
            retry_ms = max(wait_ms + run_ms, 1)
            return reject(submit, code_pb2.RESOURCE_EXHAUSTED, "QUEUE_FULL", message, retry_ms=retry_ms)
        message = (
            f"the queue takes about {wait_ms} ms, the request itself {run_ms} ms, and the deadline is in "
            f"{submit.remaining_ms} ms"
        )
        # Of the queue alone, for any request of the tenant: what it takes before the first of its sequences runs.
        queue_ms = {"queue_ms": int(margin * wait_ms)} if num_sequences == 1 else {}
        return reject(
            submit, code_pb2.RESOURCE_EXHAUSTED, "DEADLINE_UNREACHABLE", message, retry_ms=late_ms, **queue_ms
        )


def reject(
    submit: scheduler_pb2.Submit, code: int, reason: str, message: str, retry_ms: int = 0, **metadata: object
) -> scheduler_pb2.Rejected:
    """Return the refusal of a request; with `retry_ms` it is worth trying again, after about so long."""
    return scheduler_pb2.Rejected(
        handle=submit.handle,
        code=code,
        reason=reason,
        message=message,
        retry_after_ms=min(max(retry_ms, MIN_RETRY_MS), MAX_RETRY_MS) if retry_ms else 0,
        metadata={key: str(value) for key, value in metadata.items()},
    )
