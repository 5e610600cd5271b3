"""Calls for vectors, scores and labels, whichever listener they came in by."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from google.protobuf.message import Message

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import embedding_pb2
from octavo.services.common.errors import (
    MAX_VIOLATIONS,
    FieldViolation,
    Reason,
    ServingError,
    feature_disabled,
    invalid_field,
)
from octavo.services.gateway.offload.long_work import LongWork
from octavo.services.gateway.requests.accounting import Call, CallRecord
from octavo.services.gateway.requests.calls import GenerateCalls
from octavo.services.gateway.requests.model import Models, ServedModel
from octavo.services.gateway.requests.vectors import VectorCall, make_vectors
from octavo.services.gateway.schedulers.pool import SchedulerPool
from octavo.services.gateway.tokenization.input_encoder import EncodedInput
from octavo.services.gateway.tokenization.tokenizer import INLINE_CHARS
from octavo.services.gateway.tokenization.vector_files import VectorFiles

_EMBED, _SCORE = common_pb2.MODEL_TASK_EMBED, common_pb2.MODEL_TASK_SCORE
_CLASSIFY = common_pb2.MODEL_TASK_CLASSIFY
_TASKS: Mapping[int, str] = {_EMBED: "is for embeddings", _SCORE: "scores pairs of texts", _CLASSIFY: "labels texts"}
_NEEDED: Mapping[int, str] = {
    _EMBED: "for embeddings",
    _SCORE: "that scores pairs (a cross-encoder)",
    _CLASSIFY: "with labels",
}
_INLINE_INPUTS = 16
# What sentence-transformers puts before queries and documents, where a model has prompts of these names.
_QUERY_PROMPTS, _DOCUMENT_PROMPTS = ("query",), ("document", "passage", "corpus")


_Request = (
    embedding_pb2.EmbedRequest
    | embedding_pb2.RerankRequest
    | embedding_pb2.ScoreRequest
    | embedding_pb2.ClassifyRequest
)


@dataclass(frozen=True, slots=True)
class _Scores:
    """The scores of a call's pairs, in their order, and what is told beside them."""

    values: list[float]
    usage: common_pb2.Usage
    model: str
    model_version: str


class VectorCalls:
    """All calls for vectors; they count as calls of this gateway."""

    def __init__(self, calls: GenerateCalls, models: Models, schedulers: SchedulerPool) -> None:
        self._calls = calls
        self._models = models
        self._schedulers = schedulers

    @property
    def long_work(self) -> LongWork:
        """The threads for long requests."""
        return self._calls.long_work

    async def check(self, request: Message, tenant: str) -> None:
        """Check a request against the rules of its fields. Raises INVALID_FIELD."""
        await self._calls.check(request, tenant)

    async def embed(self, request: embedding_pb2.EmbedRequest, call: Call) -> embedding_pb2.EmbedResponse:
        """Answer a request that obeys the rules of its fields. Raises ServingError."""
        with self._calls.for_vectors(call, request.model) as record:
            model = self._models.get(record.model)
            files = _files(model, "embed", (_EMBED,))
            self._schedulers.check_in_time(record.tenant, request.priority, record.deadline)
            dimensions = request.dimensions if request.HasField("dimensions") else 0
            _check_dimensions(dimensions, files, self._schedulers.vector_size)
            prompt = _prompt(request, files)
            inputs = await self._read(request, model, files, prompt, record.tenant)
            normalize = request.normalize if request.HasField("normalize") else None
            vector_call = _call(request, record, dimensions=dimensions, normalize=normalize)
            vectors, version, usage = await self._vectors(record, vector_call, inputs)
            return embedding_pb2.EmbedResponse(
                embeddings=[
                    embedding_pb2.Embedding(
                        values=vector, input_tokens=len(each.token_ids), truncated=each.is_truncated
                    )
                    for vector, each in zip(vectors, inputs, strict=True)
                ],
                usage=usage,
                model=model.name,
                model_version=model.version(version),
            )

    async def rerank(self, request: embedding_pb2.RerankRequest, call: Call) -> embedding_pb2.RerankResponse:
        """Answer a request that obeys the rules of its fields; see `embed`."""
        with self._calls.for_vectors(call, request.model) as record:
            scores = await self._score(request, record, "rerank", [request.query])
            ranked = sorted(enumerate(scores.values), key=lambda pair: -pair[1])
            results = [
                embedding_pb2.RankedDocument(index=index, relevance_score=value)
                for index, value in ranked[: request.top_n or None]
            ]
            return embedding_pb2.RerankResponse(
                results=results, usage=scores.usage, model=scores.model, model_version=scores.model_version
            )

    async def score(self, request: embedding_pb2.ScoreRequest, call: Call) -> embedding_pb2.ScoreResponse:
        """Answer a request that obeys the rules of its fields; see `embed`."""
        with self._calls.for_vectors(call, request.model) as record:
            if len(request.queries) not in (1, len(request.documents)):
                advice = f"must be one, or as many as documents, of which there are {len(request.documents)}"
                raise invalid_field("queries", advice)
            scores = await self._score(request, record, "score", request.queries)
            return embedding_pb2.ScoreResponse(
                scores=scores.values, usage=scores.usage, model=scores.model, model_version=scores.model_version
            )

    async def classify(self, request: embedding_pb2.ClassifyRequest, call: Call) -> embedding_pb2.ClassifyResponse:
        """Answer a request that obeys the rules of its fields; see `embed`."""
        with self._calls.for_vectors(call, request.model) as record:
            model = self._models.get(record.model)
            files = _files(model, "classify", (_SCORE, _CLASSIFY))
            self._schedulers.check_in_time(record.tenant, request.priority, record.deadline)
            inputs = await self._read(request, model, files, "", record.tenant)
            vectors, version, usage = await self._vectors(record, _call(request, record), inputs)
            results = []
            for vector, each in zip(vectors, inputs, strict=True):
                probabilities = array("f", vector)
                if len(probabilities) != len(files.labels):
                    raise _other_labels(model, len(files.labels), len(probabilities))
                results.append(
                    embedding_pb2.Classification(
                        label=files.labels[probabilities.index(max(probabilities))],
                        probabilities=probabilities,
                        input_tokens=len(each.token_ids),
                        truncated=each.is_truncated,
                    )
                )
            return embedding_pb2.ClassifyResponse(
                results=results,
                labels=files.labels,
                usage=usage,
                model=model.name,
                model_version=model.version(version),
            )

    async def _score(
        self,
        request: embedding_pb2.RerankRequest | embedding_pb2.ScoreRequest,
        record: CallRecord,
        feature: str,
        queries: Sequence[str],
    ) -> _Scores:
        """Return how well each document answers its query; of `queries`, one is for all."""
        model = self._models.get(record.model)
        files = _files(model, feature, (_EMBED, _SCORE))
        self._schedulers.check_in_time(record.tenant, request.priority, record.deadline)
        is_pair, documents = files.task == _SCORE, request.documents
        texts: list[str | tuple[str, str]]
        if is_pair:
            texts = list(zip(queries if len(queries) > 1 else [queries[0]] * len(documents), documents, strict=True))
        else:
            query, document = (_named(files, names) for names in (_QUERY_PROMPTS, _DOCUMENT_PROMPTS))
            texts = [*(query + text for text in queries), *(document + text for text in documents)]
        limit = self._limit(model, files)
        size = sum(map(len, queries)) * (len(texts) if len(queries) == 1 else 1) + sum(map(len, documents))
        is_long = size > INLINE_CHARS or not model.tokenizer.knows_limit(limit)
        inputs = await self.long_work.run(record.tenant, lambda: model.tokenizer.encode_inputs(texts, limit), is_long)
        first = 0 if is_pair else len(queries)

        def name(at: int) -> str:
            if at >= first:
                return f"documents[{at - first}]"
            return "query" if feature == "rerank" else f"queries[{at}]"

        if request.HasField("truncate") and not request.truncate:
            _refuse_truncated(inputs, limit, name)
        vector_call = _call(request, record, normalize=None if is_pair else True)
        vectors, version, usage = await self._vectors(record, vector_call, inputs)
        scores = [array("f", vector) for vector in vectors]
        values = [score[0] for score in scores]
        if not is_pair:
            is_long = sum(map(len, scores)) > INLINE_CHARS
            values = await self.long_work.run(record.tenant, partial(_cosines, scores[:first], scores[first:]), is_long)
        return _Scores(values, usage, model.name, model.version(version))

    async def _vectors(
        self, record: CallRecord, call: VectorCall, inputs: Sequence[EncodedInput]
    ) -> tuple[list[bytes], str, common_pb2.Usage]:
        """Return a vector for each input, the version of the weights, and what it used, which is recorded."""
        vectors, version = await make_vectors(self._schedulers, call, inputs)
        record.prompt_tokens = sum(len(each.token_ids) for each in inputs)
        return vectors, version, common_pb2.Usage(prompt_tokens=record.prompt_tokens)

    async def _read(
        self,
        request: embedding_pb2.EmbedRequest | embedding_pb2.ClassifyRequest,
        model: ServedModel,
        files: VectorFiles,
        prompt: str,
        tenant: str,
    ) -> list[EncodedInput]:
        """Return the inputs as tokens. Raises INVALID_FIELD or CONTEXT_LENGTH_EXCEEDED."""
        limit = self._limit(model, files)
        is_few = len(request.inputs) <= _INLINE_INPUTS and model.tokenizer.knows_limit(limit)
        size = sum(len(each.text) + len(each.token_ids.ids) + len(_second(each)) for each in request.inputs)
        is_long = not is_few or size > INLINE_CHARS
        return await self.long_work.run(tenant, lambda: _read_inputs(request, model, prompt, limit), is_long)

    def _limit(self, model: ServedModel, files: VectorFiles) -> int:
        """Return the most tokens of an input that are read."""
        limit = model.context_limit(self._schedulers.max_model_len)
        return min(limit, files.max_input_tokens) if files.max_input_tokens else limit


def _read_inputs(
    request: embedding_pb2.EmbedRequest | embedding_pb2.ClassifyRequest, model: ServedModel, prompt: str, limit: int
) -> list[EncodedInput]:
    """See VectorCalls._read."""
    given: list[embedding_pb2.EmbedInput | embedding_pb2.ClassifyInput] = [*request.inputs]
    texts = [_text(each, prompt) for each in given if each.HasField("text")]
    encoded = iter(model.tokenizer.encode_inputs(texts, limit) if texts else ())
    inputs = [next(encoded) if each.HasField("text") else _given(each.token_ids.ids, limit) for each in given]
    vocab_size = model.tokenizer.vocab_size
    for index, each in enumerate(given):
        ids = each.token_ids.ids
        if not each.HasField("text") and (not ids or max(ids) >= vocab_size):
            advice = f"must be at least one id, each below {vocab_size}, the size of the vocabulary"
            raise invalid_field(f"inputs[{index}].token_ids.ids", advice)
        if not each.HasField("text") and _second(each):
            raise invalid_field(f"inputs[{index}].text_pair", "is the second text of a pair; give the first as text")
    if request.HasField("truncate") and not request.truncate:
        _refuse_truncated(inputs, limit, lambda at: f"inputs[{at}]")
    return inputs


def _text(given: embedding_pb2.EmbedInput | embedding_pb2.ClassifyInput, prompt: str) -> str | tuple[str, str]:
    """Return an input that is given as text, or the pair that it is one of."""
    return (given.text, second) if (second := _second(given)) else prompt + given.text


def _second(given: embedding_pb2.EmbedInput | embedding_pb2.ClassifyInput) -> str:
    """Return the second text of a pair; empty if there is none."""
    return given.text_pair if isinstance(given, embedding_pb2.ClassifyInput) else ""


def _call(request: _Request, record: CallRecord, *, dimensions: int = 0, normalize: bool | None = None) -> VectorCall:
    """Return what the pieces of a call have in common."""
    return VectorCall(
        request_id=record.request_id,
        tenant=record.tenant,
        priority=request.priority,
        deadline=record.deadline,
        traceparent=record.traceparent,
        dimensions=dimensions,
        normalize=normalize,
    )


def _other_labels(model: ServedModel, known: int, found: int) -> ServingError:
    """Return the error of a gateway whose files of a model are not those of its workers."""
    message = f"the workers' model tells {found} labels apart, the files here of {model.name!r} {known}; use the same"
    return feature_disabled("classify", message)


def _files(model: ServedModel, feature: str, tasks: Sequence[int]) -> VectorFiles:
    """Return what a model for vectors says of itself. Raises FEATURE_DISABLED if it is for something else."""
    files = model.tokenizer.vector_files
    if files is None or files.task not in tasks:
        what = "generates text" if files is None else _TASKS[files.task]
        needed = " or ".join(_NEEDED[task] for task in tasks)
        raise feature_disabled(feature, f"the model {model.name!r} {what}; {feature!r} needs a model {needed}")
    return files


def _check_dimensions(dimensions: int, files: VectorFiles, vector_size: int) -> None:
    """Raise INVALID_FIELD for a size that vectors cannot be cut to; `vector_size` 0 is not known."""
    if dimensions and vector_size and dimensions > vector_size:
        raise invalid_field("dimensions", f"must be at most {vector_size}, the size of the model's vectors")
    if dimensions and files.dimensions and dimensions not in files.dimensions:
        sizes = ", ".join(map(str, files.dimensions))
        raise invalid_field("dimensions", f"must be one of those that the model was trained for: {sizes}")


def _prompt(request: embedding_pb2.EmbedRequest, files: VectorFiles) -> str:
    """Return what goes before each text. Raises INVALID_FIELD."""
    name = request.prompt_name if request.HasField("prompt_name") else files.default_prompt_name
    if not name:
        return ""
    if name not in files.prompts:
        known = ", ".join(sorted(files.prompts)) or "none"
        raise invalid_field("prompt_name", f"is no prompt of the model; it has: {known}")
    return files.prompts[name]


def _named(files: VectorFiles, names: Sequence[str]) -> str:
    """Return the first prompt of these names, or the default one, or nothing."""
    return files.prompts.get(next((name for name in names if name in files.prompts), files.default_prompt_name), "")


def _given(token_ids: Sequence[int], limit: int) -> EncodedInput:
    return EncodedInput(token_ids[:limit], is_truncated=len(token_ids) > limit)


def _refuse_truncated(inputs: Sequence[EncodedInput], limit: int, name: Callable[[int], str]) -> None:
    """Raise CONTEXT_LENGTH_EXCEEDED if an input was cut; `name` tells its field by its place."""
    cut = [name(index) for index, each in enumerate(inputs) if each.is_truncated]
    if cut:
        message = f"longer than the {limit} tokens that the model reads; shorten it, or let it be cut (truncate)"
        violations = [FieldViolation(field, message) for field in cut[:MAX_VIOLATIONS]]
        text = f"{cut[0]} is {message}"
        raise ServingError(Reason.CONTEXT_LENGTH_EXCEEDED, text, metadata={"limit": str(limit)}, violations=violations)


def _cosines(queries: Sequence[array[float]], documents: Sequence[array[float]]) -> list[float]:
    """Return the products of vectors that are normalized already; one query is for all documents."""
    each = queries if len(queries) > 1 else [queries[0]] * len(documents)
    return [sum(map(float.__mul__, query, document)) for query, document in zip(each, documents, strict=True)]
