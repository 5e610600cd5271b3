"""The admin service lets operators look into a scheduler and drain it, on a port of its own."""

from __future__ import annotations

import asyncio
import logging
import time
from itertools import islice
from typing import Any

from octavo.admin.v1 import admin_pb2, admin_pb2_grpc
from octavo.services.common.errors import feature_disabled, invalid_field
from octavo.services.common.operating import change_log_level, stacks
from octavo.services.scheduler.config import Quota, SchedulerConfig
from octavo.services.scheduler.engine import Engine
from octavo.services.scheduler.queueing.tenants import MAX_TENANTS, checked_quota
from octavo.services.scheduler.requests.sequence import Request, SequenceState

log = logging.getLogger("octavo.scheduler")

DEFAULT_MAX_REQUESTS = 1000
NAMES_ELSEWHERE = "a scheduler gives adapters no names; ask a gateway's AdminService"
REQUESTS_AT_ONCE = 100  # are described before others have a turn: the event loop is the one that plans steps


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Drains the scheduler and shows what is in it."""

    def __init__(self, engine: Engine, config: SchedulerConfig) -> None:
        self._engine = engine
        self._config = config

    async def Drain(self, request: admin_pb2.DrainRequest, context: Any) -> admin_pb2.DrainResponse:  # noqa: ARG002, N802
        """Refuse new requests; answer when none is left or time is up."""
        grace_s = request.grace_ms / 1000 if request.grace_ms else self._config.grace_s
        return admin_pb2.DrainResponse(requests_left=await self._engine.drain(grace_s))

    async def ListRequests(  # noqa: N802
        self,
        request: admin_pb2.ListRequestsRequest,
        context: Any,  # noqa: ARG002
    ) -> admin_pb2.ListRequestsResponse:
        """List the requests that have not ended, oldest first."""
        oldest = list(islice(self._engine.core.requests(), request.max_requests or DEFAULT_MAX_REQUESTS))
        response, now = admin_pb2.ListRequestsResponse(), time.monotonic()
        for at in range(0, len(oldest), REQUESTS_AT_ONCE):
            part = oldest[at : at + REQUESTS_AT_ONCE]
            response.requests.extend(_describe(each, now) for each in part if each.num_unfinished)
            await asyncio.sleep(0)
        return response

    async def FlushPrefixCache(  # noqa: N802
        self,
        request: admin_pb2.FlushPrefixCacheRequest,  # noqa: ARG002
        context: Any,  # noqa: ARG002
    ) -> admin_pb2.FlushPrefixCacheResponse:
        """Forget every cached block that nobody holds."""
        return admin_pb2.FlushPrefixCacheResponse(blocks_forgotten=self._engine.flush_prefix_cache())

    async def LoadAdapter(self, request: admin_pb2.LoadAdapterRequest, context: Any) -> None:  # noqa: ARG002, N802
        """Refuse: the names of adapters are the gateways'."""
        raise feature_disabled("adapters", NAMES_ELSEWHERE)

    UnloadAdapter = ListAdapters = LoadAdapter

    async def Undrain(self, request: admin_pb2.UndrainRequest, context: Any) -> admin_pb2.UndrainResponse:  # noqa: ARG002, N802
        """Take new requests again."""
        self._engine.undrain()
        return admin_pb2.UndrainResponse()

    async def CancelRequests(  # noqa: N802
        self,
        request: admin_pb2.CancelRequestsRequest,
        context: Any,  # noqa: ARG002
    ) -> admin_pb2.CancelRequestsResponse:
        """End requests by id, or all of a tenant."""
        tenant = request.tenant if request.HasField("tenant") else None
        if not request.request_ids and tenant is None:
            raise invalid_field("request_ids", "must be given, or a tenant whose requests are all meant")
        ended = self._engine.end_requests(request.request_ids, tenant)
        log.warning("an operator ended %d requests", ended)
        return admin_pb2.CancelRequestsResponse(requests_cancelled=ended)

    async def ListTenants(  # noqa: N802
        self,
        request: admin_pb2.ListTenantsRequest,  # noqa: ARG002
        context: Any,  # noqa: ARG002
    ) -> admin_pb2.ListTenantsResponse:
        """Show the limits in force."""
        tenants = self._engine.core.tenants
        names = sorted(tenants.quotas.keys() | tenants.weights.keys())
        return admin_pb2.ListTenantsResponse(
            default_limits=_limits("", tenants.default, 1.0),
            tenants=[
                _limits(name, tenants.quotas.get(name, tenants.default), tenants.weights.get(name, 1.0))
                for name in names
            ],
        )

    async def SetTenant(self, request: admin_pb2.SetTenantRequest, context: Any) -> admin_pb2.SetTenantResponse:  # noqa: ARG002, N802
        """Set the limits of a tenant."""
        if not request.HasField("limits"):
            raise invalid_field("limits", "must be given")
        limits, tenants = request.limits, self._engine.core.tenants
        if len(tenants.quotas) >= MAX_TENANTS and limits.tenant not in tenants.quotas:
            raise invalid_field("limits.tenant", f"would be one more than {MAX_TENANTS} with limits of their own")
        try:
            quota = checked_quota(limits.max_requests, limits.tokens_per_s)
            changed = tenants.with_tenant(
                limits.tenant, quota, limits.weight or tenants.weights.get(limits.tenant, 1.0)
            )
        except ValueError as error:
            raise invalid_field("limits", str(error)) from None
        self._engine.change_tenants(changed)
        log.warning("an operator set the limits of tenant %s: %s", limits.tenant, quota)
        return admin_pb2.SetTenantResponse()

    async def ListQuarantine(  # noqa: N802
        self,
        request: admin_pb2.ListQuarantineRequest,  # noqa: ARG002
        context: Any,  # noqa: ARG002
    ) -> admin_pb2.ListQuarantineResponse:
        """Show what workers died of."""
        now = time.monotonic()
        return admin_pb2.ListQuarantineResponse(
            requests=[
                admin_pb2.QuarantinedRequest(
                    id=_name(key),
                    request_id=each.request_id,
                    tenant=each.tenant,
                    left_ms=int(1000 * (each.until - now)),
                )
                for key, each in self._engine.core.quarantine.quarantined(now).items()
            ]
        )

    async def LiftQuarantine(  # noqa: N802
        self,
        request: admin_pb2.LiftQuarantineRequest,
        context: Any,  # noqa: ARG002
    ) -> admin_pb2.LiftQuarantineResponse:
        """Let requests in again."""
        quarantine, ids = self._engine.core.quarantine, set(request.ids)
        lifted = [key for key in quarantine.quarantined(time.monotonic()) if not ids or _name(key) in ids]
        for key in lifted:
            quarantine.lift(key)
        return admin_pb2.LiftQuarantineResponse(requests_lifted=len(lifted))

    async def EvictWorker(self, request: admin_pb2.EvictWorkerRequest, context: Any) -> admin_pb2.EvictWorkerResponse:  # noqa: ARG002, N802
        """Take a worker out of service."""
        moved = self._engine.evict(request.worker_id, request.hold_ms / 1000)
        if moved < 0:
            raise invalid_field("worker_id", f"no worker {request.worker_id!r} is here: `octavo top` shows their names")
        return admin_pb2.EvictWorkerResponse(requests_moved=moved)

    async def SetLogLevel(self, request: admin_pb2.SetLogLevelRequest, context: Any) -> admin_pb2.SetLogLevelResponse:  # noqa: ARG002, N802
        """Log more or less."""
        return admin_pb2.SetLogLevelResponse(previous_level=change_log_level(request.level))

    async def DumpStacks(self, request: admin_pb2.DumpStacksRequest, context: Any) -> admin_pb2.DumpStacksResponse:  # noqa: ARG002, N802
        """Show what the process is doing."""
        return admin_pb2.DumpStacksResponse(text=stacks())


def _limits(tenant: str, quota: Quota, weight: float) -> admin_pb2.TenantLimits:
    return admin_pb2.TenantLimits(
        tenant=tenant, max_requests=quota.max_requests, tokens_per_s=quota.tokens_per_s, weight=weight
    )


def _name(key: bytes) -> str:
    """Return the name of a quarantined request for people."""
    return key[:8].hex()


def _describe(request: Request, now: float) -> admin_pb2.RequestInfo:
    running = any(seq.state is SequenceState.RUNNING for seq in request.sequences)
    return admin_pb2.RequestInfo(
        request_id=request.submit.request_id,
        tenant=request.submit.tenant,
        state=admin_pb2.RequestInfo.STATE_RUNNING if running else admin_pb2.RequestInfo.STATE_WAITING,
        prompt_tokens=request.sequences[0].num_prompt_tokens,
        output_tokens=sum(seq.num_output_tokens for seq in request.sequences),
        age_ms=int(1000 * (now - request.admitted_at)),
        kv_blocks=_num_blocks(request),
        preemptions=sum(seq.num_preemptions for seq in request.sequences),
        gateway_id=request.gateway_id,
    )


def _num_blocks(request: Request) -> int:
    """Return how many blocks a request holds: its candidates share those of the prompt."""
    if len(request.sequences) == 1:
        return request.sequences[0].num_held_blocks
    tables = (table for seq in request.sequences for table in seq.block_tables)
    return len({block.id for table in tables for block in table if block.id})
