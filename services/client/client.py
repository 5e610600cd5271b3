"""The client: typed calls over the generated stubs."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from google.protobuf.message import Message

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import (
    generation_pb2,
    generation_pb2_grpc,
    load_pb2,
    load_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)
from octavo.services.client.errors import ProtocolError, from_rpc_error
from octavo.services.client.request import GenerationOptions, MessageLike, build_chat, build_generation
from octavo.services.client.stream import Result, Stream

_RETRIED = {
    "octavo.inference.v1.GenerationService": ("Generate", "GenerateStream"),
    "octavo.inference.v1.ModelService": ("ListModels", "GetModel"),
    "octavo.inference.v1.TokenizerService": ("Tokenize", "Detokenize", "GetTokenizer"),
    "octavo.inference.v1.LoadService": ("GetLoad",),
}
# gRPC itself retries, and only before the response headers: they mean that the request was admitted.
_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": service, "method": name} for service, names in _RETRIED.items() for name in names],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.05s",
                "maxBackoff": "1s",
                "backoffMultiplier": 4,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}
_MAX_MESSAGE_BYTES = 64 << 20
_CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # A long prefill sends nothing: pings notice a dead connection, and keep proxies from cutting a live one.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
]


class Client:
    """A connection to a gateway, or to several behind one name. Every call raises OctavoError when it fails.

    address      host:port, dns:///name:port, or unix:PATH
    credentials  for TLS; None means a plain connection
    token        sent as `authorization: Bearer TOKEN`
    timeout_s    deadline of each call; None means none. A call's own `timeout_s` comes first.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:50051",
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str = "",
        timeout_s: float | None = None,
    ) -> None:
        self._channel = (
            grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options=_CHANNEL_OPTIONS)
        )
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._models = model_pb2_grpc.ModelServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._tokenizer = tokenizer_pb2_grpc.TokenizerServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._load = load_pb2_grpc.LoadServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._timeout_s = timeout_s
        self._only_model = ""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls that still run are cancelled."""
        await self._channel.close(None)

    def stream(
        self,
        prompt: str | None = None,
        *,
        model: str = "",
        messages: Sequence[MessageLike] | None = None,
        token_ids: Sequence[int] | None = None,
        request_id: str = "",
        timeout_s: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Stream:
        """Start to generate; iterate over the result to get the output as it is made.

        Exactly one of `prompt` (plain text), `messages` (a chat) and `token_ids` is given. Without
        `model` the server must have just one. `request_id` names the request; by default a new id.
        """
        generation = build_generation(model, prompt, messages, token_ids, options)

        async def start() -> Any:
            generation.model = generation.model or await self._default_model()
            request = generation_pb2.GenerateStreamRequest(generation=generation)
            return self._generation.GenerateStream(request, **self._call_options(request_id, timeout_s))

        return Stream(start, generation)

    async def generate(
        self,
        prompt: str | None = None,
        *,
        model: str = "",
        messages: Sequence[MessageLike] | None = None,
        token_ids: Sequence[int] | None = None,
        request_id: str = "",
        timeout_s: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Result:
        """Generate and return the whole output. Arguments are those of `stream`."""
        generation = build_generation(model or await self._default_model(), prompt, messages, token_ids, options)
        response: generation_pb2.GenerateResponse = await self._unary(
            self._generation.Generate, generation_pb2.GenerateRequest(generation=generation), request_id, timeout_s
        )
        if len(response.candidates) != (generation.candidate_count or 1):
            raise ProtocolError(f"{len(response.candidates)} candidates came", request_id=response.started.request_id)
        return Result(response)

    async def cancel(self, request_id: str) -> generation_pb2.CancelGenerationResponse:
        """End a request by its id, whoever started it."""
        request = generation_pb2.CancelGenerationRequest(request_id=request_id)
        response: generation_pb2.CancelGenerationResponse = await self._unary(
            self._generation.CancelGeneration, request
        )
        return response

    async def models(self) -> Sequence[model_pb2.Model]:
        """Return all models, by name."""
        response: model_pb2.ListModelsResponse = await self._unary(
            self._models.ListModels, model_pb2.ListModelsRequest()
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
        response: tokenizer_pb2.TokenizeResponse = await self._unary(self._tokenizer.Tokenize, request)
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
        response: tokenizer_pb2.DetokenizeResponse = await self._unary(self._tokenizer.Detokenize, request)
        return list(response.texts)

    async def load(self) -> Sequence[load_pb2.SchedulerLoad]:
        """Return how busy each scheduler is."""
        response: load_pb2.GetLoadResponse = await self._unary(self._load.GetLoad, load_pb2.GetLoadRequest())
        return response.schedulers

    async def _default_model(self) -> str:
        """Return the name of the server's only model; ValueError if there are several."""
        if not self._only_model:
            names = [model.name for model in await self.models()]
            if len(names) != 1:
                raise ValueError(f"say which model: the server has {', '.join(names) or 'none'}")
            self._only_model = names[0]
        return self._only_model

    async def _unary(self, method: Any, request: Message, request_id: str = "", timeout_s: float | None = None) -> Any:
        try:
            return await method(request, **self._call_options(request_id, timeout_s))
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    def _call_options(self, request_id: str, timeout_s: float | None) -> dict[str, Any]:
        return {
            "metadata": (*self._metadata, ("x-request-id", request_id or uuid.uuid4().hex)),
            "timeout": self._timeout_s if timeout_s is None else timeout_s,
        }
