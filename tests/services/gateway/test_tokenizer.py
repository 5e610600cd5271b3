"""What is read of a model's files, and encoding."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from octavo.services.gateway.tokenization.gguf_tokenizer import UnknownTokenizerError, build_tokenizer
from octavo.services.gateway.tokenization.model_files import ModelError, read_model
from octavo.services.gateway.tokenization.tokenizer import ModelTokenizer


def test_a_long_text_encodes_like_a_short_one_and_decodes_back(model_path: Path) -> None:
    tokenizer = ModelTokenizer.load(model_path)
    text = "hello wörld " * 2000

    ids = tokenizer.encode(text, True, "")

    assert ids == tokenizer.encode("hello wörld ", True, "") * 2000
    assert tokenizer.decode(ids, True) == text
    tokenizer.close()


def test_byte_offsets_count_bytes_of_utf_8(model_path: Path) -> None:
    tokenizer = ModelTokenizer.load(model_path)

    ids, offsets = tokenizer.encode_with_offsets("a€he", False)
    _, long_offsets = tokenizer.encode_with_offsets("a€he" * 30_000, False)

    assert [tokenizer.decode(ids[:1], True), tokenizer.decode(ids[-1:], True)] == ["a", "he"]
    assert (offsets[0], offsets[-1]) == (0, 4)
    assert long_offsets == [6 * index + start for index in range(30_000) for start in offsets]
    tokenizer.close()


def test_unset_sampling_means_what_the_model_recommends(tools: Any, tmp_path: Path) -> None:
    folder = tools.write_model(
        tmp_path / "m", temperature=0.6, top_p=0.9, top_k=-1, repetition_penalty=1.1, do_sample=False, min_p=None
    )

    sampling = ModelTokenizer.load(folder).default_sampling

    assert (round(sampling.temperature, 5), round(sampling.top_p, 5), sampling.top_k) == (0.6, 0.9, 0)
    assert (round(sampling.repetition_penalty, 5), sampling.min_p) == (1.1, 0)


def test_ends_come_from_all_three_files_once_each(tools: Any, tmp_path: Path) -> None:
    folder = tools.write_model(tmp_path / "m", eos_token_id=[7, 0])
    (folder / "config.json").write_text(json.dumps({"vocab_size": 300, "n_positions": 99, "eos_token_id": 8}))

    files = read_model(folder)

    assert files.end_of_sequence_ids == [7, 0, 8]
    assert (files.vocab_size, files.max_model_len) == (300, 99)


def test_the_config_of_the_text_part_counts(tools: Any, tmp_path: Path) -> None:
    folder = tools.write_model(tmp_path / "m")
    nested = {"text_config": {"vocab_size": 500, "max_position_embeddings": 77}}
    (folder / "config.json").write_text(json.dumps(nested))

    files = read_model(folder)

    assert (files.vocab_size, files.max_model_len) == (500, 77)


def test_a_template_file_wins_and_a_list_of_templates_has_a_default(tools: Any, tmp_path: Path) -> None:
    folder = tools.write_model(tmp_path / "m")
    listed = {"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(listed))
    assert read_model(folder).chat_template == "d"

    (folder / "chat_template.jinja").write_text("own")
    assert read_model(folder).chat_template == "own"


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", "{", "not a tokenizer"),
        ("config.json", "{", "not JSON"),
        ("config.json", "[]", "JSON object"),
    ],
)
def test_a_folder_that_cannot_be_served_says_why(
    tools: Any, tmp_path: Path, file: str, content: str | None, says: str
) -> None:
    folder = tools.write_model(tmp_path / "m")
    (folder / file).unlink() if content is None else (folder / file).write_text(content)

    with pytest.raises(ModelError, match=says):
        read_model(folder)


def test_a_path_that_is_no_model_says_why(tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_text("x")
    (tmp_path / "file.gguf").write_text("x" * 100)
    for name, says in (("missing", "does not exist"), ("file.bin", "not a .gguf file"), ("file.gguf", "not a GGUF")):
        with pytest.raises(ModelError, match=says):
            read_model(tmp_path / name)


# GGUF


def gguf_bytes(metadata: dict[str, Any]) -> bytes:
    """Return the head of a GGUF file, version 3, without tensors."""

    def string(text: str) -> bytes:
        data = text.encode()
        return struct.pack("<Q", len(data)) + data

    def value(item: Any) -> bytes:
        if isinstance(item, bool):
            return struct.pack("<I?", 7, item)
        if isinstance(item, int):
            return struct.pack("<II", 4, item)
        if isinstance(item, float):
            return struct.pack("<If", 6, item)
        if isinstance(item, str):
            return struct.pack("<I", 8) + string(item)
        head = struct.pack("<I", 9)
        if item and isinstance(item[0], str):
            return head + struct.pack("<IQ", 8, len(item)) + b"".join(map(string, item))
        kind, form = (6, "f") if item and isinstance(item[0], float) else (5, "i")
        return head + struct.pack(f"<IQ{len(item)}{form}", kind, len(item), *item)

    head = struct.pack("<4sIQQ", b"GGUF", 3, 0, len(metadata))
    return head + b"".join(string(key) + value(item) for key, item in metadata.items())


def gguf_of(tokenizer: Tokenizer, pre: str, **more: Any) -> dict[str, Any]:
    """Return the metadata of a GGUF file with the tokenizer of the test model."""
    definition = json.loads(tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(definition["vocab"].items(), key=lambda item: item[1])]
    return {
        "general.architecture": "llama",
        "llama.context_length": 128,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, *[1] * (len(tokens) - 2)],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in definition["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": "{{ messages[0].content }}",
        "general.sampling.temp": 0.5,
        **more,
    }


def test_a_gguf_file_serves_like_the_folder_it_was_made_of(tools: Any, tmp_path: Path) -> None:
    original = tools.make_tokenizer()
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(gguf_of(original, "gpt-2")))

    files = read_model(path)

    for text in ("hello wörld 123", "<|start|>user\nhe  said\n\n<|end|>", "日本 \u00a0 x"):
        assert files.tokenizer.encode(text).ids == original.encode(text).ids
    assert files.end_of_sequence_ids == [0]
    assert (files.max_model_len, files.vocab_size) == (128, original.get_vocab_size())
    assert files.special_tokens == {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    assert files.chat_template == "{{ messages[0].content }}"
    assert files.default_sampling == {"temperature": 0.5}
    assert hashlib.sha256(files.files["tokenizer.json"]).hexdigest() == hashlib.sha256(files.definition).hexdigest()


def test_a_call_ends_the_output_where_messages_end_in_several_ways(tools: Any, tmp_path: Path) -> None:
    tokenizer = tools.make_tokenizer()
    tokenizer.add_tokens(["<|return|>", "<|call|>"])
    ends = {name: tokenizer.token_to_id(f"<|{name}|>") for name in ("return", "call", "end")}
    more = {"tokenizer.ggml.eos_token_id": ends["return"], "tokenizer.ggml.eot_token_id": ends["end"]}
    metadata = gguf_of(tokenizer, "gpt-2", **more)
    metadata["tokenizer.ggml.tokens"] += ["<|return|>", "<|call|>"]
    metadata["tokenizer.ggml.token_type"] += [3, 3]
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(metadata))

    assert read_model(path).end_of_sequence_ids == [ends["return"], ends["call"]]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["Ġ12345"]),
        ("smollm", ["Ġ", "1", "2", "3", "4", "5"]),
        ("qwen2", ["Ġ", "1", "2", "3", "4", "5"]),
        ("llama-bpe", ["Ġ", "123", "45"]),
        ("tekken", ["Ġ", "1", "2", "3", "4", "5"]),
        ("gpt-4o", ["Ġ", "123", "45"]),
        ("falcon3", ["Ġ", "123", "45"]),
        ("glm4", ["Ġ", "123", "45"]),
        ("minimax-m2", ["Ġ", "123", "45"]),
        ("deepseek-coder", ["Ġ", "1", "2", "3", "4", "5"]),
        ("deepseek-v3", ["Ġ", "123", "45"]),
    ],
)
def test_digits_are_cut_as_the_family_does(tools: Any, pre: str, pieces: list[str]) -> None:
    tokenizer = build_tokenizer(gguf_of(tools.make_tokenizer(), pre))

    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(" 12345")] == pieces


def test_a_first_token_is_added_only_to_plain_text_and_only_if_the_file_says_so(tools: Any) -> None:
    plain = build_tokenizer(gguf_of(tools.make_tokenizer(), "gpt-2"))
    with_bos = build_tokenizer(gguf_of(tools.make_tokenizer(), "gpt-2", **{"tokenizer.ggml.add_bos_token": True}))

    assert (
        plain.encode("he").ids == with_bos.encode("he").ids[1:] == with_bos.encode("he", add_special_tokens=False).ids
    )
    assert with_bos.encode("he").ids[0] == 1


def sentencepiece_metadata(prefix: bool) -> dict[str, Any]:
    scored = {"▁": -9.0, "a": -10.0, "b": -11.0, "▁a": -2.0, "ab": -1.0, "▁ab": -3.0}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *scored]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + list(scored.values()),
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(scored)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def test_sentencepiece_merges_the_best_score_first_and_falls_back_to_bytes() -> None:
    tokenizer = build_tokenizer(sentencepiece_metadata(prefix=True))

    assert tokenizer.encode("ab").tokens == ["<s>", "▁ab"]
    assert tokenizer.encode("aab").tokens == ["<s>", "▁a", "ab"]
    assert tokenizer.encode("ü", add_special_tokens=False).tokens == ["▁", "<0xC3>", "<0xBC>"]
    assert tokenizer.decode(tokenizer.encode("ab ü").ids) == "ab ü"
    assert build_tokenizer(sentencepiece_metadata(prefix=False)).encode("ab").tokens == ["<s>", "ab"]


def test_defined_tokens_are_merged_before_those_with_a_better_score() -> None:
    """As runs of blanks in Gemma's files, which have the score of tokens that nothing is merged to."""
    metadata = sentencepiece_metadata(prefix=False)
    tokens = {"  ": -1000.0, "    ": -1000.0, "▁▁▁": -1000.0}  # kind and blanks as in a file
    metadata["tokenizer.ggml.tokens"] += list(tokens)
    metadata["tokenizer.ggml.scores"] += list(tokens.values())
    metadata["tokenizer.ggml.token_type"] += [4, 4, 4]
    tokenizer = build_tokenizer(metadata)

    assert tokenizer.encode("    a", add_special_tokens=False).tokens == ["▁▁▁▁", "a"]
    assert tokenizer.encode("   a", add_special_tokens=False).tokens == ["▁▁▁", "a"]
    assert tokenizer.encode(" a", add_special_tokens=False).tokens == ["▁a"]
    assert tokenizer.decode(tokenizer.encode("    a").ids) == "    a"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokenizer.ggml.model": "bert"}, "bert"),
        ({"tokenizer.ggml.pre": "klingon"}, "klingon.*one of .*llama-bpe, "),
        ({"tokenizer.ggml.tokens": []}, "no tokenizer"),
        ({"tokenizer.ggml.token_type": [1]}, "token types"),
        ({"tokenizer.ggml.model": "llama"}, "score"),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt_exactly_is_refused(tools: Any, change: dict[str, Any], says: str) -> None:
    with pytest.raises(UnknownTokenizerError, match=says):
        build_tokenizer(gguf_of(tools.make_tokenizer(), "gpt-2", **change))


def test_a_damaged_gguf_file_is_an_error_and_no_crash(tools: Any, tmp_path: Path) -> None:
    whole = gguf_bytes(gguf_of(tools.make_tokenizer(), "gpt-2"))
    path = tmp_path / "m.gguf"
    for data in (whole[:-7], whole[:30], b"GGUF" + b"\xff" * 60, b"GGUF\x01\0\0\0" + b"\0" * 16):
        path.write_bytes(data)
        with pytest.raises(ModelError, match=r"m\.gguf"):
            read_model(path)
