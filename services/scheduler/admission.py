"""Which requests may enter the queue."""

from __future__ import annotations

from collections.abc import Collection

from google.rpc import code_pb2

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.config import SchedulerConfig
from octavo.services.scheduler.worker_group import WorkerGroup

MIN_RETRY_MS, MAX_RETRY_MS = 50, 60_000


class Admission:
    """Checks requests against limits and the measured rate. Holds no requests."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config

    def refuse(
        self,
        submit: scheduler_pb2.Submit,
        groups: Collection[WorkerGroup],
        num_waiting: int,
        waiting_tokens: int,
        max_model_len: int,
    ) -> scheduler_pb2.Rejected | None:
        """Return why `submit` cannot enter the queue, or None if it can.

        `max_model_len` is what the workers can hold, 0 if there are none, nor soon will be.
        """
        num_tokens = len(submit.prompt_token_ids) + len(submit.continue_token_ids)
        queue_ms = estimate_ms(waiting_tokens, groups)

        def reject(
            code: int, reason: str, message: str, retry_ms: int = 0, **metadata: object
        ) -> scheduler_pb2.Rejected:
            return scheduler_pb2.Rejected(
                handle=submit.handle,
                code=code,
                reason=reason,
                message=message,
                retry_after_ms=min(max(retry_ms, MIN_RETRY_MS), MAX_RETRY_MS) if retry_ms else 0,
                metadata={key: str(value) for key, value in metadata.items()},
            )

        if max_model_len == 0:
            return reject(code_pb2.UNAVAILABLE, "NO_WORKERS", "no worker is ready; try again shortly", retry_ms=1000)
        if not submit.prompt_token_ids:
            return reject(code_pb2.INVALID_ARGUMENT, "INVALID_FIELD", "the prompt is empty")
        if num_tokens >= max_model_len:
            return reject(
                code_pb2.INVALID_ARGUMENT,
                "KV_CAPACITY_EXCEEDED",
                f"prompt and output so far have {num_tokens} tokens; "
                f"the cache holds at most {max_model_len} of a sequence: shorten the prompt",
                tokens=num_tokens,
                limit=max_model_len,
            )
        if num_waiting >= self._config.max_waiting:
            return reject(
                code_pb2.RESOURCE_EXHAUSTED,
                "QUEUE_FULL",
                f"{num_waiting} requests are waiting, which is the limit",
                retry_ms=queue_ms // 2 + 1,
            )
        if waiting_tokens and waiting_tokens + num_tokens > self._config.max_waiting_tokens:
            return reject(
                code_pb2.RESOURCE_EXHAUSTED,
                "QUEUE_FULL",
                f"{waiting_tokens} tokens are waiting; {num_tokens} more would pass the limit of "
                f"{self._config.max_waiting_tokens}",
                retry_ms=queue_ms // 2 + 1,
            )
        if submit.remaining_ms and queue_ms > submit.remaining_ms:
            return reject(
                code_pb2.RESOURCE_EXHAUSTED,
                "DEADLINE_UNREACHABLE",
                f"the queue takes about {queue_ms} ms and the deadline is in {submit.remaining_ms} ms",
                retry_ms=queue_ms - submit.remaining_ms,
            )
        return None


def estimate_ms(tokens: int, groups: Collection[WorkerGroup]) -> int:
    """Return how many milliseconds the groups need for `tokens` at their measured rates; 0 if unknown."""
    rate = sum(group.tokens_per_s for group in groups)
    return int(1000 * tokens / rate) if rate else 0
