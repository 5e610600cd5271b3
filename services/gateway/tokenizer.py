"""A model's tokenizer. What takes long is for the threads of its `long_work`, never for the event loop."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

from octavo.common.v1 import common_pb2
from octavo.services.gateway.chat_template import ChatTemplate, TemplateError
from octavo.services.gateway.chunk_encoder import ChunkEncoder
from octavo.services.gateway.detokenizer import Detokenizer, DetokenizerFactory
from octavo.services.gateway.input_encoder import EncodedInput, InputEncoder
from octavo.services.gateway.long_work import LongWork
from octavo.services.gateway.model_files import ModelError, ModelFiles, read_model

Encoded = tuple[list[int], list[int]]
"""Token ids, and byte offsets as many, or none."""
INLINE_CHARS = 8_192  # about a millisecond of encoding
INLINE_TOKENS = 8_192
_MAX_OFFSETS = 65_536  # in one call of the library, which holds the GIL for some 10 ms


class ModelTokenizer:
    """Text to tokens and back, for one model. Lives as long as the process; `close` ends its threads."""

    def __init__(self, files: ModelFiles, num_threads: int = 2) -> None:
        """Raises ModelError if the chat template does not compile."""
        self._tokenizer = files.tokenizer
        added = files.tokenizer.get_added_tokens_decoder()
        self._special = {token.content: index for index, token in added.items() if token.special}
        self._encoder = ChunkEncoder(files.tokenizer)
        self._detokenizers = DetokenizerFactory(files.tokenizer)
        self.long_work = LongWork(num_threads)
        """The threads for whatever is done with long texts."""
        self.sha256 = hashlib.sha256(files.definition).hexdigest()
        self.tokens_sha256 = files.tokens_sha256
        self.files = files.files
        self.file_hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.files.items()}
        """SHA-256 of each file, in hex."""
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
        self.long_work.close()

    def encode(self, text: str, add_special_tokens: bool, scope: str, limit: int | None = None) -> list[int]:
        """Return the token ids of a text. How long it takes tells nothing about texts of another `scope`.

        Raises TooManyTokensError if there are more than `limit`.
        """
        return self._encoder.encode(text, add_special_tokens, scope, limit)

    def encode_anew(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text; nothing is remembered of it."""
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def encode_with_offsets(self, text: str, add_special_tokens: bool) -> Encoded:
        """Return the token ids of a text, and where each token starts in the text's UTF-8."""
        # A batch, even of one, lets go of the GIL.
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        if len(encoding) <= _MAX_OFFSETS:
            starts = [start for start, _ in encoding.offsets]  # in characters
        else:
            starts = [(encoding.token_to_chars(index) or (0, 0))[0] for index in range(len(encoding))]
        if not text.isascii():
            byte_at = list(accumulate((len(character.encode()) for character in text), initial=0))
            starts = [byte_at[start] for start in starts]
        return encoding.ids, starts

    def encode_inputs(self, inputs: Sequence[str | tuple[str, str]], limit: int) -> list[EncodedInput]:
        """Return the tokens, at most `limit` of each, that vectors of texts or pairs of texts are made of.

        The first time for a limit takes long.
        """
        return self._inputs.encode(inputs, limit)

    def knows_limit(self, limit: int) -> bool:
        """Return whether inputs have been cut to this length before."""
        return self._inputs.knows(limit)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Return the text of tokens; ids that the tokenizer does not know have none."""
        (text,) = self._tokenizer.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)
        return text

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
