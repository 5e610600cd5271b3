"""Encoding in chunks: the tokens are those of the whole text, and a chunk is encoded once."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from octavo.services.gateway.tokenization.chunk_encoder import (
    CHUNK_CHARS,
    MAX_REMEMBERED_CHARS,
    ChunkEncoder,
    chunks_of,
    cuts_at_words,
)
from octavo.services.gateway.tokenization.gguf_tokenizer import WORD_PATTERNS

_WORDS = """
the The THE don't it's IT'S we'll a I naïve Straße e\u0301te\u0301 日本語 中 мир x2 2x 12345 3.14 _id foo_bar --- ...
?! (see) [INST] <|end|> camelCase HTTPServer ² Ⅷ ½ 👩‍👩‍👧 '' ' 's 'tis ''s /usr/lib/x 'S ſ \u212a
"""
WORDS = _WORDS.split()
SPACES = (" ", " ", " ", " ", " ", "  ", "   ", "\n", "\n\n", " \n ", "\t", "\u00a0", "\u2003", "\r\n", "", "/")


def byte_level(*before: pre_tokenizers.PreTokenizer, use_regex: bool) -> pre_tokenizers.PreTokenizer:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return pre_tokenizers.Sequence([*before, last]) if before else last


def split_at(pattern: str) -> pre_tokenizers.PreTokenizer:
    return byte_level(pre_tokenizers.Split(Regex(pattern), "isolated"), use_regex=False)


PRE_TOKENIZERS = {
    "GPT-2's": byte_level(use_regex=True),
    "and digits": byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
    "a space in front": pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True),
    **{f"pattern {index}": split_at(pattern) for index, pattern in enumerate(sorted(WORD_PATTERNS))},
}


def random_text(seed: int, num_words: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice(SPACES) for _ in range(num_words))


@cache
def trained() -> BPE:
    """A model that has merges across all that may be in a text: only the pre-tokenizer keeps them from being made."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False, max_token_length=12)
    tokenizer.train_from_iterator([random_text(seed, 40) for seed in range(1000, 1100)], trainer)
    return tokenizer.model


def make_tokenizer(**parts: Any) -> Tokenizer:
    tokenizer = Tokenizer(trained())
    for name, part in {"pre_tokenizer": PRE_TOKENIZERS["GPT-2's"], **parts}.items():
        setattr(tokenizer, name, part)
    return tokenizer


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()], ids=["as it is", "NFC"])
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_the_tokens_of_chunks_are_those_of_the_text(name: str, normalizer: Any) -> None:
    tokenizer = make_tokenizer(pre_tokenizer=PRE_TOKENIZERS[name], normalizer=normalizer)
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens([AddedToken("[INST]", rstrip=True), AddedToken(" foo"), AddedToken("see", single_word=True)])
    encoder = ChunkEncoder(tokenizer)
    num_chunks = 0

    for seed in range(40):
        text = random_text(seed, 600)
        num_chunks += len(list(chunks_of(text)))
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert encoder.encode(text, False, "") == expected
        assert encoder.encode(text, False, "") == expected  # as it is remembered

    assert cuts_at_words(tokenizer)
    assert num_chunks > 100


def test_special_tokens_stand_around_the_whole_text() -> None:
    begin_and_end = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 2000), ("</s>", 2001)])
    tokenizer = make_tokenizer(post_processor=begin_and_end)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    encoder = ChunkEncoder(tokenizer)

    for text in ("short", "a long text of words " * 100):
        assert encoder.encode(text, True, "") == tokenizer.encode(text).ids
        assert encoder.encode(text, False, "") == tokenizer.encode(text, add_special_tokens=False).ids


class CountingTokenizer:
    """A tokenizer, and how many characters it encoded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.num_encoded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.num_encoded += sum(map(len, texts))
        return self._tokenizer.encode_batch_fast(texts, **options)


def test_what_texts_begin_with_alike_is_encoded_once_for_each_scope() -> None:
    tokenizer: Any = CountingTokenizer(make_tokenizer())
    encoder = ChunkEncoder(tokenizer)
    prefix = " ".join(f"all begin {chr(97 + index % 26) * (1 + index // 26)} with" for index in range(200))

    def num_encoded(text: str, scope: str) -> int:
        before = tokenizer.num_encoded
        encoder.encode(text, False, scope)
        encoded: int = tokenizer.num_encoded - before
        return encoded

    assert num_encoded(prefix + "one", "a") == len(prefix + "one")
    assert num_encoded(prefix + "another", "a") < 2 * CHUNK_CHARS
    assert num_encoded(prefix + "one", "b") == len(prefix + "one")

    for length, is_remembered in ((MAX_REMEMBERED_CHARS - 1, True), (MAX_REMEMBERED_CHARS, False)):
        chunk = "語" * length + "a"
        num_encoded(f"{chunk} question", "a")
        assert num_encoded(f"{chunk} question", "a") == len(" question") + (0 if is_remembered else len(chunk))


def test_a_text_without_words_is_one_chunk() -> None:
    for text in ("日本語" * 1000, "1 2 3 " * 1000, "a" * 5000, "", "word " * 100):
        assert list(chunks_of(text)) == [text]


def with_token(token: AddedToken) -> Tokenizer:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([token])
    return tokenizer


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_tokenizer(pre_tokenizer=None),
        lambda: make_tokenizer(pre_tokenizer=pre_tokenizers.Metaspace()),
        lambda: make_tokenizer(pre_tokenizer=split_at(r"[a-z]+ [a-z]+")),
        lambda: make_tokenizer(pre_tokenizer=byte_level(use_regex=False)),
        lambda: make_tokenizer(pre_tokenizer=byte_level(pre_tokenizers.Split(" ", "removed"), use_regex=True)),
        lambda: make_tokenizer(normalizer=normalizers.Replace("a b", "c")),
        lambda: make_tokenizer(model=BPE(vocab={"a": 0}, merges=[], dropout=0.5)),
        lambda: with_token(AddedToken("New York")),
        lambda: with_token(AddedToken("of ")),
        lambda: with_token(AddedToken("END", rstrip=True)),
    ],
)
def test_a_tokenizer_that_may_look_across_cuts_is_given_whole_texts(make: Any) -> None:
    tokenizer = make()

    assert not cuts_at_words(tokenizer)
    if tokenizer.model.dropout is None:
        text = "a long text of words, and New York END of it " * 50
        assert ChunkEncoder(tokenizer).encode(text, False, "") == tokenizer.encode(text, add_special_tokens=False).ids
