"""A worker and a gateway give every token the same bytes: they read the same files, each in its own way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.sampling.vocabulary import read_vocabulary
from octavo.services.cli import demo_model
from octavo.services.gateway.tokenization.tokenizer import ModelTokenizer


@pytest.fixture(scope="module")
def gguf() -> Path:
    return demo_model.fetch(demo_model.cache_dir(), lambda what, done, total: None)


def write_folder(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> Path:
    tokenizer.add_tokens(["<tool call>"])
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": vocab_size, "max_position_embeddings": 64}))
    return folder


def byte_level(folder: Path) -> Path:
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġw"]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return write_folder(folder, tokenizer, 300)


def sentencepiece(folder: Path) -> Path:
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁he", "llo", "é"]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return write_folder(folder, tokenizer, 280)


def check(path: Path) -> None:
    tokenizer = ModelTokenizer.load(path)
    tokens, special = tokenizer.vocabulary()
    vocabulary = read_vocabulary(path, tokenizer.vocab_size)
    tokenizer.close()

    assert tokenizer.has_token_bytes
    assert sorted(vocabulary.special_token_ids) == special
    different = [index for index in range(len(tokens)) if vocabulary.tokens[index] != tokens[index]]
    assert not [index for index in different if index not in special], different
    assert len(vocabulary.tokens) == len(tokens)


def test_the_demo_models_gguf_file(gguf: Path) -> None:
    check(gguf)


def test_a_folder_with_byte_level_tokens(tmp_path: Path) -> None:
    check(byte_level(tmp_path))


def test_a_folder_with_sentencepiece_tokens(tmp_path: Path) -> None:
    check(sentencepiece(tmp_path))


def test_tokens_whose_bytes_depend_on_their_neighbours_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()

    with pytest.raises(ModelError, match="WordPiece"):
        read_vocabulary(write_folder(tmp_path, tokenizer, 5), 5)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        read_vocabulary(tmp_path, 5)
