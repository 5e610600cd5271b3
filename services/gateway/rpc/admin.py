"""The AdminService of a gateway, for operators, on an address of its own."""

from __future__ import annotations

import asyncio
from typing import Any

from grpc import aio

from octavo.admin.v1 import admin_pb2, admin_pb2_grpc
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.errors import feature_disabled
from octavo.services.common.operating import change_log_level, stacks
from octavo.services.gateway.requests.adapters import Adapters
from octavo.services.gateway.requests.calls import GenerateCalls
from octavo.services.gateway.rpc.health import HealthMonitor
from octavo.services.gateway.schedulers.pool import SchedulerPool
from octavo.services.gateway.schedulers.request_stream import RequestStream
from octavo.services.gateway.validation import RequestValidator

_DEFAULT_LIST = 1000

_OF_SCHEDULERS = (
    "CancelRequests", "ListTenants", "SetTenant", "ListQuarantine", "LiftQuarantine", "EvictWorker", "FlushPrefixCache",
)  # fmt: skip

DrainContext = aio.ServicerContext[admin_pb2.DrainRequest, admin_pb2.DrainResponse]
ListContext = aio.ServicerContext[admin_pb2.ListRequestsRequest, admin_pb2.ListRequestsResponse]
LoadContext = aio.ServicerContext[admin_pb2.LoadAdapterRequest, admin_pb2.LoadAdapterResponse]
UnloadContext = aio.ServicerContext[admin_pb2.UnloadAdapterRequest, admin_pb2.UnloadAdapterResponse]
ListAdaptersContext = aio.ServicerContext[admin_pb2.ListAdaptersRequest, admin_pb2.ListAdaptersResponse]


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
        adapters: Adapters | None = None,
    ) -> None:
        self._calls = calls
        self._health = health
        self._schedulers = schedulers
        self._validator = validator
        self._gateway_id = gateway_id
        self._grace_s = grace_s
        self._adapters = adapters

    async def Drain(  # noqa: N802 - named by the proto
        self, request: admin_pb2.DrainRequest, context: DrainContext
    ) -> admin_pb2.DrainResponse:
        """Refuse new calls, until Undrain, and wait for the running ones."""
        del context
        self._validator.check(request)
        self._calls.draining = True
        await self._health.drain(True)
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

    async def Undrain(self, request: admin_pb2.UndrainRequest, context: Any) -> admin_pb2.UndrainResponse:  # noqa: N802
        """Take calls again."""
        del request, context
        self._calls.draining = False
        await self._health.drain(False)
        return admin_pb2.UndrainResponse()

    async def SetLogLevel(  # noqa: N802 - named by the proto
        self, request: admin_pb2.SetLogLevelRequest, context: Any
    ) -> admin_pb2.SetLogLevelResponse:
        """Log more or less."""
        del context
        self._validator.check(request)
        return admin_pb2.SetLogLevelResponse(previous_level=change_log_level(request.level))

    async def DumpStacks(  # noqa: N802 - named by the proto
        self, request: admin_pb2.DumpStacksRequest, context: Any
    ) -> admin_pb2.DumpStacksResponse:
        """Show what the process is doing."""
        del request, context
        return admin_pb2.DumpStacksResponse(text=stacks())

    async def LoadAdapter(  # noqa: N802 - named by the proto
        self, request: admin_pb2.LoadAdapterRequest, context: LoadContext
    ) -> admin_pb2.LoadAdapterResponse:
        """Have workers load an adapter, and give it a name."""
        del context
        self._validator.check(request)
        entry = await self._named().load(request.name, request.path)
        return admin_pb2.LoadAdapterResponse(adapter=_adapter(entry))

    async def UnloadAdapter(  # noqa: N802 - named by the proto
        self, request: admin_pb2.UnloadAdapterRequest, context: UnloadContext
    ) -> admin_pb2.UnloadAdapterResponse:
        """Take a name away."""
        del context
        self._validator.check(request)
        self._named().unload(request.name)
        return admin_pb2.UnloadAdapterResponse()

    async def ListAdapters(  # noqa: N802 - named by the proto
        self, request: admin_pb2.ListAdaptersRequest, context: ListAdaptersContext
    ) -> admin_pb2.ListAdaptersResponse:
        """List what was given names, by name."""
        del request, context
        return admin_pb2.ListAdaptersResponse(adapters=map(_adapter, self._named().entries()))

    def _named(self) -> Adapters:
        if self._adapters is None:
            raise feature_disabled("adapters", "the model makes vectors, and takes no adapters")
        return self._adapters

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


def _adapter(entry: scheduler_pb2.AdapterName) -> admin_pb2.AdapterInfo:
    return admin_pb2.AdapterInfo(name=entry.name, path=entry.path, sha256=entry.sha256)


async def _refuse(self: AdminServicer, request: Any, context: Any) -> Any:
    """Refuse what only a scheduler can do."""
    del self, request, context
    raise feature_disabled("admin", "a gateway has no queue, cache or workers: ask the AdminService of a scheduler")


for _name in _OF_SCHEDULERS:
    setattr(AdminServicer, _name, _refuse)
