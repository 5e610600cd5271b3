"""Which requests may enter the queue."""

from __future__ import annotations

from collections.abc import Collection

from google.rpc import code_pb2

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.config import SchedulerConfig
from octavo.services.scheduler.resume import MAX_STATE_BYTES
from octavo.services.scheduler.worker_group import WorkerGroup

MIN_RETRY_MS, MAX_RETRY_MS = 50, 60_000
MIN_MEASURED_S = 0.5  # of a queue, before its rate is believed
RATE_WINDOW_S = 10.0


class Admission:
    """Checks requests against limits and the measured rate. Holds no requests."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        # How fast the queue moves while there is one: tokens of sequences that left it to run,
        # and seconds. Slots, blocks and decoding all show in it, as they do in no worker's rate.
        self._opened_tokens = 0.0
        self._queue_s = 0.0
        self._observed_at: float | None = None  # None: there was no queue

    def opened(self, num_tokens: int) -> None:
        """Learn that a sequence left the queue to run."""
        if self._observed_at is not None:
            self._opened_tokens += num_tokens

    def observe(self, waiting_tokens: int, now: float) -> None:
        """Learn how long there has been a queue. To be called many times a second."""
        if self._observed_at is not None:
            self._queue_s += now - self._observed_at
        self._observed_at = now if waiting_tokens else None
        if self._queue_s > RATE_WINDOW_S:  # what is old counts for less and less
            self._queue_s /= 2
            self._opened_tokens /= 2

    def estimate_ms(self, tokens: int, groups: Collection[WorkerGroup]) -> int:
        """Return how many milliseconds pass until so many waiting tokens have begun to run; 0 if unknown."""
        if self._queue_s >= MIN_MEASURED_S and self._opened_tokens:
            return int(1000 * tokens * self._queue_s / self._opened_tokens)
        rate = sum(group.tokens_per_s for group in groups)
        return int(1000 * tokens / rate) if rate else 0

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
        is_generation = not submit.HasField("pooling")  # which adds a token at least
        longest = num_tokens + 1 if is_generation else max(submit.pooling.input_lengths, default=0)
        queue_ms = self.estimate_ms(waiting_tokens, groups)
        if max_model_len == 0:
            return reject(
                submit, code_pb2.UNAVAILABLE, "NO_WORKERS", "no worker is ready; try again shortly", retry_ms=1000
            )
        if submit.HasField("constraint") and groups and not any(group.takes_grammars for group in groups):
            message = "the workers take no constraints: they need the package llguidance, and the model's tokenizer"
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
        if num_waiting >= self._config.max_waiting:
            return reject(
                submit,
                code_pb2.RESOURCE_EXHAUSTED,
                "QUEUE_FULL",
                f"{num_waiting} requests are waiting, which is the limit",
                retry_ms=queue_ms // 2 + 1,
            )
        if waiting_tokens and waiting_tokens + num_tokens > self._config.max_waiting_tokens:
            return reject(
                submit,
                code_pb2.RESOURCE_EXHAUSTED,
                "QUEUE_FULL",
                f"{waiting_tokens} tokens are waiting; {num_tokens} more would pass the limit of "
                f"{self._config.max_waiting_tokens}",
                retry_ms=queue_ms // 2 + 1,
            )
        if submit.remaining_ms and queue_ms > submit.remaining_ms:
            return reject(
                submit,
                code_pb2.RESOURCE_EXHAUSTED,
                "DEADLINE_UNREACHABLE",
                f"the queue takes about {queue_ms} ms and the deadline is in {submit.remaining_ms} ms",
                retry_ms=queue_ms - submit.remaining_ms,
            )
        return None


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
