"""Rebuilds a model's tokenizer from the metadata of its GGUF file.

GGUF names the family of a tokenizer and keeps tokens, merges or scores; how text is cut before the
merges are applied is known by a name only (tokenizer.ggml.pre). A name that is not listed here is
refused: a tokenizer that is nearly right makes a model that is nearly right.
"""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

_log = logging.getLogger(__name__)
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # GGUF's token types that matter here

_NO_TOKEN = 0xFFFFFFFF  # -1, as the unsigned number that these ids are
# What follows from scores is looked for at each place of each token. The longest ones in use are runs of 100 blanks.
_MAX_TOKEN_CHARS = 512
_MAX_CHARS = 8_388_608

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

_DIGIT = r"\p{N}"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_CJK_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _PreTokenizer(NamedTuple):
    """How a text is cut before merges are applied.

    patterns            what is cut out, one after the other
    is_gpt2             then it is cut as GPT-2 does
    has_single_digits   before that each digit is cut off
    is_nfc              the text is put into Unicode's form NFC first
    takes_whole_tokens  a piece that is a token is not put together of merges
    adds_bos            what an absent add_bos_token means
    """

    patterns: tuple[str, ...] = ()
    is_gpt2: bool = False
    has_single_digits: bool = False
    is_nfc: bool = False
    takes_whole_tokens: bool = False
    adds_bos: bool = False


_GPT2 = _PreTokenizer(is_gpt2=True)
_DIGITS = _PreTokenizer(is_gpt2=True, has_single_digits=True)
_LLAMA_BPE = _PreTokenizer((_LLAMA3,), takes_whole_tokens=True, adds_bos=True)
_UNNAMED = ("", "default")  # what files say that were made before the name existed
# By tokenizer.ggml.pre.
_PRE_TOKENIZERS: dict[str, _PreTokenizer] = {
    **dict.fromkeys((*_UNNAMED, "gpt-2", "gpt2", "phi-2"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact"), _DIGITS),
    "command-r": _DIGITS._replace(is_nfc=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA_BPE),
    **dict.fromkeys(("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), _PreTokenizer((_LLAMA3,))),
    "qwen2": _PreTokenizer((_QWEN2,), is_nfc=True),
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2"), _PreTokenizer((_QWEN2,))),
    "tekken": _PreTokenizer((_TEKKEN,), takes_whole_tokens=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "minimax-m2"), _PreTokenizer((_GPT4O,))),
    "deepseek-coder": _PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, _DIGIT)),
    "deepseek-v3": _PreTokenizer((r"\p{N}{1,3}", _CJK_AND_KANA, _DEEPSEEK_V3)),
}
WORD_PATTERNS = frozenset((_LLAMA3, _QWEN2, _TEKKEN, _GPT4O))
"""How texts are cut into words and what is between. A space before a letter is a part of the word behind it."""


class UnknownTokenizerError(ValueError):
    """The file's tokenizer is of a kind that cannot be rebuilt; the message says which."""


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that a GGUF file's metadata describes. Raises UnknownTokenizerError."""
    model = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise UnknownTokenizerError("the GGUF file holds no tokenizer (tokenizer.ggml.tokens)")
    if not _is_texts(tokens):
        raise UnknownTokenizerError("tokenizer.ggml.tokens must be a list of strings")
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


def token_id(metadata: dict[str, Any], name: str) -> int | None:
    """Return the id of a token that the file names; None if it does not, or with -1. Raises UnknownTokenizerError."""
    key = f"tokenizer.ggml.{name}_token_id"
    index, num_tokens = metadata.get(key), len(metadata["tokenizer.ggml.tokens"])
    if index is None or index in (-1, _NO_TOKEN):
        return None
    if name == "padding" and isinstance(index, int) and index >= num_tokens:
        return None  # nothing is padded
    if not isinstance(index, int) or not 0 <= index < num_tokens:
        raise UnknownTokenizerError(f"{key} must be the id of one of the {num_tokens} tokens, not {str(index)[:50]!r}")
    return index


def adds_bos(metadata: dict[str, Any]) -> bool:
    """Return whether a plain text gets the model's first token in front."""
    known = _PRE_TOKENIZERS.get(str(metadata.get("tokenizer.ggml.pre", "")), _GPT2)
    default = metadata.get("tokenizer.ggml.model") == "llama" or known.adds_bos
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default)) and token_id(metadata, "bos") is not None


def _byte_level(metadata: dict[str, Any]) -> dict[str, Any]:
    """Byte-level BPE: merges are in the file, how text is cut first is known by name."""
    known = _find_pre_tokenizer(str(metadata.get("tokenizer.ggml.pre", "")))
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    vocab = _vocabulary(tokens)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(metadata, tokens),
        "normalizer": {"type": "NFC"} if known.is_nfc else None,
        "pre_tokenizer": _pre_tokenizer(known, byte_level),
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": known.takes_whole_tokens,
            "vocab": vocab,
            "merges": _merges(metadata, vocab),
        },
    }


def _merges(metadata: dict[str, Any], vocab: dict[str, int]) -> list[list[str]]:
    given = metadata.get("tokenizer.ggml.merges") or []
    if not _is_texts(given):
        raise UnknownTokenizerError("tokenizer.ggml.merges must be a list of strings")
    merges = [merge.split(" ", 1) for merge in given]
    for index, halves in enumerate(merges):
        if len(halves) < 2 or halves[0] not in vocab or halves[1] not in vocab or "".join(halves) not in vocab:
            what = f"tokenizer.ggml.merges[{index}] is {given[index][:50]!r}"
            raise UnknownTokenizerError(f"{what}; it must be two tokens with a space between that make a third")
    return merges


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _find_pre_tokenizer(name: str) -> _PreTokenizer:
    if name in _UNNAMED:
        _log.warning("the GGUF file does not name its pre-tokenizer (tokenizer.ggml.pre); GPT-2's is used")
    if name not in _PRE_TOKENIZERS:
        known = ", ".join(name for name in _PRE_TOKENIZERS if name)
        raise UnknownTokenizerError(
            f"the pre-tokenizer {name[:50]!r} (tokenizer.ggml.pre) is not known; use the folder with the "
            f"tokenizer.json, or a file with one of {known}"
        )
    return _PRE_TOKENIZERS[name]


def _pre_tokenizer(known: _PreTokenizer, byte_level: dict[str, Any]) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in known.patterns
    ]
    if known.has_single_digits:
        steps.append({"type": "Digits", "individual_digits": True})
    steps.append({**byte_level, "use_regex": known.is_gpt2})
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def _sentencepiece(metadata: dict[str, Any]) -> dict[str, Any]:
    """SentencePiece's BPE with byte fallback: merges follow from the tokens' scores."""
    kinds = _kinds(metadata)
    tokens = [
        token.replace(" ", "▁") if kind == _USER_DEFINED else token
        for token, kind in zip(metadata["tokenizer.ggml.tokens"], kinds, strict=True)
    ]
    vocab = _vocabulary(tokens)
    scores: Sequence[float] = metadata.get("tokenizer.ggml.scores", [])
    if not isinstance(scores, (list, array)) or len(scores) != len(tokens):
        raise UnknownTokenizerError("the GGUF file holds no score for each token (tokenizer.ggml.scores)")
    # Tokens that a model's maker defined, such as runs of blanks, go before all others, the first one first; what a
    # file has for their scores means nothing.
    ranks = {
        token: (1.0, -index) if kind == _USER_DEFINED else (0.0, score)
        for index, (token, kind, score) in enumerate(zip(tokens, kinds, scores, strict=True))
    }
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    longest = max(range(len(tokens)), key=lambda index: len(tokens[index]))
    if len(tokens[longest]) > _MAX_TOKEN_CHARS or sum(map(len, tokens)) > _MAX_CHARS:
        limits = f"at most {_MAX_TOKEN_CHARS} characters, and all together {_MAX_CHARS}"
        what = f"tokenizer.ggml.tokens[{longest}] has {len(tokens[longest])} characters"
        raise UnknownTokenizerError(f"{what}; a token may have {limits}")
    unknown = tokens[token_id(metadata, "unknown") or 0]
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
            "merges": _merges_by_score(vocab, ranks),
        },
    }


def _merges_by_score(vocab: dict[str, int], ranks: dict[str, tuple[float, float]]) -> list[list[str]]:
    """Return the merges a SentencePiece model makes, the most wanted first.

    A merge is as good as the rank of the token it makes; of equals, longer halves come first.
    """
    merges: list[tuple[tuple[float, float], int, int, str, str]] = []
    lengths = {len(token) for token in vocab}
    for token, rank in ranks.items():
        local = [
            (token[:cut], token[cut:])
            for cut in range(1, len(token))
            if cut in lengths and len(token) - cut in lengths and token[:cut] in vocab and token[cut:] in vocab
        ]
        local.sort(key=lambda halves: (vocab[halves[0]], vocab[halves[1]]))
        merges += [(rank, len(left), len(right), left, right) for left, right in local]
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
    if not isinstance(kinds, (list, array)) or len(kinds) != len(tokens):
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
    index = token_id(metadata, "bos")
    assert index is not None, "adds_bos says so"
    token = metadata["tokenizer.ggml.tokens"][index]
    bos = {"SpecialToken": {"id": token, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }
