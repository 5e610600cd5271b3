"""The TokenizerService: text to tokens and back, and the tokenizer itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from grpc import aio

from octavo.inference.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from octavo.services.common.errors import FieldViolation, invalid_field, invalid_fields
from octavo.services.gateway.authentication import caller
from octavo.services.gateway.requests.model import Models, ServedModel
from octavo.services.gateway.requests.prepare import chat_text
from octavo.services.gateway.tokenization.tokenizer import INLINE_CHARS, INLINE_TOKENS, ModelTokenizer
from octavo.services.gateway.validation import RequestValidator

_CHUNK_BYTES = 262_144
MAX_TEXT_BYTES = 2 << 20
"""Of all texts of a call together. The proto says so, and how long one may be."""
MAX_BYTES_WITH_OFFSETS = 1 << 18
"""Of one text whose offsets are wanted, which the library keeps for each token. In the proto, too."""
MAX_TOKENS = 1 << 19
"""Of all sequences of a call together. The proto says so, too."""

TokenizeContext = aio.ServicerContext[tokenizer_pb2.TokenizeRequest, tokenizer_pb2.TokenizeResponse]
DetokenizeContext = aio.ServicerContext[tokenizer_pb2.DetokenizeRequest, tokenizer_pb2.DetokenizeResponse]
DownloadContext = aio.ServicerContext[tokenizer_pb2.GetTokenizerRequest, tokenizer_pb2.GetTokenizerResponse]


class TokenizerServicer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """Needs no scheduler."""

    def __init__(self, models: Models, validator: RequestValidator) -> None:
        self._models = models
        self._validator = validator

    async def Tokenize(  # noqa: N802 - named by the proto
        self, request: tokenizer_pb2.TokenizeRequest, context: TokenizeContext
    ) -> tokenizer_pb2.TokenizeResponse:
        """Encode texts, then the chat, if there is one."""
        del context
        self._validator.check(request)
        model = self._models.of(request.model)
        if not request.texts and not request.HasField("chat"):
            raise invalid_field("texts", "texts or chat must be set")
        tenant = caller().tenant
        texts = [(text, not request.omit_special_tokens) for text in request.texts]
        if request.HasField("chat"):
            # The template has all special tokens in it already.
            texts.append((await chat_text(request.chat, model, "chat", tenant), False))
        is_long = sum(len(text) for text, _ in texts) > INLINE_CHARS
        return await model.tokenizer.long_work.run(tenant, lambda: _tokenized(request, texts, model), is_long)

    async def Detokenize(  # noqa: N802 - named by the proto
        self, request: tokenizer_pb2.DetokenizeRequest, context: DetokenizeContext
    ) -> tokenizer_pb2.DetokenizeResponse:
        """Decode sequences."""
        del context
        self._validator.check(request)
        tokenizer = self._models.of(request.model).tokenizer
        num_tokens = sum(len(sequence.ids) for sequence in request.sequences)
        if num_tokens > MAX_TOKENS:
            raise invalid_field("sequences", f"have {num_tokens} tokens together; send at most {MAX_TOKENS} in a call")
        is_long = num_tokens > INLINE_TOKENS
        return await tokenizer.long_work.run(caller().tenant, lambda: _detokenized(request, tokenizer), is_long)

    async def GetTokenizer(  # noqa: N802 - named by the proto
        self, request: tokenizer_pb2.GetTokenizerRequest, context: DownloadContext
    ) -> AsyncIterator[tokenizer_pb2.GetTokenizerResponse]:
        """Stream the files in chunks; the hash is on the last chunk of each."""
        del context
        self._validator.check(request)
        tokenizer = self._models.of(request.model).tokenizer
        for name, content in tokenizer.files.items():
            last = max(0, (len(content) - 1) // _CHUNK_BYTES * _CHUNK_BYTES)
            for start in range(0, last + 1, _CHUNK_BYTES):
                yield tokenizer_pb2.GetTokenizerResponse(
                    file_name=name,
                    chunk=content[start : start + _CHUNK_BYTES],
                    sha256=tokenizer.file_hashes[name] if start == last else "",
                )


def _tokenized(
    request: tokenizer_pb2.TokenizeRequest, texts: Sequence[tuple[str, bool]], model: ServedModel
) -> tokenizer_pb2.TokenizeResponse:
    """Return the answer of Tokenize for texts, each with whether special tokens are added. Raises INVALID_FIELD."""
    sizes = [len(text.encode()) for text, _ in texts]
    field = "chat" if request.HasField("chat") else "texts"
    if sum(sizes) > MAX_TEXT_BYTES:
        raise invalid_field(field, f"{sum(sizes)} bytes of text in all; send at most {MAX_TEXT_BYTES} in a call")
    if request.byte_offsets and max(sizes) > MAX_BYTES_WITH_OFFSETS:
        advice = f"send at most {MAX_BYTES_WITH_OFFSETS}, or leave byte_offsets unset"
        raise invalid_field(field, f"a text of {max(sizes)} bytes is too long for offsets; {advice}")
    response = tokenizer_pb2.TokenizeResponse()
    for text, add_special_tokens in texts:
        if request.byte_offsets:
            token_ids, offsets = model.tokenizer.encode_with_offsets(text, add_special_tokens)
            response.tokenizations.add(token_ids=token_ids, byte_offsets=offsets)
        else:
            response.tokenizations.add(token_ids=model.tokenizer.encode_anew(text, add_special_tokens))
    return response


def _detokenized(
    request: tokenizer_pb2.DetokenizeRequest, tokenizer: ModelTokenizer
) -> tokenizer_pb2.DetokenizeResponse:
    """Return the answer of Detokenize. Raises INVALID_FIELD."""
    wrong = [
        FieldViolation(f"sequences[{index}].ids", f"has ids that are not in the vocabulary ({tokenizer.vocab_size})")
        for index, sequence in enumerate(request.sequences)
        if sequence.ids and max(sequence.ids) >= tokenizer.vocab_size
    ]
    if wrong:
        raise invalid_fields(wrong[:16])
    skip = not request.keep_special_tokens
    return tokenizer_pb2.DetokenizeResponse(
        texts=[tokenizer.decode(sequence.ids, skip) for sequence in request.sequences]
    )
