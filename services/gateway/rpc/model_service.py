"""The ModelService: what models there are."""

from __future__ import annotations

from grpc import aio

from octavo.inference.v1 import model_pb2, model_pb2_grpc
from octavo.services.gateway.requests.model import Models, ServedModel
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
