"""Stop strings across pieces of text."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from octavo.services.gateway.output.stop_matcher import StopMatcher, StopStrings

LETTERS = "aab\u20ac"
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=5), min_size=1, max_size=4)
PIECES = st.lists(st.text(LETTERS, max_size=6), max_size=12)


def run(
    stops: list[str], pieces: list[str], include: bool = False, first_counting: int = 0
) -> tuple[list[str], str | None]:
    """Return the text released after each piece (and at the end), and what matched."""
    matcher = StopMatcher(StopStrings(stops))
    released = []
    for index, piece in enumerate(pieces):
        released.append(matcher.push(piece, index >= first_counting, include))
        if matcher.matched is not None:
            return released, matcher.matched
    return [*released, matcher.finish()], None


def naive(stops: list[str], pieces: list[str], include: bool, first_counting: int) -> tuple[str, str | None]:
    """Search the whole text after each piece: the first end that counts, then the first in the list."""
    whole = "".join(pieces)
    start = len("".join(pieces[:first_counting]))
    for end in range(start + 1, len(whole) + 1):
        for stop in stops:
            if whole[:end].endswith(stop):
                return whole[: end if include else end - len(stop)], stop
    return whole, None


@given(STOPS, PIECES, st.booleans(), st.integers(0, 4))
def test_it_finds_what_a_search_in_the_whole_text_finds(
    stops: list[str], pieces: list[str], include: bool, first_counting: int
) -> None:
    released, matched = run(stops, pieces, include, first_counting)

    assert ("".join(released), matched) == naive(stops, pieces, include, first_counting)


@given(STOPS, st.text(LETTERS, max_size=30), st.lists(st.integers(0, 30), max_size=5), st.booleans())
def test_what_is_out_does_not_depend_on_how_the_text_was_cut(
    stops: list[str], text: str, cuts: list[int], include: bool
) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(bounds)]

    assert "".join(run(stops, pieces, include)[0]) == "".join(run(stops, list(text), include)[0])


@given(STOPS, PIECES)
def test_no_more_is_held_back_than_may_become_a_match(stops: list[str], pieces: list[str]) -> None:
    matcher = StopMatcher(StopStrings(stops))
    text = out = ""
    for piece in pieces:
        text += piece
        out += matcher.push(piece, False, False)
        held = text[len(out) :]
        longest = max((n for s in stops for n in range(len(s)) if text.endswith(s[:n])), default=0)
        assert len(held) == longest


def test_the_match_that_ends_first_wins_and_then_the_first_in_the_list() -> None:
    assert run(["bcd", "c"], ["abcd"]) == (["ab"], "c")
    assert run(["abc", "bc"], ["xabc"]) == (["x"], "abc")
    assert run(["bc", "abc"], ["xabc"]) == (["xa"], "bc")


def test_a_match_across_pieces_is_found_and_included_if_wanted() -> None:
    assert run(["STOP"], ["one S", "T", "OP two"]) == (["one ", "", ""], "STOP")
    assert run(["STOP"], ["one S", "T", "OP two"], include=True) == (["one ", "", "STOP"], "STOP")


def test_a_start_that_came_to_nothing_is_released_at_once() -> None:
    assert run(["STOP"], ["ST", "AY"]) == (["", "STAY", ""], None)
    assert run(["STOP"], ["ST"]) == (["", "ST"], None)
