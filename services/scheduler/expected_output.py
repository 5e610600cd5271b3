"""How long outputs will get, as far as that can be known before they are made."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.scheduler.v1 import scheduler_pb2

UNKNOWN_TOKENS = 256  # of an output, before its tenant's first one has ended
MEMORY = 20  # outputs of a tenant, after which one counts for a third
MAX_TENANTS = 10_000  # remembered; the one not heard of for longest is forgotten first


@dataclass(slots=True)
class _Outputs:
    """Of a tenant: tokens made, and how many times they came to an end."""

    tokens: float = 0.0
    endings: float = 0.0


class ExpectedOutput:
    """The average length of each tenant's outputs, the latest ones counting most.

    It is tokens divided by endings: an output that was cut off at its deadline would have been longer, so its
    tokens count and its ending does not.
    """

    def __init__(self) -> None:
        self._by_tenant: dict[str, _Outputs] = {}

    def tokens(self, submit: scheduler_pb2.Submit, limit: int, averages: float = 1.0) -> int:
        """Return how many output tokens of a candidate to expect, those that are continued included.

        It is `limit`, what the request and the context leave room for, or the tenant's average where
        an end of sequence can come sooner, or so many averages.
        """
        known = self._by_tenant.get(submit.tenant)
        if not submit.end_of_sequence_ids and not submit.stop.stop_token_ids:
            return limit
        average = known.tokens / known.endings if known is not None and known.endings else UNKNOWN_TOKENS
        return min(limit, max(round(averages * average), submit.stop.min_new_tokens))

    def ended(self, tenant: str, num_output: int, is_cut: bool) -> None:
        """Learn from an output that ended; `is_cut`: at its deadline."""
        outputs = self._by_tenant.pop(tenant, None) or _Outputs()
        if len(self._by_tenant) >= MAX_TENANTS:
            del self._by_tenant[next(iter(self._by_tenant))]
        self._by_tenant[tenant] = outputs
        kept = 1 - 1 / MEMORY
        outputs.tokens = kept * outputs.tokens + num_output
        outputs.endings = kept * outputs.endings + (not is_cut)
