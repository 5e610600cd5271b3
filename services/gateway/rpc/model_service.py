"""The ModelService, which says what models there are, and the LoadService, which says how busy schedulers are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from grpc import aio

from octavo.inference.v1 import load_pb2, load_pb2_grpc, model_pb2, model_pb2_grpc
from octavo.services.gateway.requests.model import Models, ServedModel
from octavo.services.gateway.schedulers.peer import SchedulerPeer
from octavo.services.gateway.schedulers.pool import SchedulerPool
from octavo.services.gateway.validation import RequestValidator

ListContext = aio.ServicerContext[model_pb2.ListModelsRequest, model_pb2.ListModelsResponse]
GetContext = aio.ServicerContext[model_pb2.GetModelRequest, model_pb2.GetModelResponse]


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Describes the models; answers without a scheduler, too."""

    def __init__(self, models: Models, schedulers: SchedulerPool, validator: RequestValidator) -> None:
        self._models = models
        self._schedulers = schedulers
        self._validator = validator

    async def ListModels(  # noqa: N802 - named by the proto
        self, request: model_pb2.ListModelsRequest, context: ListContext
    ) -> model_pb2.ListModelsResponse:
        """List all models by name."""
        del request, context
        return model_pb2.ListModelsResponse(models=[self._describe(model) for model in self._models.all])

    async def GetModel(  # noqa: N802 - named by the proto
        self, request: model_pb2.GetModelRequest, context: GetContext
    ) -> model_pb2.GetModelResponse:
        """Describe one model. Raises MODEL_NOT_FOUND."""
        del context
        self._validator.check(request)
        return model_pb2.GetModelResponse(model=self._describe(self._models.of(request.name)))

    def _describe(self, model: ServedModel) -> model_pb2.Model:
        schedulers = self._schedulers
        described = model.describe(schedulers.model_version, schedulers.max_model_len, schedulers.scores_prompts)
        if self._models.adapters is not None:
            described.adapters.extend(self._models.adapters.names())
            if schedulers.takes_adapters:
                described.features.append("adapters")
        described.notes.extend(schedulers.notes)
        return described


_DEFAULT_INTERVAL_MS = 1000
_LEAST_INTERVAL_MS = 50  # the scheduler itself reports each second

GetLoadContext = aio.ServicerContext[load_pb2.GetLoadRequest, load_pb2.GetLoadResponse]
WatchContext = aio.ServicerContext[load_pb2.WatchLoadRequest, load_pb2.WatchLoadResponse]


class LoadServicer(load_pb2_grpc.LoadServiceServicer):
    """Passes on what each scheduler said last; the list has those that are connected."""

    def __init__(self, model_name: str, schedulers: SchedulerPool, validator: RequestValidator) -> None:
        self._model_name = model_name
        self._schedulers = schedulers
        self._validator = validator

    async def GetLoad(  # noqa: N802 - named by the proto
        self, request: load_pb2.GetLoadRequest, context: GetLoadContext
    ) -> load_pb2.GetLoadResponse:
        """Return the load now."""
        del request, context
        return load_pb2.GetLoadResponse(schedulers=self._loads())

    async def WatchLoad(  # noqa: N802 - named by the proto
        self, request: load_pb2.WatchLoadRequest, context: WatchContext
    ) -> AsyncIterator[load_pb2.WatchLoadResponse]:
        """Report at once and then at the interval asked for, at least 50 ms."""
        del context
        self._validator.check(request)
        interval_s = max(request.interval_ms or _DEFAULT_INTERVAL_MS, _LEAST_INTERVAL_MS) / 1000
        while True:
            yield load_pb2.WatchLoadResponse(schedulers=self._loads())
            await asyncio.sleep(interval_s)

    def _loads(self) -> list[load_pb2.SchedulerLoad]:
        return [self._load(peer) for peer in self._schedulers.peers]

    def _load(self, peer: SchedulerPeer) -> load_pb2.SchedulerLoad:
        load, welcome = peer.load, peer.welcome
        assert welcome is not None, "a peer of the pool is connected"
        return load_pb2.SchedulerLoad(
            scheduler_id=peer.scheduler_id,
            model=self._model_name,
            running=load.running,
            waiting=load.waiting,
            waiting_uncached_tokens=load.waiting_uncached_tokens,
            kv_blocks_free=load.kv_blocks_free,
            kv_blocks_total=load.kv_blocks_total or welcome.kv_blocks_total,
            kv_block_size=welcome.kv_block_size,
            estimated_queue_ms=load.estimated_queue_ms,
            draining=peer.draining,
            workers_ready=load.workers_ready,
            prompt_tokens=load.prompt_tokens,
            output_tokens=load.output_tokens,
            looked_up_tokens=load.looked_up_tokens,
            accepted_tokens=load.accepted_tokens,
            proposers=load.proposers,
            cached_tokens=load.cached_tokens,
            preemptions=load.preemptions,
            workers=[
                load_pb2.WorkerLoad(
                    worker_id=worker.worker_id,
                    running=worker.running,
                    kv_blocks_free=worker.kv_blocks_free,
                    kv_blocks_total=worker.kv_blocks_total,
                    tokens_per_s=worker.tokens_per_s,
                )
                for worker in load.workers
            ],
        )
