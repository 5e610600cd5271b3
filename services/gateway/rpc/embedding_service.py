"""The EmbeddingService: vectors, labels and scores for texts, and documents in the order of their relevance."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from grpc import aio

from octavo.inference.v1 import embedding_pb2, embedding_pb2_grpc
from octavo.services.common.interceptor import request_id
from octavo.services.gateway.authentication import caller
from octavo.services.gateway.requests.accounting import Call
from octavo.services.gateway.requests.vector_calls import VectorCalls
from octavo.services.gateway.rpc.generation_service import call_of

EmbedContext = aio.ServicerContext[embedding_pb2.EmbedRequest, embedding_pb2.EmbedResponse]
ScoreContext = aio.ServicerContext[embedding_pb2.ScoreRequest, embedding_pb2.ScoreResponse]
ClassifyContext = aio.ServicerContext[embedding_pb2.ClassifyRequest, embedding_pb2.ClassifyResponse]
RerankContext = aio.ServicerContext[embedding_pb2.RerankRequest, embedding_pb2.RerankResponse]

_Request = TypeVar(
    "_Request",
    embedding_pb2.EmbedRequest,
    embedding_pb2.RerankRequest,
    embedding_pb2.ScoreRequest,
    embedding_pb2.ClassifyRequest,
)
_Response = TypeVar(
    "_Response",
    embedding_pb2.EmbedResponse,
    embedding_pb2.RerankResponse,
    embedding_pb2.ScoreResponse,
    embedding_pb2.ClassifyResponse,
)


class EmbeddingServicer(embedding_pb2_grpc.EmbeddingServiceServicer):
    """Every method raises ServingError; the interceptor makes the status."""

    def __init__(self, calls: VectorCalls) -> None:
        self._calls = calls

    async def Embed(  # noqa: N802 - named by the proto
        self, request: embedding_pb2.EmbedRequest, context: EmbedContext
    ) -> embedding_pb2.EmbedResponse:
        """Embed texts."""
        return await self._answer(self._calls.embed, request, context)

    async def Rerank(  # noqa: N802 - named by the proto
        self, request: embedding_pb2.RerankRequest, context: RerankContext
    ) -> embedding_pb2.RerankResponse:
        """Rank documents."""
        return await self._answer(self._calls.rerank, request, context)

    async def Score(  # noqa: N802 - named by the proto
        self, request: embedding_pb2.ScoreRequest, context: ScoreContext
    ) -> embedding_pb2.ScoreResponse:
        """Score pairs of texts."""
        return await self._answer(self._calls.score, request, context)

    async def Classify(  # noqa: N802 - named by the proto
        self, request: embedding_pb2.ClassifyRequest, context: ClassifyContext
    ) -> embedding_pb2.ClassifyResponse:
        """Label texts."""
        return await self._answer(self._calls.classify, request, context)

    async def _answer(
        self,
        call: Callable[[_Request, Call], Awaitable[_Response]],
        request: _Request,
        context: aio.ServicerContext[_Request, _Response],
    ) -> _Response:
        """Answer a request with a method of `VectorCalls`, and say in the trailers what it used."""
        await self._calls.check(request, caller().tenant)
        response = await call(request, call_of(context))
        used = str(response.usage.prompt_tokens)
        context.set_trailing_metadata((("x-request-id", request_id()), ("x-usage-prompt-tokens", used)))
        return response
