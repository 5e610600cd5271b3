"""The AdminService of a gateway, for operators, on an address of its own."""

from __future__ import annotations

import asyncio

from grpc import aio

from octavo.admin.v1 import admin_pb2, admin_pb2_grpc
from octavo.services.common.errors import feature_disabled
from octavo.services.gateway.calls import GenerateCalls
from octavo.services.gateway.health import HealthMonitor
from octavo.services.gateway.request_stream import RequestStream
from octavo.services.gateway.scheduler_pool import SchedulerPool
from octavo.services.gateway.validation import RequestValidator

_DEFAULT_LIST = 1000

DrainContext = aio.ServicerContext[admin_pb2.DrainRequest, admin_pb2.DrainResponse]
ListContext = aio.ServicerContext[admin_pb2.ListRequestsRequest, admin_pb2.ListRequestsResponse]
FlushContext = aio.ServicerContext[admin_pb2.FlushPrefixCacheRequest, admin_pb2.FlushPrefixCacheResponse]


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Operates this gateway process."""

    def __init__(
        self,
        calls: GenerateCalls,
        health: HealthMonitor,
        schedulers: SchedulerPool,
        validator: RequestValidator,
        gateway_id: str,
        grace_s: float,
    ) -> None:
        self._calls = calls
        self._health = health
        self._schedulers = schedulers
        self._validator = validator
        self._gateway_id = gateway_id
        self._grace_s = grace_s

    async def Drain(  # noqa: N802 - named by the proto
        self, request: admin_pb2.DrainRequest, context: DrainContext
    ) -> admin_pb2.DrainResponse:
        """Refuse new calls, for good, and wait for the running ones."""
        del context
        self._validator.check(request)
        self._calls.draining = True
        await self._health.stop()
        grace_s = request.grace_ms / 1000 if request.grace_ms else self._grace_s
        try:
            async with asyncio.timeout(grace_s):
                await self._calls.wait_idle()
        except TimeoutError:
            pass  # the answer says how many are left
        return admin_pb2.DrainResponse(requests_left=self._calls.num_requests)

    async def ListRequests(  # noqa: N802 - named by the proto
        self, request: admin_pb2.ListRequestsRequest, context: ListContext
    ) -> admin_pb2.ListRequestsResponse:
        """List what this gateway has at the scheduler, oldest first."""
        del context
        self._validator.check(request)
        streams = self._schedulers.streams[: request.max_requests or _DEFAULT_LIST]
        return admin_pb2.ListRequestsResponse(requests=[self._describe(stream) for stream in streams])

    async def FlushPrefixCache(  # noqa: N802 - named by the proto
        self, request: admin_pb2.FlushPrefixCacheRequest, context: FlushContext
    ) -> admin_pb2.FlushPrefixCacheResponse:
        """Refuse: the cache is the scheduler's."""
        del request, context
        raise feature_disabled("prefix_cache", "a gateway has no prefix cache; ask the scheduler's AdminService")

    def _describe(self, stream: RequestStream) -> admin_pb2.RequestInfo:
        running = stream.num_output_tokens > 0
        age_s = asyncio.get_running_loop().time() - stream.submitted_at
        return admin_pb2.RequestInfo(
            request_id=stream.submit.request_id,
            tenant=stream.submit.tenant,
            state=admin_pb2.RequestInfo.STATE_RUNNING if running else admin_pb2.RequestInfo.STATE_WAITING,
            prompt_tokens=len(stream.submit.prompt_token_ids),
            output_tokens=stream.num_output_tokens,
            age_ms=int(age_s * 1000),
            gateway_id=self._gateway_id,
        )
