"""The TokenizerService: text to tokens and back, and the tokenizer itself."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator

from grpc import aio

from octavo.inference.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from octavo.services.common.errors import FieldViolation, feature_disabled, invalid_field, invalid_fields
from octavo.services.gateway.chat import read_chat
from octavo.services.gateway.model import Models
from octavo.services.gateway.validation import RequestValidator

_CHUNK_BYTES = 262_144

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
        model = self._models.get(request.model)
        if not request.texts and not request.HasField("chat"):
            raise invalid_field("texts", "texts or chat must be set")
        encoded = await model.tokenizer.encode_all(request.texts, not request.omit_special_tokens)
        if request.HasField("chat"):
            template = model.tokenizer.chat_template
            if template is None:
                raise feature_disabled("chat", f"the model {model.name!r} has no chat template; send texts")
            # The template has all special tokens in it already.
            text = await model.tokenizer.render_chat(read_chat(request.chat, template, "chat"))
            encoded += await model.tokenizer.encode_all([text], False)
        response = tokenizer_pb2.TokenizeResponse()
        for token_ids, offsets in encoded:
            response.tokenizations.add(token_ids=token_ids, byte_offsets=offsets if request.byte_offsets else ())
        return response

    async def Detokenize(  # noqa: N802 - named by the proto
        self, request: tokenizer_pb2.DetokenizeRequest, context: DetokenizeContext
    ) -> tokenizer_pb2.DetokenizeResponse:
        """Decode sequences."""
        del context
        self._validator.check(request)
        tokenizer = self._models.get(request.model).tokenizer
        wrong = [
            FieldViolation(
                f"sequences[{index}].ids", f"has ids that are not in the vocabulary ({tokenizer.vocab_size})"
            )
            for index, sequence in enumerate(request.sequences)
            if sequence.ids and max(sequence.ids) >= tokenizer.vocab_size
        ]
        if wrong:
            raise invalid_fields(wrong[:16])
        skip = not request.keep_special_tokens
        texts = await tokenizer.decode_all([sequence.ids for sequence in request.sequences], skip)
        return tokenizer_pb2.DetokenizeResponse(texts=texts)

    async def GetTokenizer(  # noqa: N802 - named by the proto
        self, request: tokenizer_pb2.GetTokenizerRequest, context: DownloadContext
    ) -> AsyncIterator[tokenizer_pb2.GetTokenizerResponse]:
        """Stream the files in chunks; the hash is on the last chunk of each."""
        del context
        self._validator.check(request)
        for name, content in self._models.get(request.model).tokenizer.files.items():
            last = max(0, (len(content) - 1) // _CHUNK_BYTES * _CHUNK_BYTES)
            for start in range(0, last + 1, _CHUNK_BYTES):
                yield tokenizer_pb2.GetTokenizerResponse(
                    file_name=name,
                    chunk=content[start : start + _CHUNK_BYTES],
                    sha256=hashlib.sha256(content).hexdigest() if start == last else "",
                )
