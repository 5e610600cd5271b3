"""Finds stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """The stop strings of a request, compiled: an automaton that all its candidates share.

    Each state is the longest start of a stop string that the text ends with. So its depth is how
    much text must be held back, and one step for each character finds the match that ends first.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        assert all(strings), "an empty stop string matches everywhere"
        self.strings = tuple(strings)
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        self.match: list[int] = [-1]  # state -> first string in the list that ends here, or -1
        self.held: list[int] = [0]  # state -> characters that may become a match
        for index, string in enumerate(self.strings):
            self._add(index, string)
        self._link()

    def _add(self, index: int, string: str) -> None:
        state = 0
        for depth, character in enumerate(string, start=1):
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._fail.append(0)
                self.match.append(-1)
                self.held.append(depth)
            state = self._next[state][character]
        if self.match[state] < 0:
            self.match[state] = index

    def _link(self) -> None:
        """Point each state to its longest proper suffix that is a state, breadth first."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            fail = self._fail[state]
            ending = [index for index in (self.match[state], self.match[fail]) if index >= 0]
            self.match[state] = min(ending, default=-1)
            if not self._next[state]:  # no string goes on from here: only a suffix can still become a match
                self.held[state] = self.held[fail]
            for character, child in self._next[state].items():
                self._fail[child] = self.step(fail, character)
                queue.append(child)

    def step(self, state: int, character: str) -> int:
        """Return the state after one more character."""
        following = self._next
        while state and character not in following[state]:
            state = self._fail[state]
        return following[state].get(character, 0)


class StopMatcher:
    """Watches the text of one candidate.

    Of several matches the one that ends first counts, and of those that end together the one that
    stands first in the list.
    """

    __slots__ = ("_held", "_state", "_strings", "matched", "rest")

    def __init__(self, strings: StopStrings) -> None:
        self._strings = strings
        self._state = 0
        self._held = ""
        self.matched: str | None = None
        self.rest = ""
        """What followed the match in its piece."""

    def push(self, text: str, counts: bool, include: bool) -> str:
        """Take the next piece of text; return the text that is settled now.

        counts: a match that ends in this piece counts. Until min_new_tokens are out, none does.
        include: the settled text contains the match.
        After a match `matched` is set, the rest of the piece is in `rest`, and nothing may follow.
        """
        assert self.matched is None, "text after the end"
        strings, state = self._strings, self._state
        for position, character in enumerate(text, start=1):
            state = strings.step(state, character)
            if counts and strings.match[state] >= 0:
                self.matched = strings.strings[strings.match[state]]
                whole = self._held + text[:position]
                self._held = ""
                self.rest = text[position:]
                return whole if include else whole[: len(whole) - len(self.matched)]
        self._state = state
        whole = self._held + text
        settled = len(whole) - strings.held[state]
        self._held = whole[settled:]
        return whole[:settled]

    def finish(self) -> str:
        """Return the text that was held back: nothing can match any more."""
        held, self._held = self._held, ""
        return held
