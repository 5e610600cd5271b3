"""The endpoints that produce no text: models, tokens, and how the gateway is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.responses import Response

from octavo import __version__
from octavo.inference.v1 import model_pb2, tokenizer_pb2
from octavo.services.common.errors import ServingError
from octavo.services.gateway.authentication import caller
from octavo.services.gateway.http.chat_request import read_chat
from octavo.services.gateway.http.endpoint import HttpRequest, parse_object
from octavo.services.gateway.http.errors import in_openai_words
from octavo.services.gateway.http.fields import DETOKENIZE, TOKENIZE
from octavo.services.gateway.http.messages_request import read_messages_call
from octavo.services.gateway.http.params import Ignored, Params
from octavo.services.gateway.offload.long_json import to_json_in_pieces
from octavo.services.gateway.requests.model import Models
from octavo.services.gateway.rpc.model_service import ModelServicer
from octavo.services.gateway.rpc.tokenizer_service import TokenizerServicer
from octavo.services.gateway.tokenization.tokenizer import INLINE_CHARS, INLINE_TOKENS

_NO_CONTEXT: Any = None  # the servicers take nothing from their calls' contexts


class InfoEndpoints:
    """Answers from the gateway's own services."""

    def __init__(
        self,
        models: Models,
        model_servicer: ModelServicer,
        tokenizer_servicer: TokenizerServicer,
        is_ready: Callable[[], bool],
    ) -> None:
        self._models = models
        self._model_servicer = model_servicer
        self._tokenizer_servicer = tokenizer_servicer
        self._is_ready = is_ready
        self._created = int(time.time())

    async def list_models(self, request: HttpRequest) -> Response:
        """List every name that works."""
        del request
        listed = await self._model_servicer.ListModels(model_pb2.ListModelsRequest(), _NO_CONTEXT)
        names = [(name, model) for model in listed.models for name in (model.name, *model.aliases, *model.adapters)]
        return _json({"object": "list", "data": [self._describe(name, model) for name, model in names]})

    async def get_model(self, request: HttpRequest) -> Response:
        """Describe one model."""
        name = request.path_params["model"]
        if not name:  # /v1/models/
            return await self.list_models(request)
        found = await self._model_servicer.GetModel(model_pb2.GetModelRequest(name=name), _NO_CONTEXT)
        return _json(self._describe(name, found.model))

    async def tokenize(self, request: HttpRequest) -> Response:
        """Return the tokens of a text or a conversation."""
        data = await request.body()
        is_long = len(data) > INLINE_CHARS
        run = self._models.long_work.run
        body, with_texts = await run(caller().tenant, lambda: _read_tokenize(data, request.ignored), is_long)
        try:
            answer = await self._tokenizer_servicer.Tokenize(body, _NO_CONTEXT)
        except ServingError as error:
            raise in_openai_words(error) from None
        tokenizer = self._models.of(body.model).tokenizer
        described = (await self._model_servicer.GetModel(model_pb2.GetModelRequest(name=body.model), _NO_CONTEXT)).model

        def write() -> str:
            token_ids = list(answer.tokenizations[0].token_ids)
            texts = [tokenizer.token_bytes(token_id).decode(errors="replace") for token_id in token_ids if with_texts]
            return to_json_in_pieces(
                {
                    "count": len(token_ids),
                    "max_model_len": described.max_context_tokens,
                    "tokens": token_ids,
                    "token_strs": texts if with_texts else None,
                }
            )

        content = await run(caller().tenant, write, len(answer.tokenizations[0].token_ids) > INLINE_TOKENS)
        return Response(content, media_type="application/json")

    async def count_tokens(self, request: HttpRequest) -> Response:
        """Return how many tokens a conversation in Anthropic's form has."""
        data = await request.body()

        def read() -> tokenizer_pb2.TokenizeRequest:
            generation = read_messages_call(parse_object(data), request.headers, request.ignored).requests[0].generation
            return tokenizer_pb2.TokenizeRequest(model=generation.model, chat=generation.chat)

        body = await self._models.long_work.run(caller().tenant, read, len(data) > INLINE_CHARS)
        try:
            answer = await self._tokenizer_servicer.Tokenize(body, _NO_CONTEXT)
        except ServingError as error:
            raise in_openai_words(error) from None
        return _json({"input_tokens": len(answer.tokenizations[0].token_ids)})

    async def detokenize(self, request: HttpRequest) -> Response:
        """Return the text of tokens."""
        data = await request.body()
        read = partial(_read_detokenize, data, request.ignored)
        body = await self._models.long_work.run(caller().tenant, read, len(data) > INLINE_CHARS)
        try:
            answer = await self._tokenizer_servicer.Detokenize(body, _NO_CONTEXT)
        except ServingError as error:
            raise in_openai_words(error) from None
        return _json({"prompt": answer.texts[0]})

    async def health(self, request: HttpRequest) -> Response:
        """Answer 200 while a generate call could succeed, else 503."""
        del request
        return Response(status_code=200 if self._is_ready() else 503)

    async def version(self, request: HttpRequest) -> Response:
        """Return the version of this software."""
        del request
        return _json({"version": __version__})

    def _describe(self, name: str, model: model_pb2.Model) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "octavo",
            "root": model.name,
            "max_model_len": model.max_context_tokens,
            **({"parent": model.name} if self._models.is_adapter(name) else {}),
        }


def _read_tokenize(data: bytes, ignored: Ignored) -> tuple[tokenizer_pb2.TokenizeRequest, bool]:
    """Return what a body asks for, and whether with the text of each token."""
    params = Params(parse_object(data), fields=TOKENIZE, ignored=ignored)
    body = tokenizer_pb2.TokenizeRequest(model=params.text("model") or "")
    prompt = params.text("prompt")
    with_texts = bool(params.boolean("return_token_strs"))
    if prompt is None:
        read_chat(params, body.chat)
        params.only("add_special_tokens", (False,), "only goes with prompt: a chat template has them already")
    else:
        body.texts.append(prompt)
        body.omit_special_tokens = params.boolean("add_special_tokens") is False
        params.refuse_rest("only goes with messages")
    params.finish()
    return body, with_texts


def _read_detokenize(data: bytes, ignored: Ignored) -> tokenizer_pb2.DetokenizeRequest:
    params = Params(parse_object(data), fields=DETOKENIZE, ignored=ignored)
    body = tokenizer_pb2.DetokenizeRequest(model=params.text("model") or "", keep_special_tokens=True)
    body.sequences.add(ids=params.token_ids("tokens") or ())
    params.finish()
    return body


def _json(body: Any) -> Response:
    return Response(json.dumps(body), media_type="application/json")
