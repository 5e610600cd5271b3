"""The EmbeddingService: vectors for texts, and documents in the order of their relevance."""

from __future__ import annotations

from grpc import aio

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import embedding_pb2, embedding_pb2_grpc
from octavo.services.common.interceptor import request_id
from octavo.services.gateway.authentication import caller
from octavo.services.gateway.server import deadline_of, headers_of
from octavo.services.gateway.vector_calls import VectorCalls

EmbedContext = aio.ServicerContext[embedding_pb2.EmbedRequest, embedding_pb2.EmbedResponse]
RerankContext = aio.ServicerContext[embedding_pb2.RerankRequest, embedding_pb2.RerankResponse]


class EmbeddingServicer(embedding_pb2_grpc.EmbeddingServiceServicer):
    """Every method raises ServingError; the interceptor makes the status."""

    def __init__(self, calls: VectorCalls) -> None:
        self._calls = calls

    async def Embed(  # noqa: N802 - named by the proto
        self, request: embedding_pb2.EmbedRequest, context: EmbedContext
    ) -> embedding_pb2.EmbedResponse:
        """Embed texts."""
        await self._calls.check(request, caller().tenant)
        response = await self._calls.embed(
            request, request_id(), caller().tenant, headers_of(context), deadline_of(context)
        )
        context.set_trailing_metadata(_trailers(response.usage))
        return response

    async def Rerank(  # noqa: N802 - named by the proto
        self, request: embedding_pb2.RerankRequest, context: RerankContext
    ) -> embedding_pb2.RerankResponse:
        """Rank documents."""
        await self._calls.check(request, caller().tenant)
        response = await self._calls.rerank(
            request, request_id(), caller().tenant, headers_of(context), deadline_of(context)
        )
        context.set_trailing_metadata(_trailers(response.usage))
        return response


def _trailers(usage: common_pb2.Usage) -> tuple[tuple[str, str], ...]:
    return (("x-request-id", request_id()), ("x-usage-prompt-tokens", str(usage.prompt_tokens)))
