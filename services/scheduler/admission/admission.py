"""Admission decides whether there is room and time for a request in the queue."""

from __future__ import annotations

import math
from dataclasses import dataclass

from google.rpc import code_pb2

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.admission.forecast import Forecast
from octavo.services.scheduler.admission.validation import reject
from octavo.services.scheduler.config import SchedulerConfig
from octavo.services.scheduler.queueing.waiting_queue import TokenCounts, WaitingQueue

UNKNOWN_TOKENS = 256  # of an output, before its tenant's first one has ended
MEMORY = 20  # outputs of a tenant, after which one counts for a third
MAX_TENANTS = 10_000  # remembered; the one not heard of for longest is forgotten first


@dataclass(slots=True)
class _Outputs:
    """Of a tenant: tokens made, and how many times they came to an end."""

    tokens: float = 0.0
    endings: float = 0.0


class OutputLengths:
    """The average length of each tenant's outputs, the latest ones counting most.

    It is tokens divided by endings: an output that was cut off at its deadline would have been longer, so its
    tokens count and its ending does not.
    """

    def __init__(self) -> None:
        self._by_tenant: dict[str, _Outputs] = {}

    def tokens(self, submit: scheduler_pb2.Submit, limit: int, averages: float = 1.0) -> int:
        """Return how many output tokens of a candidate to expect, those that are continued included.

        It is `limit`, what the request and the context leave room for, or the tenant's average where
        an end of sequence can come sooner, times `averages`.
        """
        known = self._by_tenant.get(submit.tenant)
        if not submit.end_of_sequence_ids and not submit.stop.stop_token_ids:
            return limit
        average = known.tokens / known.endings if known is not None and known.endings else UNKNOWN_TOKENS
        return min(limit, max(round(averages * average), submit.stop.min_new_tokens))

    def ended(self, tenant: str, num_output_tokens: int, is_cut: bool) -> None:
        """Learn from an output that ended; `is_cut`: at its deadline."""
        outputs = self._by_tenant.pop(tenant, None) or _Outputs()
        if len(self._by_tenant) >= MAX_TENANTS:
            del self._by_tenant[next(iter(self._by_tenant))]
        self._by_tenant[tenant] = outputs
        kept = 1 - 1 / MEMORY
        outputs.tokens = kept * outputs.tokens + num_output_tokens
        outputs.endings = kept * outputs.endings + (not is_cut)


LONG_OUTPUT = 3.0  # averages: of outputs whose lengths are those of a memoryless process, one in twenty is longer


class Admission:
    """Checks requests against limits and the forecast. Holds no requests."""

    def __init__(self, config: SchedulerConfig, waiting: WaitingQueue, forecast: Forecast) -> None:
        self._config = config
        self._waiting = waiting
        self._forecast = forecast
        self.output_lengths = OutputLengths()

    def expected_tokens(self, submit: scheduler_pb2.Submit, max_tokens: int) -> int:
        """Return how long a candidate will get, prompt and output, that never gets longer than `max_tokens`."""
        num_prompt_tokens = len(submit.prompt_token_ids)
        return num_prompt_tokens + self.output_lengths.tokens(submit, max_tokens - num_prompt_tokens)

    def refuse(self, submit: scheduler_pb2.Submit, max_model_len: int, now: float) -> scheduler_pb2.Rejected | None:
        """Return why there is no room or no time for a request now; `max_model_len` is what workers can hold."""
        waiting, num_waiting = self._waiting, self._waiting.num_sequences
        num_tokens = len(submit.prompt_token_ids) + len(submit.continue_token_ids)
        is_its_share = False
        if num_waiting >= self._config.max_waiting:
            message = f"{num_waiting} requests are waiting, which is the limit"
        elif self._has_its_share(submit.tenant, now):
            is_its_share = True
            of_tenant = waiting.num_waiting(submit.tenant)
            message = f"{of_tenant} requests of the tenant are waiting, which is its share of the queue"
        elif waiting.num_tokens and waiting.num_tokens + num_tokens > self._config.max_waiting_tokens:
            message = (
                f"{waiting.num_tokens} tokens are waiting; {num_tokens} more would pass the limit of "
                f"{self._config.max_waiting_tokens}"
            )
        else:
            return self._refuse_for_deadline(submit, max_model_len, now)
        retry_ms = int(1000 * self._forecast.retry_s(submit.tenant, is_its_share, now)) + 1
        return reject(submit, code_pb2.RESOURCE_EXHAUSTED, "QUEUE_FULL", message, retry_ms=retry_ms)

    def _has_its_share(self, tenant: str, now: float) -> bool:
        """Return whether as many sequences of a tenant wait as it may have in the queue."""
        count = self._waiting.num_waiting(tenant)
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
            least = mean = longest = TokenCounts(len(submit.prompt_token_ids), 1)
        else:
            num_prompt_tokens, num_continued = len(submit.prompt_token_ids), len(submit.continue_token_ids)
            room = max_model_len - num_prompt_tokens
            limit = min(room, submit.stop.max_new_tokens or room)
            longest, mean, least = (
                TokenCounts(
                    num_prompt_tokens + num_continued,
                    max(self.output_lengths.tokens(submit, limit, averages) - num_continued, 1),
                )
                for averages in (LONG_OUTPUT, 1.0, 0.0)
            )
            if 0 < submit.stop.soft_time_limit_ms < submit.remaining_ms:  # what is made by then is enough
                longest = least = TokenCounts(num_prompt_tokens + num_continued, 1)
        margin = self._forecast.margin(now)
        self._forecast.came(submit.remaining_ms / 1000 / margin, longest.output)
        wait_s = self._forecast.wait_s(submit.tenant, submit.priority, num_sequences, now)
        num_ahead = len(self._waiting)
        # Nobody is kept from anything if it gets longer than it might, where there is room for all.
        expected = longest if wait_s or num_ahead else least
        num_others = self._forecast.num_beside(num_ahead, now) + num_sequences - 1
        wait_ms, run_ms = int(1000 * wait_s), int(1000 * self._forecast.run_s(expected, num_others))
        late_ms = int(margin * (wait_ms + run_ms)) - submit.remaining_ms
        is_its_turn = self._forecast.has_its_turn(submit.tenant, mean, num_sequences, now) or submit.is_failover
        if (is_its_turn and late_ms <= 0) or self._forecast.may_try(submit, now):
            return None
        if 1000 * margin * self._forecast.run_alone_s(least) <= submit.remaining_ms:
            self._forecast.refused(submit.tenant, now)  # else it would have no time on an idle machine either
        if late_ms <= 0:
            message = "the tenant asks for more than its part of the machine: its requests are admitted by turns"
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
