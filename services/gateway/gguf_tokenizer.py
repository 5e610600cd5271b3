"""Rebuilds a model's tokenizer from the metadata of its GGUF file.

GGUF names the family of a tokenizer and keeps tokens, merges or scores; how text is cut before the
merges are applied is known by a name only (tokenizer.ggml.pre). A name that is not listed here is
refused: a tokenizer that is nearly right makes a model that is nearly right.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from tokenizers import Tokenizer

_log = logging.getLogger(__name__)
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # GGUF's token types that matter here

_GPT2_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _GPT2_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _GPT2_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_TEKKEN = _CASED % ("", "") + r"|\p{N}" + _CASED_REST
_GPT4O = _CASED % (_GPT2_CONTRACTIONS + "?", _GPT2_CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _CASED_REST

_UNNAMED = ("", "default")  # what files say that were made before the name existed
_GPT2_NAMES = (*_UNNAMED, "gpt-2", "gpt2", "phi-2")
_DIGIT_NAMES = ("smollm", "starcoder", "refact", "command-r")
_REGEX_NAMES = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
}
WORD_PATTERNS = frozenset(_REGEX_NAMES.values())
"""How texts are cut into words and what is between. A space before a letter is a part of the word behind it."""
_NFC_NAMES = ("qwen2", "command-r")
_WHOLE_TOKENS_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")
_LEADING_BOS = ("llama-bpe", "llama3", "llama-v3", "tekken")  # what an absent add_bos_token means, besides "llama"


class UnknownTokenizerError(ValueError):
    """The file's tokenizer is of a kind that cannot be rebuilt; the message says which."""


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that a GGUF file's metadata describes. Raises UnknownTokenizerError."""
    model = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise UnknownTokenizerError("the GGUF file holds no tokenizer (tokenizer.ggml.tokens)")
    if model == "gpt2":
        definition = _byte_level(metadata)
    elif model == "llama":
        definition = _sentencepiece(metadata)
    else:
        raise UnknownTokenizerError(
            f"tokenizers of the kind {model!r} cannot be rebuilt from GGUF; use the folder with the tokenizer.json"
        )
    definition["post_processor"] = _leading_bos(metadata)
    return Tokenizer.from_str(json.dumps(definition, ensure_ascii=False))


def adds_bos(metadata: dict[str, Any]) -> bool:
    """Return whether a plain text gets the model's first token in front."""
    default = metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre", "") in _LEADING_BOS
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default)) and "tokenizer.ggml.bos_token_id" in metadata


def _byte_level(metadata: dict[str, Any]) -> dict[str, Any]:
    """Byte-level BPE: merges are in the file, how text is cut first is known by name."""
    name = str(metadata.get("tokenizer.ggml.pre", ""))
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(metadata, tokens),
        "normalizer": {"type": "NFC"} if name in _NFC_NAMES else None,
        "pre_tokenizer": _pre_tokenizer(name, byte_level),
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": name in _WHOLE_TOKENS_FIRST,
            "vocab": _vocabulary(tokens),
            "merges": [merge.split(" ", 1) for merge in metadata.get("tokenizer.ggml.merges", [])],
        },
    }


def _pre_tokenizer(name: str, byte_level: dict[str, Any]) -> dict[str, Any]:
    if name in _UNNAMED:
        _log.warning("the GGUF file does not name its pre-tokenizer (tokenizer.ggml.pre); GPT-2's is used")
    if name in _GPT2_NAMES:
        return byte_level
    if name in _DIGIT_NAMES:
        return {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]}
    if name not in _REGEX_NAMES:
        raise UnknownTokenizerError(
            f"the pre-tokenizer {name!r} (tokenizer.ggml.pre) is not known; use the folder with the tokenizer.json"
        )
    split = {"type": "Split", "pattern": {"Regex": _REGEX_NAMES[name]}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": False}]}


def _sentencepiece(metadata: dict[str, Any]) -> dict[str, Any]:
    """SentencePiece's BPE with byte fallback: merges follow from the tokens' scores."""
    tokens = [
        token.replace(" ", "▁") if kind == _USER_DEFINED else token
        for token, kind in zip(metadata["tokenizer.ggml.tokens"], _kinds(metadata), strict=True)
    ]
    vocab = _vocabulary(tokens)
    scores: list[float] = metadata.get("tokenizer.ggml.scores", [])
    if len(scores) != len(tokens):
        raise UnknownTokenizerError("the GGUF file holds no score for each token (tokenizer.ggml.scores)")
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(metadata, tokens),
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, blanks]}
        if prefix
        else blanks,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges_by_score(vocab, dict(zip(tokens, scores, strict=True))),
        },
    }


def _merges_by_score(vocab: dict[str, int], scores: dict[str, float]) -> list[list[str]]:
    """Return the merges a SentencePiece model makes, the most wanted first.

    A merge is as good as the score of the token it makes; of equals, longer halves come first.
    """
    merges: list[tuple[float, int, int, str, str]] = []
    for token, score in scores.items():
        local = [
            (token[:cut], token[cut:]) for cut in range(1, len(token)) if token[:cut] in vocab and token[cut:] in vocab
        ]
        local.sort(key=lambda halves: (vocab[halves[0]], vocab[halves[1]]))
        merges += [(score, len(left), len(right), left, right) for left, right in local]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [[left, right] for *_, left, right in merges]


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    """Return the ids of all tokens; of two with one text, the first counts."""
    vocab: dict[str, int] = {}
    for index, token in enumerate(tokens):
        vocab.setdefault(token, index)
    return vocab


def _kinds(metadata: dict[str, Any]) -> list[int]:
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise UnknownTokenizerError("the GGUF file has token types for some tokens only (tokenizer.ggml.token_type)")
    return list(kinds)


def _added_tokens(metadata: dict[str, Any], tokens: list[str]) -> list[dict[str, Any]]:
    """Return the tokens that are found in a text as they are, before it is cut."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = (_CONTROL, _UNKNOWN) if metadata["tokenizer.ggml.model"] == "llama" else (_CONTROL,)
    return [
        {"id": index, "content": token, **flags, "special": kind in special}
        for index, (token, kind) in enumerate(zip(tokens, _kinds(metadata), strict=True))
        if kind in (*special, _USER_DEFINED)
    ]


def _leading_bos(metadata: dict[str, Any]) -> dict[str, Any] | None:
    """Return the post-processor that puts the first token in front of a text, if the model wants that."""
    if not adds_bos(metadata):
        return None
    index = int(metadata["tokenizer.ggml.bos_token_id"])
    token = metadata["tokenizer.ggml.tokens"][index]
    bos = {"SpecialToken": {"id": token, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }
