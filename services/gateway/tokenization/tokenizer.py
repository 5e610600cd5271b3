"""A model's tokenizer. What takes long is for the threads of its `long_work`, never for the event loop."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from octavo.common.sampling import SAMPLING_FIELDS
from octavo.common.v1 import common_pb2
from octavo.services.common.errors import ServingError
from octavo.services.gateway.offload.long_work import LongWork
from octavo.services.gateway.tokenization.chat_template import ChatTemplate, render_request
from octavo.services.gateway.tokenization.chunk_encoder import ChunkEncoder
from octavo.services.gateway.tokenization.detokenizer import Detokenizer, DetokenizerFactory
from octavo.services.gateway.tokenization.input_encoder import EncodedInput, InputEncoder, PairTemplate
from octavo.services.gateway.tokenization.model_files import ModelError, ModelFiles, read_model
from octavo.services.gateway.tokenization.template_process import TemplateError
from octavo.services.gateway.tokenization.vector_files import VectorFiles
from octavo.services.gateway.validation import RequestValidator

Encoded = tuple[list[int], list[int]]
"""Token ids, and byte offsets as many, or none."""
INLINE_CHARS = 8_192  # about a millisecond of encoding
INLINE_TOKENS = 8_192
_QUERY_MARK, _DOCUMENT_MARK = "\ue000query\ue001", "\ue000document\ue001"  # for private use
_MAX_OFFSETS = 65_536  # in one call of the library, which holds the GIL for some 10 ms


class ModelTokenizer:
    """Text to tokens and back, for one model. Lives as long as the process; `stop` ends its threads and process."""

    def __init__(self, files: ModelFiles, num_threads: int = 2) -> None:
        """Raises ModelError."""
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
        self.default_sampling = _sampling_defaults(files)
        self._chat_template_from = files.chat_template_from
        self.chat_template: ChatTemplate | None = None
        if files.chat_template:
            try:
                self.chat_template = ChatTemplate(files.chat_template, files.special_tokens, num_threads)
            except TemplateError as error:
                raise ModelError(f"{files.chat_template_from}: {error}") from None

    @classmethod
    def load(cls, path: Path, num_threads: int = 2) -> ModelTokenizer:
        """Return the tokenizer of a model's folder or .gguf file. Raises ModelError."""
        return cls(read_model(path), num_threads)

    async def start(self) -> None:
        """Make the chat template ready. Raises ModelError if it cannot be used."""
        if self.vector_files is not None:
            await self._read_pair_template(self.vector_files)
        elif self.chat_template is not None:
            try:
                await self.chat_template.facts()
            except TemplateError as error:
                raise ModelError(f"{self._chat_template_from}: {error}") from None

    async def _read_pair_template(self, files: VectorFiles) -> None:
        """Find out what the chat template writes around a query and a document, if it knows them as roles.

        It is rendered once: a template that changes the texts themselves, but for the space around them, is refused.
        """
        template = self.chat_template
        if template is None or files.task == common_pb2.MODEL_TASK_EMBED:
            if files.needs_template:
                raise ModelError(
                    "a model that scores pairs by the logits of words needs a chat template; save it there"
                )
            return
        try:
            facts = await template.facts()
            if not {"query", "document"} <= facts.texts:
                if files.needs_template:
                    raise TemplateError('it has no roles "query" and "document", which a model that scores pairs needs')
                return
            prompt = files.prompts.get(files.default_prompt_name, "")
            messages = [{"role": "system", "content": prompt}] if prompt else []
            marks = {"query": _QUERY_MARK, "document": _DOCUMENT_MARK}
            messages += [{"role": role, "content": mark} for role, mark in marks.items()]
            pair = PairTemplate.of(await template.render(render_request(messages)), _QUERY_MARK, _DOCUMENT_MARK)
            if pair is None:
                raise TemplateError("it does not write the query and the document once each")
            self._inputs.pair_template = pair
        except (TemplateError, ServingError) as error:
            raise ModelError(f"{self._chat_template_from}: {error}") from None
        finally:
            await template.close()

    async def stop(self) -> None:
        """End what `start` has started, and the threads."""
        self.close()
        if self.chat_template is not None:
            await self.chat_template.close()

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


def _sampling_defaults(files: ModelFiles) -> common_pb2.SamplingParams:
    """Return what unset sampling fields mean: the model's recommendation where there is one, else plain sampling.

    Raises ModelError for what a client could not ask for.
    """
    neutral: dict[str, Any] = {name: field.unset for name, field in SAMPLING_FIELDS.items() if name != "seed"}
    sampling = common_pb2.SamplingParams(**{**neutral, "temperature": 1})
    for name, value in files.default_sampling.items():
        if name == "top_k":
            sampling.top_k = min(max(0, int(value)), 0xFFFFFFFF)  # some files say -1 for "all"
        else:
            setattr(sampling, name, float(value))
    try:
        RequestValidator().check(sampling)
    except ServingError as error:
        raise ModelError(f"{files.settings_from}: {error.message}") from None
    return sampling
