"""Which of the requests that ended are kept for a client that comes back, where there is no room for all."""

from __future__ import annotations

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.requests.resume import REQUEST_BYTES, EndedRequests
from octavo.services.scheduler.requests.sequence import Request


def request(arrival: int, tenant: str) -> Request:
    submit = scheduler_pb2.Submit(handle=arrival, tenant=tenant)
    return Request(submit, "", arrival, arrival, 0.0, 1e9, 1e9)


def test_a_tenant_keeps_as_much_as_its_weight_lets_it() -> None:
    ended = EndedRequests(8 * REQUEST_BYTES, {"large": 3.0})
    arrival = 0
    for _ in range(20):
        for tenant in ("large", "small"):
            arrival += 1
            ended.add(request(arrival, tenant), until=1000.0)
            while (gone := ended.next_to_go(0.0)) is not None:
                ended.remove(gone)
            ended.check_invariants()

    assert {tenant: len(kept) for tenant, kept in ended._by_tenant.items()} == {"large": 6, "small": 2}
