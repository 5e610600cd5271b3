"""The client: typed calls over the generated stubs."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from google.protobuf.message import Message

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import embedding_pb2, generation_pb2, load_pb2, model_pb2, tokenizer_pb2
from octavo.services.client.batch import BatchResult, BatchRun
from octavo.services.client.calls import Endpoint, Endpoints, first_of, unary
from octavo.services.client.embeddings import (
    Embeddings,
    EmbedOptions,
    Labelled,
    Ranked,
    embed_requests,
    gather,
    labelled,
)
from octavo.services.client.errors import ProtocolError
from octavo.services.client.request import (
    BatchItem,
    CallOptions,
    MessageLike,
    RequestOptions,
    build_chat,
    routing_headers,
    split_options,
)
from octavo.services.client.stream import Result, Stream

_EMBED_CALLS_AT_ONCE = 4


class Client:
    """Calls a gateway, or several. Every call raises OctavoError when it fails.

    address       host:port, dns:///name:port or unix:PATH, or several: they are taken in turn, and one that cannot
                  be reached is passed over
    credentials   for TLS; None means plain connections
    token         sent as `authorization: Bearer TOKEN`
    timeout_s     deadline of each call; None means none. A call's own `timeout_s` comes first.
    resume_for_s  how long a stream that broke is tried to be resumed; 0: not at all
    """

    def __init__(
        self,
        address: str | Sequence[str] = "127.0.0.1:50051",
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str = "",
        timeout_s: float | None = None,
        resume_for_s: float = 30.0,
    ) -> None:
        self._endpoints = Endpoints([address] if isinstance(address, str) else address, credentials)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._timeout_s = timeout_s
        self._resume_for_s = resume_for_s
        self._only_model = ""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections. Calls that still run raise ClientClosedError, as do those that come later."""
        await self._endpoints.close()

    def stream(self, prompt: str | None = None, **options: Unpack[RequestOptions]) -> Stream:
        """Start to generate; iterate over the result to get the output as it is made.

        Exactly one of `prompt` (plain text), `messages` (a chat) and `token_ids` is given. Without
        `model` the server must have just one. `request_id` names the request; by default a new id.
        """
        generation, call = split_options(prompt, options)

        async def calls() -> _StreamCalls:
            generation.model = generation.model or await self._default_model()
            return _StreamCalls(self._endpoints, self._call(call), stream)

        stream = Stream(calls, generation, self._resume_for_s)
        return stream

    async def generate(self, prompt: str | None = None, **options: Unpack[RequestOptions]) -> Result:
        """Generate and return the whole output. Arguments are those of `stream`."""
        generation, call = split_options(prompt, options)
        generation.model = generation.model or await self._default_model()
        request = generation_pb2.GenerateRequest(generation=generation)
        response: generation_pb2.GenerateResponse = await self._unary(
            lambda endpoint: endpoint.generation.Generate, request, call
        )
        if len(response.candidates) != (generation.candidate_count or 1):
            raise ProtocolError(f"{len(response.candidates)} candidates came", request_id=response.started.request_id)
        return Result(response)

    def batch(
        self,
        items: Iterable[BatchItem] | AsyncIterable[BatchItem],
        *,
        ordered: bool = False,
        timeout_s: float | None = None,
        request_id: str = "",
    ) -> AsyncIterator[BatchResult]:
        """Generate for many requests over one call; yields one BatchResult for each, as they end or in order.

        `items` are mappings of what `generate` takes, with "prompt" for plain text: `{"prompt": "Hello",
        "max_new_tokens": 8}`. They are read as the server has room for them, so a generator over a large file is
        fine. A failing item ends no other. When the call breaks, what was not answered is sent again.
        """

        def open_call() -> Any:
            return self._endpoints.pick().generation.BatchGenerate(**call.options())

        call = self._call({"timeout_s": timeout_s, "request_id": request_id})
        run = BatchRun(
            items, self._endpoints, open_call, self._default_model, self._resume_for_s, ordered, call.timeout_s
        )
        return run.results()

    async def embed(
        self,
        inputs: str | Sequence[str | Sequence[int]],
        *,
        timeout_s: float | None = None,
        **options: Unpack[EmbedOptions],
    ) -> Embeddings:
        """Return a vector for each input, a text or token ids. Long lists are sent in pieces, a few at a time."""
        model = options.get("model") or await self._default_model()
        requests = embed_requests(model, [inputs] if isinstance(inputs, str) else inputs, options)
        room = asyncio.Semaphore(_EMBED_CALLS_AT_ONCE)

        async def send(request: embedding_pb2.EmbedRequest) -> embedding_pb2.EmbedResponse:
            async with room:
                response: embedding_pb2.EmbedResponse = await self._unary(
                    lambda endpoint: endpoint.embedding.Embed, request, {"timeout_s": timeout_s}
                )
                return response

        tasks = [asyncio.ensure_future(send(request)) for request in requests]
        try:
            return gather(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        model: str = "",
        top_n: int | None = None,
        timeout_s: float | None = None,
    ) -> list[Ranked]:
        """Return the documents by how well they answer the query, best first; `top_n`: only so many."""
        request = embedding_pb2.RerankRequest(
            model=model or await self._default_model(), query=query, documents=documents, top_n=top_n
        )
        response: embedding_pb2.RerankResponse = await self._unary(
            lambda endpoint: endpoint.embedding.Rerank, request, {"timeout_s": timeout_s}
        )
        return [Ranked(result.index, result.relevance_score) for result in response.results]

    async def score(
        self,
        queries: str | Sequence[str],
        documents: Sequence[str],
        *,
        model: str = "",
        timeout_s: float | None = None,
    ) -> list[float]:
        """Return how well each document answers its query; a text is the query of all."""
        given = [queries] if isinstance(queries, str) else queries
        request = embedding_pb2.ScoreRequest(
            model=model or await self._default_model(), queries=given, documents=documents
        )
        response: embedding_pb2.ScoreResponse = await self._unary(
            lambda endpoint: endpoint.embedding.Score, request, {"timeout_s": timeout_s}
        )
        return list(response.scores)

    async def classify(
        self, texts: str | Sequence[str | tuple[str, str]], *, model: str = "", timeout_s: float | None = None
    ) -> list[Labelled]:
        """Return the labels of each text, or pair of texts."""
        request = embedding_pb2.ClassifyRequest(model=model or await self._default_model())
        for each in [texts] if isinstance(texts, str) else texts:
            text, second = (each, "") if isinstance(each, str) else each
            request.inputs.add(text=text, text_pair=second)
        response: embedding_pb2.ClassifyResponse = await self._unary(
            lambda endpoint: endpoint.embedding.Classify, request, {"timeout_s": timeout_s}
        )
        return labelled(response)

    async def cancel(self, request_id: str) -> generation_pb2.CancelGenerationResponse:
        """End a request by its id, whoever started it."""
        request = generation_pb2.CancelGenerationRequest(request_id=request_id)
        response: generation_pb2.CancelGenerationResponse = await self._unary(
            lambda endpoint: endpoint.generation.CancelGeneration, request
        )
        return response

    async def models(self) -> Sequence[model_pb2.Model]:
        """Return all models, by name."""
        response: model_pb2.ListModelsResponse = await self._unary(
            lambda endpoint: endpoint.models.ListModels, model_pb2.ListModelsRequest()
        )
        return response.models

    async def tokenize(
        self,
        texts: str | Sequence[str] = (),
        *,
        model: str = "",
        messages: Sequence[MessageLike] | None = None,
        omit_special_tokens: bool = False,
    ) -> list[list[int]]:
        """Return the token ids of each text, then those of the chat, if one is given."""
        request = tokenizer_pb2.TokenizeRequest(
            model=model or await self._default_model(),
            texts=[texts] if isinstance(texts, str) else texts,
            chat=None if messages is None else build_chat(messages, {}),
            omit_special_tokens=omit_special_tokens,
        )
        response: tokenizer_pb2.TokenizeResponse = await self._unary(
            lambda endpoint: endpoint.tokenizer.Tokenize, request
        )
        return [list(tokenization.token_ids) for tokenization in response.tokenizations]

    async def detokenize(
        self, sequences: Sequence[Sequence[int]], *, model: str = "", keep_special_tokens: bool = False
    ) -> list[str]:
        """Return the text of each sequence of token ids."""
        request = tokenizer_pb2.DetokenizeRequest(
            model=model or await self._default_model(),
            sequences=[common_pb2.TokenIds(ids=ids) for ids in sequences],
            keep_special_tokens=keep_special_tokens,
        )
        response: tokenizer_pb2.DetokenizeResponse = await self._unary(
            lambda endpoint: endpoint.tokenizer.Detokenize, request
        )
        return list(response.texts)

    async def load(self) -> Sequence[load_pb2.SchedulerLoad]:
        """Return how busy each scheduler is."""
        response: load_pb2.GetLoadResponse = await self._unary(
            lambda endpoint: endpoint.load.GetLoad, load_pb2.GetLoadRequest()
        )
        return response.schedulers

    async def _default_model(self) -> str:
        """Return the name of the server's only model; ValueError if there are several."""
        if not self._only_model:
            names = [model.name for model in await self.models()]
            if len(names) != 1:
                raise ValueError(f"say which model: the server has {', '.join(names) or 'none'}")
            self._only_model = names[0]
        return self._only_model

    async def _unary(
        self, method: Callable[[Endpoint], Any], request: Message, options: CallOptions | None = None
    ) -> Any:
        call = self._call(options or CallOptions())
        generation = request.generation if isinstance(request, generation_pb2.GenerateRequest) else None
        return await self._endpoints.call(
            lambda endpoint: unary(method(endpoint)(request, **call.options(generation)), call.timeout_s),
            call.deadline,
        )

    def _call(self, options: CallOptions) -> _Call:
        timeout_s = options.get("timeout_s")
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        request_id = options.get("request_id") or uuid.uuid4().hex
        return _Call((*self._metadata, ("x-request-id", request_id)), timeout_s)


class _Call:
    """What the attempts of one call share: metadata, and a deadline (a time of the event loop)."""

    def __init__(self, metadata: Sequence[tuple[str, str]], timeout_s: float | None) -> None:
        self._metadata = metadata
        self.timeout_s = timeout_s
        self.deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s

    def options(self, generation: generation_pb2.Generation | None = None) -> dict[str, Any]:
        """Return the arguments of the next attempt. Routers read the headers that mirror `generation`."""
        left = None if self.deadline is None else max(self.deadline - asyncio.get_running_loop().time(), 0.0)
        mirrored = () if generation is None else routing_headers(generation)
        return {"metadata": (*self._metadata, *mirrored), "timeout": left}


class _StreamCalls:
    """The calls of one stream; see StreamCalls."""

    def __init__(self, endpoints: Endpoints, call: _Call, stream: Stream) -> None:
        self._endpoints = endpoints
        self._call = call
        self._stream = stream  # whose `on_retry` is told
        self.timeout_s = call.timeout_s
        self.check_open = endpoints.check_open
        self.pause = endpoints.pause

    async def generate(self, generation: generation_pb2.Generation) -> tuple[Any, Any]:
        request = generation_pb2.GenerateStreamRequest(generation=generation)
        return await self._endpoints.call(
            lambda endpoint: first_of(
                endpoint.generation.GenerateStream(request, **self._call.options(generation)), self.timeout_s
            ),
            self._call.deadline,
            self._stream.on_retry,
        )

    async def resume(self, token: str, cursors: Sequence[generation_pb2.Cursor]) -> tuple[Any, Any]:
        request = generation_pb2.ResumeStreamRequest(resume_token=token, cursors=cursors)
        return await self._endpoints.call(
            lambda endpoint: first_of(
                endpoint.generation.ResumeStream(request, **self._call.options()), self.timeout_s
            ),
            self._call.deadline,
            self._stream.on_retry,
        )

    async def cancel(self, request_id: str) -> None:
        request = generation_pb2.CancelGenerationRequest(request_id=request_id)
        await self._endpoints.call(
            lambda endpoint: unary(endpoint.generation.CancelGeneration(request, **self._call.options())),
            self._call.deadline,
        )
