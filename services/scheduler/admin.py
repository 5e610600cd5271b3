"""The operators' service of a scheduler, on a port of its own."""

from __future__ import annotations

import asyncio
import time
from itertools import islice
from pathlib import Path
from typing import Any

from octavo.admin.v1 import admin_pb2, admin_pb2_grpc
from octavo.services.common.api_keys import find_key, parse_keys
from octavo.services.common.errors import Reason, ServingError
from octavo.services.common.files import WatchedFile
from octavo.services.scheduler.config import SchedulerConfig
from octavo.services.scheduler.engine import Engine
from octavo.services.scheduler.sequence import Request, SequenceState

DEFAULT_MAX_REQUESTS = 1000
REQUESTS_AT_ONCE = 100  # are described before others have a turn: the event loop is the one that plans steps


class AdminKeys:
    """Lets those call who have an admin's API key; the file is followed."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises ValueError."""
        self._keys = WatchedFile(path, parse_keys)

    def authorize(self, method: str, context: Any) -> str:
        """Return the tenant of a call's key. Raises UNAUTHENTICATED, PERMISSION_DENIED."""
        del method
        headers = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        scheme, _, key = headers.get("authorization", "").partition(" ")
        who = find_key(self._keys.get(), key.strip()) if scheme.lower() == "bearer" else None
        if who is None:
            message = "this server needs a valid credential: send the header `authorization: Bearer KEY`"
            raise ServingError(Reason.UNAUTHENTICATED, message)
        if not who.is_admin:
            raise ServingError(Reason.PERMISSION_DENIED, "this needs a key made with `octavo keys add --admin`")
        return who.tenant


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


def _describe(request: Request, now: float) -> admin_pb2.RequestInfo:
    running = any(seq.state is SequenceState.RUNNING for seq in request.sequences)
    return admin_pb2.RequestInfo(
        request_id=request.submit.request_id,
        tenant=request.submit.tenant,
        state=admin_pb2.RequestInfo.STATE_RUNNING if running else admin_pb2.RequestInfo.STATE_WAITING,
        prompt_tokens=request.sequences[0].num_prompt,
        output_tokens=sum(seq.num_output for seq in request.sequences),
        age_ms=int(1000 * (now - request.admitted_at)),
        kv_blocks=_num_blocks(request),
        preemptions=sum(seq.num_preemptions for seq in request.sequences),
        gateway_id=request.gateway_id,
    )


def _num_blocks(request: Request) -> int:
    """Return how many blocks a request holds: its candidates share those of the prompt."""
    if len(request.sequences) == 1:
        return len(request.sequences[0].blocks)
    return len({block.id for seq in request.sequences for block in seq.blocks})
