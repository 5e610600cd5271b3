"""Text from tokens, as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from octavo.services.gateway.output.candidate_output import CandidateOutput, OutputSettings
from octavo.services.gateway.output.parser import OutputPiece
from octavo.services.gateway.output.stop_matcher import StopStrings
from octavo.services.gateway.tokenization.detokenizer import DetokenizerFactory


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("Ã", "¼"), ("â", "Ĥ")]  # a word's part, a character, a part of one
    tokens = ["<|end|>", *alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens(["<tool call>", "日本"])
    return tokenizer


def sentencepiece(strip: bool = True) -> Tokenizer:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ü", "▁日本"]
    model = models.BPE({token: index for index, token in enumerate(tokens)}, [("▁", "a")], byte_fallback=True)
    tokenizer = Tokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def bytes_in_words() -> Tokenizer:
    """One whose tokens' bytes depend on their neighbours, and may be parts of characters."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "b"]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def word_piece() -> Tokenizer:
    tokens = ["[UNK]", "[PAD]", "un", "##believ", "##able", "word", "é", "日", "."]
    tokenizer = Tokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]"])
    return tokenizer


BYTES = byte_level()
BYTES_FACTORY = DetokenizerFactory(BYTES)
BYTE_IDS = st.lists(st.integers(0, BYTES.get_vocab_size() + 3), max_size=40)


def pushed(factory: DetokenizerFactory, ids: Sequence[int], prompt: Sequence[int] = (1, 2, 3)) -> list[str]:
    detokenizer = factory.new(prompt)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@given(BYTE_IDS)
def test_byte_level_texts_concatenate_to_what_the_tokenizer_decodes_at_once(ids: list[int]) -> None:
    assert "".join(pushed(BYTES_FACTORY, ids)) == BYTES.decode(ids, skip_special_tokens=True)


@given(st.text(max_size=30))
def test_no_piece_of_a_valid_text_is_a_part_of_a_character(text: str) -> None:
    ids = BYTES.encode(text).ids

    pieces = pushed(BYTES_FACTORY, ids)

    assert "".join(pieces) == BYTES.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.text("aüb 日本€", max_size=20))
def test_byte_fallback_texts_concatenate_and_keep_the_leading_blank(text: str) -> None:
    tokenizer = sentencepiece(strip=False)
    ids: list[int] = []
    for character in text.replace(" ", "▁"):
        known = tokenizer.token_to_id(character)
        ids += [known] if known is not None else [3 + byte for byte in character.encode()]

    pieces = pushed(DetokenizerFactory(tokenizer), ids)

    assert "".join(pieces) == text == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_output_keeps_the_blank_that_a_decoder_strips_from_the_start_of_a_text() -> None:
    tokenizer = sentencepiece(strip=True)
    word = tokenizer.token_to_id("▁a")
    assert word is not None

    assert tokenizer.decode([word]) == "a"
    assert pushed(DetokenizerFactory(tokenizer), [word]) == [" a", ""]


def test_an_incomplete_tail_becomes_a_replacement_character_at_the_end_only() -> None:
    first_bytes = BYTES.encode("€").ids[:-1]

    pieces = pushed(BYTES_FACTORY, first_bytes)

    assert pieces[:-1] == [""] * len(first_bytes)
    assert pieces[-1] == "\ufffd"


def test_special_and_unknown_ids_have_no_text() -> None:
    assert "".join(pushed(BYTES_FACTORY, [0, 10_000_000, 0])) == ""


@given(st.lists(st.integers(2, 8), min_size=1, max_size=12))
def test_other_decoders_give_the_same_text_through_a_window(ids: list[int]) -> None:
    tokenizer = word_piece()
    prompt = [5, 5]

    pieces = pushed(DetokenizerFactory(tokenizer), ids, prompt)

    assert tokenizer.decode(prompt) + "".join(pieces) == tokenizer.decode([*prompt, *ids])


def test_a_run_that_never_becomes_a_character_is_not_held_for_ever() -> None:
    tokenizer = Tokenizer(models.WordLevel({"\ufffd": 0, "x": 1}, unk_token="\ufffd"))

    detokenizer = DetokenizerFactory(tokenizer).new([1])

    assert any(detokenizer.push(0) for _ in range(10))


def settings(stops: list[str], min_new_tokens: int, include: bool) -> OutputSettings:
    return OutputSettings(
        new_detokenizer=lambda: BYTES_FACTORY.new([]),
        stop_strings=StopStrings(stops) if stops else None,
        include_stop_sequence=include,
        min_new_tokens=min_new_tokens,
        ending_token_ids=frozenset(),
        omit_text=False,
    )


@given(
    st.text("abü€", min_size=1, max_size=16),
    st.lists(st.text("abü€", min_size=1, max_size=3), max_size=3),
    st.lists(st.integers(1, 4), min_size=1, max_size=40),
    st.integers(0, 6),
    st.booleans(),
)
def test_text_and_end_of_an_output_depend_on_its_tokens_and_not_on_their_arrival(
    text: str, stops: list[str], sizes: list[int], min_new_tokens: int, include: bool
) -> None:
    ids = BYTES.encode(text).ids
    shared = settings(stops, min_new_tokens, include)

    def arrive(sizes: list[int]) -> tuple[dict[int, str], str | None, int]:
        """Return the text out after k tokens for each k seen, what matched, and the tokens taken."""
        output, out, after, at = CandidateOutput(shared, str), "", {}, 0
        for size in [*sizes, len(ids)]:
            new = ids[at : at + size]
            if not new or output.matched:
                break
            piece, taken = output.push(new)
            out, at = out + piece.text, at + taken
            after[at] = out
        after[-1] = out + output.finish().text
        return after, output.matched, output.num_tokens

    single, matched, taken = arrive([1] * len(ids))
    chunked, chunked_matched, chunked_taken = arrive(sizes)

    assert (chunked_matched, chunked_taken) == (matched, taken)
    assert {k: single[k] for k in chunked} == chunked
    if not matched:
        assert single[-1] == text


@pytest.mark.parametrize("include", [False, True])
def test_the_text_of_a_stop_token_is_left_out_unless_wanted(include: bool) -> None:
    (he,) = BYTES.encode("he").ids
    shared = OutputSettings(lambda: BYTES_FACTORY.new([]), None, include, 2, frozenset([he]), omit_text=False)
    output = CandidateOutput(shared, str)

    assert output.push([he, he]) == (OutputPiece("hehe" if include else "he"), 2)  # the first cannot end anything yet


@pytest.mark.parametrize(
    ("make", "token", "text"),
    [
        (byte_level, "he", b"he"),
        (byte_level, "Ã", b"\xc3"),
        (byte_level, "<|end|>", b"<|end|>"),
        (sentencepiece, "▁a", b" a"),
        (sentencepiece, "<0xE2>", b"\xe2"),
        (word_piece, "[PAD]", b"[PAD]"),
        (word_piece, "word", b"word"),
    ],
)
def test_a_token_by_itself_has_its_bytes_and_a_special_one_its_name(make: Any, token: str, text: bytes) -> None:
    tokenizer = make()

    assert DetokenizerFactory(tokenizer).token_bytes(tokenizer.token_to_id(token)) == text


def test_a_character_of_several_tokens_is_held_back_until_it_is_whole_where_neighbours_count() -> None:
    tokenizer = bytes_in_words()
    ids = [tokenizer.token_to_id(token) for token in ("▁a", *(f"<0x{byte:02X}>" for byte in "日".encode()), "b")]

    pieces = pushed(DetokenizerFactory(tokenizer), ids, prompt=(ids[-1],))

    assert pieces == [" a", "", "", "日", "b", ""]
