"""The EmbeddingService: vectors for texts, and documents in the order of their relevance."""

from __future__ import annotations

import asyncio

from grpc import aio

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import embedding_pb2, embedding_pb2_grpc
from octavo.services.common.interceptor import request_id
from octavo.services.gateway.authentication import caller
from octavo.services.gateway.validation import RequestValidator
from octavo.services.gateway.vector_calls import VectorCalls

EmbedContext = aio.ServicerContext[embedding_pb2.EmbedRequest, embedding_pb2.EmbedResponse]
RerankContext = aio.ServicerContext[embedding_pb2.RerankRequest, embedding_pb2.RerankResponse]
AnyContext = EmbedContext | RerankContext


class EmbeddingServicer(embedding_pb2_grpc.EmbeddingServiceServicer):
    """Every method raises ServingError; the interceptor makes the status."""

    def __init__(self, calls: VectorCalls, validator: RequestValidator) -> None:
        self._calls = calls
        self._validator = validator

    async def Embed(  # noqa: N802 - named by the proto
        self, request: embedding_pb2.EmbedRequest, context: EmbedContext
    ) -> embedding_pb2.EmbedResponse:
        """Embed texts."""
        self._validator.check(request)
        response = await self._calls.embed(
            request, request_id(), caller().tenant, _headers(context), _deadline(context)
        )
        context.set_trailing_metadata(_trailers(response.usage))
        return response

    async def Rerank(  # noqa: N802 - named by the proto
        self, request: embedding_pb2.RerankRequest, context: RerankContext
    ) -> embedding_pb2.RerankResponse:
        """Rank documents."""
        self._validator.check(request)
        response = await self._calls.rerank(
            request, request_id(), caller().tenant, _headers(context), _deadline(context)
        )
        context.set_trailing_metadata(_trailers(response.usage))
        return response


def _headers(context: AnyContext) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


def _deadline(context: AnyContext) -> float | None:
    remaining_s = context.time_remaining()
    return None if remaining_s is None else asyncio.get_running_loop().time() + remaining_s


def _trailers(usage: common_pb2.Usage) -> tuple[tuple[str, str], ...]:
    return (("x-request-id", request_id()), ("x-usage-prompt-tokens", str(usage.prompt_tokens)))
