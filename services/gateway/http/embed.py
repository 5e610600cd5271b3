"""POST /v1/embeddings and /v1/rerank: the same calls as the EmbeddingService's."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from octavo.inference.v1 import embedding_pb2
from octavo.services.common.errors import ServingError
from octavo.services.gateway.authentication import caller
from octavo.services.gateway.http.bodies import parse_object
from octavo.services.gateway.http.endpoint import HttpRequest
from octavo.services.gateway.http.errors import in_openai_words
from octavo.services.gateway.http.fields import EMBEDDINGS, RERANK
from octavo.services.gateway.http.params import Params, are_token_ids
from octavo.services.gateway.long_json import to_json_in_pieces
from octavo.services.gateway.tokenizer import INLINE_CHARS
from octavo.services.gateway.vector_calls import VectorCalls

_NAMES = {"inputs": "input", "token_ids.ids": "token ids"}


class EmbedEndpoints:
    """The endpoints that produce vectors, or scores."""

    def __init__(self, calls: VectorCalls) -> None:
        self._calls = calls

    async def embeddings(self, request: HttpRequest) -> Response:
        """Embed texts, in OpenAI's shape."""
        data = await request.body()
        run, is_long = self._calls.long_work.run, len(data) > INLINE_CHARS
        try:
            call, is_base64 = await run(caller().tenant, lambda: _read_embed(parse_object(data)), is_long)
            await self._calls.check(call, caller().tenant)
            work = self._calls.embed(call, request.request_id, caller().tenant, request.headers, request.deadline())
            answer = await request.unless_gone(request.in_time(work))
        except ServingError as error:
            raise in_openai_words(error, _NAMES) from None
        num_bytes = sum(len(embedding.values) for embedding in answer.embeddings)
        content = await run(caller().tenant, lambda: _write_embed(answer, is_base64), num_bytes > INLINE_CHARS)
        return Response(content, media_type="application/json")

    async def rerank(self, request: HttpRequest) -> Response:
        """Rank documents, in the shape of Cohere's and Jina's services."""
        data = await request.body()
        run, is_long = self._calls.long_work.run, len(data) > INLINE_CHARS
        try:
            call, with_documents = await run(caller().tenant, lambda: _read_rerank(parse_object(data)), is_long)
            await self._calls.check(call, caller().tenant)
            work = self._calls.rerank(call, request.request_id, caller().tenant, request.headers, request.deadline())
            answer = await request.unless_gone(request.in_time(work))
        except ServingError as error:
            raise in_openai_words(error, {}) from None
        results = []
        for each in answer.results:
            result: dict[str, Any] = {"index": each.index, "relevance_score": each.relevance_score}
            if with_documents:
                result["document"] = {"text": call.documents[each.index]}
            results.append(result)
        usage = _usage(answer.usage.prompt_tokens)
        body = {"id": request.request_id, "model": answer.model, "results": results, "usage": usage}
        content = await run(caller().tenant, lambda: to_json_in_pieces(body), is_long)
        return Response(content, media_type="application/json")


def _read_embed(body: Mapping[str, Any]) -> tuple[embedding_pb2.EmbedRequest, bool]:
    """Return what a body asks for, and whether as base64. Raises ServingError that names OpenAI's parameters."""
    params = Params(body, fields=EMBEDDINGS)
    request = embedding_pb2.EmbedRequest(model=params.text("model") or "")
    given = params.take("input")
    for each in given if isinstance(given, list) and not _are_token_ids(given) else [given]:
        if isinstance(each, str):
            request.inputs.add(text=each)
        elif isinstance(each, list) and are_token_ids(each):
            request.inputs.add().token_ids.ids.extend(each)
        else:
            raise params.wrong("input", "must be a text, a list of texts, or one or several lists of token ids")
    dimensions = params.integer("dimensions", low=1)
    if dimensions is not None:
        request.dimensions = dimensions
    encoding = params.text("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise params.wrong("encoding_format", "must be float or base64")
    prompt_name = params.text("prompt_name")
    if prompt_name is not None:
        request.prompt_name = prompt_name
    normalize = params.boolean("normalize")
    if normalize is not None:
        request.normalize = normalize
    _read_common(params, request)
    return request, encoding == "base64"


def _write_embed(answer: embedding_pb2.EmbedResponse, is_base64: bool) -> str:
    encode = _base64 if is_base64 else _floats
    return to_json_in_pieces(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": encode(embedding.values)}
                for index, embedding in enumerate(answer.embeddings)
            ],
            "model": answer.model,
            "usage": _usage(answer.usage.prompt_tokens),
        }
    )


def _read_rerank(body: Mapping[str, Any]) -> tuple[embedding_pb2.RerankRequest, bool]:
    """Return what a body asks for, and whether the documents are wanted back."""
    params = Params(body, fields=RERANK)
    request = embedding_pb2.RerankRequest(model=params.text("model") or "", query=params.text("query") or "")
    for index, each in enumerate(params.array("documents") or ()):
        text = each.get("text") if isinstance(each, dict) else each
        if not isinstance(text, str):
            raise params.wrong(f"documents[{index}]", "must be a text, or an object with a text")
        request.documents.append(text)
    top_n = params.integer("top_n", low=1)
    if top_n is not None:
        request.top_n = top_n
    with_documents = bool(params.boolean("return_documents"))
    _read_common(params, request)
    return request, with_documents


def _read_common(params: Params, request: embedding_pb2.EmbedRequest | embedding_pb2.RerankRequest) -> None:
    """Fill in what both endpoints share, and refuse what nobody has read."""
    truncate = params.boolean("truncate")
    if truncate is not None:
        request.truncate = truncate
    # vLLM serves small numbers first, this gateway large ones.
    request.priority = -(params.integer("priority", -(2**31) + 1, 2**31 - 1) or 0)
    params.finish()


def _are_token_ids(values: list[Any]) -> bool:
    """Return whether a list is one input, of token ids, and not several."""
    return bool(values) and type(values[0]) is int


def _floats(values: bytes) -> list[float]:
    return array("f", values).tolist()


def _base64(values: bytes) -> str:
    return base64.b64encode(values).decode()


def _usage(num_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
