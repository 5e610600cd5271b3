"""A model's tokenizer, with the waits it needs: long work never runs on the event loop."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

from octavo.common.v1 import common_pb2
from octavo.services.common.errors import Reason, ServingError
from octavo.services.gateway.chat import ChatInput
from octavo.services.gateway.chat_template import ChatTemplate, TemplateError
from octavo.services.gateway.chunk_encoder import ChunkEncoder
from octavo.services.gateway.detokenizer import Detokenizer, DetokenizerFactory
from octavo.services.gateway.input_encoder import EncodedInput, InputEncoder
from octavo.services.gateway.model_files import ModelError, ModelFiles, read_model

_T = TypeVar("_T")
Encoded = tuple[list[int], list[int]]
"""Token ids, and byte offsets as many."""
_INLINE_CHARS = 8_192  # about a millisecond of encoding
_INLINE_TOKENS = 16_384
_MAX_WAIT_S = 60.0


class ModelTokenizer:
    """Text to tokens and back, for one model. Lives as long as the process; `close` ends its threads."""

    def __init__(self, files: ModelFiles, num_threads: int = 2) -> None:
        """Raises ModelError if the chat template does not compile."""
        self._tokenizer = files.tokenizer
        added = files.tokenizer.get_added_tokens_decoder()
        self._special = {token.content: index for index, token in added.items() if token.special}
        self._encoder = ChunkEncoder(files.tokenizer)
        self._detokenizers = DetokenizerFactory(files.tokenizer)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenizer")
        self.sha256 = hashlib.sha256(files.definition).hexdigest()
        self.tokens_sha256 = files.tokens_sha256
        self.files = files.files
        self.vocab_size = files.vocab_size
        self.max_model_len = files.max_model_len
        self.vector_files = files.vector_files
        self._inputs = InputEncoder(files.definition, files.vector_files is not None and files.vector_files.lower_case)
        self.end_of_sequence_ids = files.end_of_sequence_ids
        self.default_sampling = _sampling_defaults(files.default_sampling)
        self.chat_template: ChatTemplate | None = None
        if files.chat_template:
            try:
                self.chat_template = ChatTemplate(files.chat_template, files.special_tokens)
            except TemplateError as error:
                raise ModelError(str(error)) from None

    @classmethod
    def load(cls, path: Path, num_threads: int = 2) -> ModelTokenizer:
        """Return the tokenizer of a model's folder or .gguf file. Raises ModelError."""
        return cls(read_model(path), num_threads)

    def close(self) -> None:
        """End the threads; what runs in them is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def encode(self, text: str, scope: str) -> list[int]:
        """Return the token ids of a text. How long it takes tells nothing about texts of another `scope`."""
        if len(text) <= _INLINE_CHARS:
            return self._encoder.encode(text, True, scope)
        return await self._in_pool(lambda: self._encoder.encode(text, True, scope))

    async def encode_chat(self, chat: ChatInput, scope: str) -> list[int]:
        """Return the token ids of a conversation; the template has all special tokens in it already.

        scope  see `encode`
        Raises INVALID_FIELD if the template refuses the conversation.
        """
        template = self.chat_template
        assert template is not None, "the conversation was read with this template"
        return await self._in_pool(lambda: self._encoder.encode(chat.render(template), False, scope))

    async def render_chat(self, chat: ChatInput) -> str:
        """Return the text that `encode_chat` encodes."""
        template = self.chat_template
        assert template is not None, "the conversation was read with this template"
        return await self._in_pool(lambda: chat.render(template))

    async def encode_all(self, texts: Sequence[str], add_special_tokens: bool) -> list[Encoded]:
        """Return the tokens of each text, and where each token starts in the text's UTF-8."""

        def run() -> list[Encoded]:
            return [self._encode_with_offsets(text, add_special_tokens) for text in texts]

        return run() if sum(map(len, texts)) <= _INLINE_CHARS else await self._in_pool(run)

    async def encode_inputs(self, inputs: Sequence[str | tuple[str, str]], limit: int) -> list[EncodedInput]:
        """Return the tokens, at most `limit` of each, that vectors of texts or pairs of texts are made of."""
        size = sum(len(each) if isinstance(each, str) else len(each[0]) + len(each[1]) for each in inputs)
        if size <= _INLINE_CHARS and self._inputs.knows(limit):
            return self._inputs.encode(inputs, limit)
        return await self._in_pool(lambda: self._inputs.encode(inputs, limit))

    async def decode_all(self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        """Return the text of each sequence; ids that the tokenizer does not know have none."""

        def run() -> list[str]:
            decode = self._tokenizer.decode
            return [decode(list(token_ids), skip_special_tokens=skip_special_tokens) for token_ids in sequences]

        return run() if sum(map(len, sequences)) <= _INLINE_TOKENS else await self._in_pool(run)

    def new_detokenizer(self, prompt_token_ids: Sequence[int]) -> Detokenizer:
        """Return a detokenizer for an output after this prompt."""
        return self._detokenizers.new(prompt_token_ids)

    def special_tokens(self, texts: Iterable[str] | None = None) -> dict[int, str]:
        """Return, by id, those of `texts`, or all, that are special tokens, which detokenizers leave out."""
        texts = self._special if texts is None else texts
        return {self._special[text]: text for text in texts if text in self._special}

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return the text of a few tokens, that of special ones included."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the text of one token by itself, which may be part of a character; a special token's is its name."""
        return self._detokenizers.token_bytes(token_id)

    @property
    def has_token_bytes(self) -> bool:
        """Whether the bytes of an output are those of its tokens: else no grammar can be kept to."""
        return self._detokenizers.has_token_bytes

    def vocabulary(self) -> tuple[list[bytes], list[int]]:
        """Return the bytes of every token id, and which ids are no text. Takes a while."""
        tokens = [self.token_bytes(token_id) for token_id in range(self.vocab_size)]
        return tokens, [token_id for token_id in self._detokenizers.special_token_ids() if token_id < self.vocab_size]

    def _encode_with_offsets(self, text: str, add_special_tokens: bool) -> Encoded:
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        starts = [start for start, _ in encoding.offsets]  # in characters
        if not text.isascii():
            byte_at = list(accumulate((len(character.encode()) for character in text), initial=0))
            starts = [byte_at[start] for start in starts]
        return encoding.ids, starts

    async def _in_pool(self, work: Callable[[], _T]) -> _T:
        """Run `work` in a thread; give up waiting for a free one after a minute."""
        try:
            async with asyncio.timeout(_MAX_WAIT_S):
                return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except TimeoutError:
            message = "the tokenizer is busy with long texts; send fewer at a time"
            raise ServingError(Reason.QUEUE_FULL, message, retry_after_ms=1000) from None


def _sampling_defaults(given: dict[str, float]) -> common_pb2.SamplingParams:
    """Return what unset sampling fields mean: the model's recommendation where there is one, else plain sampling."""
    sampling = common_pb2.SamplingParams(
        temperature=1, top_p=1, top_k=0, min_p=0, presence_penalty=0, frequency_penalty=0, repetition_penalty=1
    )
    for name, value in given.items():
        if name == "top_k":
            sampling.top_k = max(0, int(value))  # some files say -1 for "all"
        else:
            setattr(sampling, name, float(value))
    return sampling
