"""Quotas limit what a tenant may use, whatever others do: requests at once, and tokens per second."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.config import Quota

BURST_S = 60.0  # a tenant that was quiet may use the tokens of this time at once
MAX_TENANTS = 10_000  # remembered; those with nothing in flight and a full bucket are forgotten first


@dataclass(slots=True)
class _Account:
    num_requests: int
    tokens: float  # in the bucket; below 0 it is in debt, and nothing more is admitted
    filled_at: float


class Quotas:
    """Counts what each tenant has in flight, and pours tokens into its bucket.

    A request is charged for its prompt and the most it may produce when it is admitted; what it did
    not produce is given back when it ends. A bucket may go into debt by one request, so a request
    larger than the bucket is not shut out for ever.
    """

    def __init__(self, default: Quota, by_tenant: dict[str, Quota]) -> None:
        self._default = default
        self._by_tenant = by_tenant
        self._accounts: dict[str, _Account] = {}
        self._most_kept = MAX_TENANTS

    def change(self, default: Quota, by_tenant: dict[str, Quota], in_flight: Iterable[str], now: float) -> None:
        """Let other limits count from now on. `in_flight`: the tenant of each request that was let in and runs.

        Those of a tenant that had no quota so far count for its new one; buckets hold what they held.
        """
        self._default = default
        self._by_tenant = by_tenant
        counts = Counter(in_flight)
        for tenant in counts.keys() | self._accounts.keys():
            quota = self.quota(tenant)
            if not quota.max_requests and not quota.tokens_per_s:
                self._accounts.pop(tenant, None)
                continue
            account = self._accounts.get(tenant)
            if account is None:
                account = self._accounts[tenant] = _Account(0, BURST_S * quota.tokens_per_s, now)
            account.num_requests = counts[tenant]

    def quota(self, tenant: str) -> Quota:
        """Return the limits of a tenant."""
        return self._by_tenant.get(tenant, self._default)

    def shortage(self, tenant: str, now: float) -> tuple[str, int]:
        """Return what `tenant` has too much of, and in how many ms to try again; ("", 0) if nothing."""
        quota = self.quota(tenant)
        account = self._accounts.get(tenant)
        if account is None:
            return "", 0
        self._fill(account, quota, now)
        if quota.max_requests and account.num_requests >= quota.max_requests:
            return f"{account.num_requests} requests in flight, of {quota.max_requests}", 1000
        if quota.tokens_per_s and account.tokens <= 0:
            return f"{quota.tokens_per_s:g} tokens per second", int(1000 * -account.tokens / quota.tokens_per_s) + 1
        return "", 0

    def charge(self, submit: scheduler_pb2.Submit, now: float) -> None:
        """Charge a request that was admitted."""
        quota = self.quota(submit.tenant)
        if not quota.max_requests and not quota.tokens_per_s:
            return
        account = self._accounts.get(submit.tenant)
        if account is None:
            if len(self._accounts) >= self._most_kept:
                self._forget_idle()
            account = self._accounts[submit.tenant] = _Account(0, BURST_S * quota.tokens_per_s, now)
        self._fill(account, quota, now)
        account.num_requests += 1
        account.tokens -= cost(submit)

    def ended(self, submit: scheduler_pb2.Submit, num_output_tokens: int) -> None:
        """Give back what an admitted request did not use; `num_output_tokens`: tokens of all its candidates."""
        account = self._accounts.get(submit.tenant)
        if account is not None:
            account.num_requests -= 1
            unused = submit.stop.max_new_tokens * max(submit.candidate_count, 1) - num_output_tokens
            account.tokens += max(0, unused)

    def _fill(self, account: _Account, quota: Quota, now: float) -> None:
        full = BURST_S * quota.tokens_per_s
        account.tokens = min(full, account.tokens + (now - account.filled_at) * quota.tokens_per_s)
        account.filled_at = now

    def _forget_idle(self) -> None:
        """Keep the table bounded by what is in flight: forget who is idle and owes nothing.

        Where few are, the next time is far enough off that it costs each new tenant little.
        """
        self._accounts = {
            tenant: account for tenant, account in self._accounts.items() if account.num_requests or account.tokens < 0
        }
        self._most_kept = max(MAX_TENANTS, 2 * len(self._accounts))


def cost(submit: scheduler_pb2.Submit) -> int:
    """Return the tokens that a request may use: its prompt, and for each candidate the longest output."""
    return len(submit.prompt_token_ids) + submit.stop.max_new_tokens * max(submit.candidate_count, 1)
