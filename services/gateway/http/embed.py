"""POST /v1/embeddings, /v1/rerank, /score and /classify: the same calls as the EmbeddingService's."""

from __future__ import annotations

import base64
import time
from array import array
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import Response

from octavo.inference.v1 import embedding_pb2
from octavo.services.common.errors import ServingError
from octavo.services.gateway.authentication import caller
from octavo.services.gateway.http.endpoint import HttpRequest, parse_object
from octavo.services.gateway.http.errors import in_openai_words
from octavo.services.gateway.http.fields import CLASSIFY, EMBEDDINGS, RERANK, SCORE
from octavo.services.gateway.http.params import Ignored, Params, are_token_ids
from octavo.services.gateway.offload.long_json import to_json_in_pieces
from octavo.services.gateway.requests.accounting import Call
from octavo.services.gateway.requests.vector_calls import VectorCalls
from octavo.services.gateway.tokenization.tokenizer import INLINE_CHARS

_NAMES = {"inputs": "input", "token_ids.ids": "token ids"}

_Asked = TypeVar(
    "_Asked",
    embedding_pb2.EmbedRequest,
    embedding_pb2.RerankRequest,
    embedding_pb2.ScoreRequest,
    embedding_pb2.ClassifyRequest,
)
_Form = TypeVar("_Form")
_Answer = TypeVar("_Answer")


class EmbedEndpoints:
    """The endpoints that produce vectors, scores or labels."""

    def __init__(self, calls: VectorCalls) -> None:
        self._calls = calls

    async def embeddings(self, request: HttpRequest) -> Response:
        """Embed texts, in OpenAI's shape."""
        _, is_base64, answer, _ = await self._ask(request, _read_embed, self._calls.embed, _NAMES)
        num_bytes = sum(len(embedding.values) for embedding in answer.embeddings)
        return await self._write(lambda: _write_embed(answer, is_base64), num_bytes > INLINE_CHARS)

    async def rerank(self, request: HttpRequest) -> Response:
        """Rank documents, in the shape of Cohere's and Jina's services."""
        asked, with_documents, answer, is_long = await self._ask(request, _read_rerank, self._calls.rerank, {})
        results = []
        for each in answer.results:
            result: dict[str, Any] = {"index": each.index, "relevance_score": each.relevance_score}
            if with_documents:
                result["document"] = {"text": asked.documents[each.index]}
            results.append(result)
        usage = _usage(answer.usage.prompt_tokens)
        body = {"id": request.request_id, "model": answer.model, "results": results, "usage": usage}
        return await self._write(lambda: to_json_in_pieces(body), is_long)

    async def score(self, request: HttpRequest) -> Response:
        """Score pairs of texts, in vLLM's shape."""
        _, _, answer, is_long = await self._ask(request, _read_score, self._calls.score, {})
        rows = [{"index": index, "object": "score", "score": value} for index, value in enumerate(answer.scores)]
        body = _list_of(request, answer.model, rows, answer.usage.prompt_tokens)
        return await self._write(lambda: to_json_in_pieces(body), is_long)

    async def classify(self, request: HttpRequest) -> Response:
        """Label texts, in vLLM's shape."""
        _, _, answer, _ = await self._ask(request, _read_classify, self._calls.classify, _NAMES)

        def write() -> str:
            rows = []
            for index, each in enumerate(answer.results):
                row = {"index": index, "label": each.label, "probs": list(each.probabilities)}
                rows.append({**row, "num_classes": len(each.probabilities)})
            return to_json_in_pieces(_list_of(request, answer.model, rows, answer.usage.prompt_tokens))

        is_long = len(answer.results) * len(answer.labels) > INLINE_CHARS
        return await self._write(write, is_long)

    async def _ask(
        self,
        request: HttpRequest,
        read: Callable[[Mapping[str, Any], Ignored], tuple[_Asked, _Form]],
        call: Callable[[_Asked, Call], Coroutine[Any, Any, _Answer]],
        names: Mapping[str, str],
    ) -> tuple[_Asked, _Form, _Answer, bool]:
        """Read a body and have it answered by a method of `VectorCalls`.

        Returns what it asks for, what it says of the answer's form, the answer, and whether the body is a long one.
        `names` are the parameters of a body that the fields of the gRPC request have other names for.
        """
        data = await request.body()
        is_long = len(data) > INLINE_CHARS
        try:
            asked, form = await self._calls.long_work.run(
                caller().tenant, lambda: read(parse_object(data), request.ignored), is_long
            )
            await self._calls.check(asked, caller().tenant)
            work = call(asked, Call(request.request_id, caller().tenant, request.headers, request.deadline()))
            return asked, form, await request.unless_gone(request.in_time(work)), is_long
        except ServingError as error:
            raise in_openai_words(error, names) from None

    async def _write(self, write: Callable[[], str], is_long: bool) -> Response:
        return Response(await self._calls.long_work.run(caller().tenant, write, is_long), media_type="application/json")


def _read_embed(body: Mapping[str, Any], ignored: Ignored) -> tuple[embedding_pb2.EmbedRequest, bool]:
    """Return what a body asks for, and whether as base64. Raises ServingError that names OpenAI's parameters."""
    params = Params(body, fields=EMBEDDINGS, ignored=ignored)
    request = embedding_pb2.EmbedRequest(model=params.text("model") or "")
    _read_inputs(params, request)
    dimensions = params.integer("dimensions")
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


def _read_inputs(params: Params, request: embedding_pb2.EmbedRequest | embedding_pb2.ClassifyRequest) -> None:
    """Read the texts that are to be embedded or labelled."""
    given = params.take("input")
    for each in given if isinstance(given, list) and not _are_token_ids(given) else [given]:
        if isinstance(each, str):
            request.inputs.add(text=each)
        elif isinstance(each, list) and are_token_ids(each):
            request.inputs.add().token_ids.ids.extend(each)
        else:
            raise params.wrong("input", "must be a text, a list of texts, or one or several lists of token ids")


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


def _read_rerank(body: Mapping[str, Any], ignored: Ignored) -> tuple[embedding_pb2.RerankRequest, bool]:
    """Return what a body asks for, and whether the documents are wanted back."""
    params = Params(body, fields=RERANK, ignored=ignored)
    request = embedding_pb2.RerankRequest(model=params.text("model") or "", query=params.text("query") or "")
    for index, each in enumerate(params.array("documents") or ()):
        text = each.get("text") if isinstance(each, dict) else each
        if not isinstance(text, str):
            raise params.wrong(f"documents[{index}]", "must be a text, or an object with a text")
        request.documents.append(text)
    top_n = params.integer("top_n")
    if top_n is not None:
        request.top_n = top_n
    with_documents = bool(params.boolean("return_documents"))
    _read_common(params, request)
    return request, with_documents


def _read_score(body: Mapping[str, Any], ignored: Ignored) -> tuple[embedding_pb2.ScoreRequest, None]:
    """Return what a body asks for."""
    params = Params(body, fields=SCORE, ignored=ignored)
    request = embedding_pb2.ScoreRequest(model=params.text("model") or "")
    for field, names in (("queries", ("queries", "text_1")), ("documents", ("documents", "text_2"))):
        given = {name: value for name in names if (value := _texts(params, name)) is not None}
        if len(given) > 1:
            raise params.wrong(names[0], f"is another name of {names[1]}; give one of them")
        getattr(request, field).extend(next(iter(given.values()), ()))
    _read_common(params, request)
    return request, None


def _read_classify(body: Mapping[str, Any], ignored: Ignored) -> tuple[embedding_pb2.ClassifyRequest, None]:
    """Return what a body asks for."""
    params = Params(body, fields=CLASSIFY, ignored=ignored)
    request = embedding_pb2.ClassifyRequest(model=params.text("model") or "")
    _read_inputs(params, request)
    second = _texts(params, "text_pair")
    if second is not None and len(second) != len(request.inputs):
        raise params.wrong("text_pair", f"must be as many texts as input, {len(request.inputs)}")
    for each, text in zip(request.inputs, second or (), strict=False):
        each.text_pair = text
    _read_common(params, request)
    return request, None


def _texts(params: Params, name: str) -> list[str] | None:
    """Return a field that is a text or a list of texts, as a list."""
    value = params.take(name)
    texts = [value] if isinstance(value, str) else value
    if texts is not None and not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        raise params.wrong(name, "must be a text or a list of texts")
    return texts


def _list_of(request: HttpRequest, model: str, rows: list[dict[str, Any]], num_tokens: int) -> dict[str, Any]:
    """Return the answer that scores and labels have around them."""
    head = {"id": request.request_id, "object": "list", "created": int(time.time()), "model": model}
    return {**head, "data": rows, "usage": _usage(num_tokens)}


def _read_common(
    params: Params,
    request: embedding_pb2.EmbedRequest
    | embedding_pb2.RerankRequest
    | embedding_pb2.ScoreRequest
    | embedding_pb2.ClassifyRequest,
) -> None:
    """Fill in what all endpoints share, and refuse what nobody has read."""
    truncate = params.boolean("truncate")
    if truncate is not None:
        request.truncate = truncate
    # vLLM serves small numbers first, this gateway large ones.
    request.priority = -(params.integer("priority") or 0)
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
