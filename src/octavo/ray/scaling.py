"""How many engines there should be."""

from __future__ import annotations

import math
from typing import Any


class QueuePolicy:
    """Sequences, running and waiting, over a target for each engine; one more while a queue is long.

    Serve's own policy counts requests of replicas, and an engine's requests do not come through its replica.

    target_sequences  that an engine has
    max_queue_s       how long a new request may have to wait at the busiest engine before another one is added
    """

    def __init__(self, target_sequences: float = 32.0, max_queue_s: float = 5.0) -> None:
        if target_sequences <= 0 or max_queue_s <= 0:
            raise ValueError("target_sequences and max_queue_s must be positive")
        self._target_sequences = target_sequences
        self._max_queue_s = max_queue_s

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """Return the number of engines, and no state. `ctx`: Serve's AutoscalingContext."""
        found: dict[str, dict[Any, float]] = ctx.aggregated_metrics or {}
        sequences = found.get("sequences", {})
        if not sequences:  # nobody has said anything yet
            return ctx.target_num_replicas, {}
        # Those that have not reported are as busy as the others.
        total = sum(sequences.values()) / len(sequences) * max(len(sequences), ctx.current_num_replicas)
        wanted = math.ceil(total / self._target_sequences)
        if max(found.get("queue_s", {}).values(), default=0.0) > self._max_queue_s:
            wanted = max(wanted, ctx.current_num_replicas + 1)
        return max(wanted, 1), {}
