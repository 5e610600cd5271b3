"""Automata of the sequences whose output must match a grammar: they say which tokens may come next.

An automaton advances in a thread as soon as its sequence's token is known, while the next forward
pass runs. Its mask is waited for when that pass has ended, and then not for long: a row whose mask is
late gets no token, and is computed again (`StepResult.token_ids`). So a slow grammar delays itself.

What may be said in a grammar, and whether it is one, is decided before it gets here: by whoever
speaks with clients. Here are only the limits that keep a worker alive.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from octavo.gpu_worker.errors import ModelError, PlanError
from octavo.gpu_worker.ops import UInt32Array
from octavo.gpu_worker.protocol import NOT_READY_TOKEN, NOTHING_ALLOWED_TOKEN, TOO_COMPLEX_TOKEN
from octavo.gpu_worker.sampling.forced import ForcedTexts, Guess
from octavo.gpu_worker.sampling.settings import SamplingSettings
from octavo.gpu_worker.sampling.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

log = logging.getLogger("octavo.worker")

PATIENCE_S = 0.002  # how long a step waits for masks after its forward pass
_POLL_S = 0.0002  # how often to look whether a device still computes
_PROPOSAL_S: Final = 0.0005  # how long a step waits before its forward pass: without, it is computed without guesses
_MOST_DRAWN: Final = 32  # tokens that a guess is compared with
_MOST_SCOUTS: Final = 4.0  # copies of a matcher that guesses may spoil; one takes the longer the longer the output is
_SCOUTS_PER_GUESS: Final = 0.05  # more, with each that is made in time
_MAX_CACHED = 64  # grammars; each takes some MB at most
_NICENESS = 10  # of threads that compile
_NUM_THREADS = 2  # of each kind: those that compile, and those that advance
_SLOW_MASK_S = 0.002  # what takes longer goes on where it disturbs nobody
# What an automaton may take of a core: at once, and more with each token. Usual ones take 20 to 60 us
# for a token, and a few ms the first time that they come to a new place.
_CREDIT_S: Final = 0.25
_CREDIT_PER_TOKEN_S: Final = 0.002


class Grammars:
    """Compiles grammars, and keeps those that were used last. Methods are for one thread.

    What it needs of the tokenizer is prepared in a thread; grammars that come before `prepare` wait for it.
    """

    def __init__(self, read: Callable[[], Vocabulary], vocab_size: int, patience_s: float | None = PATIENCE_S) -> None:
        """read: called once, in a thread. patience_s: see `refusals`."""
        self.patience_s = patience_s
        self._vocab_size = vocab_size
        self._cache: OrderedDict[str, LLMatcher] = OrderedDict()
        self._texts: ForcedTexts | None = None
        self._cache_lock = threading.Lock()
        self._compilers = ThreadPoolExecutor(_NUM_THREADS, "compile grammar", _be_gentle)
        self._workers = ThreadPoolExecutor(_NUM_THREADS, "advance grammar")
        # Not gently: the library keeps the interpreter meanwhile, and a thread that gets no processor would then keep
        # all the others waiting for it.
        self._tokenizer = self._workers.submit(lambda: _make_tokenizer(read()))

    def prepare(self) -> bool:
        """Wait for the tokenizer: no other thread gets on while the library makes it. Return whether there is one."""
        try:
            self._tokenizer.result()
        except ModelError as error:
            log.error("structured output is off: %s", error)
            return False
        return True

    def open(self, settings: SamplingSettings) -> GrammarAutomaton:
        """Return the automaton of a slot, which begins to compile, at the end of the output so far."""
        automaton = GrammarAutomaton(settings, self._vocab_size, self._workers, self._compilers)
        output = settings.history_token_ids[settings.prompt_length :].tolist()
        automaton.ready = self._compilers.submit(self._begin, automaton, settings.grammar, output)
        return automaton

    def are_ready(self, automata: list[Automaton], waited_s: float) -> float:
        """Wait, but not for long, for what some allow after guesses that were right.

        Returns how long the step has waited so far, `waited_s` before: all its guesses have the time of one mask.
        """
        unknown = [automaton.ready for automaton in automata if not automaton.ready.done()]
        if not unknown or (self.patience_s is not None and waited_s >= self.patience_s):
            return waited_s
        began = time.perf_counter()
        wait(unknown, timeout=None if self.patience_s is None else self.patience_s - waited_s)
        return waited_s + time.perf_counter() - began

    def _begin(self, automaton: GrammarAutomaton, grammar: str, output: list[int]) -> None:
        """Compile, in a thread."""
        try:
            tokenizer = self._tokenizer.result()
        except ModelError:  # the scheduler was told that none are taken
            automaton.refusal = NOTHING_ALLOWED_TOKEN
            return
        automaton.begin(self._matcher(grammar, tokenizer), output, self._texts_of(tokenizer))

    def _texts_of(self, tokenizer: LLTokenizer) -> ForcedTexts:
        with self._cache_lock:
            if self._texts is None:
                self._texts = ForcedTexts(tokenizer, self._vocab_size)
            return self._texts

    def _matcher(self, grammar: str, tokenizer: LLTokenizer) -> LLMatcher:
        """Return a matcher at the beginning of a grammar. Copies share what they have learnt of it."""
        from llguidance import LLMatcher

        with self._cache_lock:
            found = self._cache.get(grammar)
            if found is not None:
                self._cache.move_to_end(grammar)
                return found.deep_copy()
        made = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
        with self._cache_lock:
            self._cache[grammar] = made
            if len(self._cache) > _MAX_CACHED:
                self._cache.popitem(last=False)
            return made.deep_copy()


class Automaton(Protocol):
    """What says which tokens may come next, by those of the output. Fields as in `GrammarAutomaton`."""

    is_late: bool

    @property
    def ready(self) -> Future[None]:
        """When done, the others are valid."""

    @property
    def allowed(self) -> UInt32Array:
        """What may come next."""

    @property
    def refusal(self) -> int:
        """Why nothing may, or 0."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end may."""

    def advance(self, token_id: int) -> None:
        """Take the token that was produced."""

    def propose(self, most: int) -> Guess | None:
        """Return what may well come next, up to `most` tokens; None if there is nothing, or no time."""

    def num_allowed(self, token_ids: list[int]) -> int:
        """Return how many of the tokens may follow, one after another, as far as that is known in time."""


class GrammarAutomaton:
    """Where one output is in its grammar. While `ready` is not done, a thread works on it.

    ready        when done, the fields below are valid; raises what only a bug can raise
    allowed      [ceil(vocab_size / 32)] bit t % 32 of word t // 32: token t may come next
    refusal      why no token may, as in `StepResult.token_ids`; 0 if one may
    is_complete  nothing but the end may come
    is_late      its newest row got no token, because it was not ready; not a thread's to change
    """

    def __init__(
        self, settings: SamplingSettings, vocab_size: int, workers: ThreadPoolExecutor, slow: ThreadPoolExecutor
    ) -> None:
        """workers: threads that advance it; slow: those that do while its masks take long."""
        self.ready: Future[None] = Future()
        self.refusal = 0
        self.is_complete = False
        self.is_late = False
        self._matcher: LLMatcher | None = None
        self._texts: ForcedTexts | None = None
        self._scout: LLMatcher | None = None  # at the same place; guesses go ahead with it, and come back
        self._scouts_left = _MOST_SCOUTS
        self._guessing: Future[Guess] | None = None
        self._awaited: Future[None] | None = None  # the last that a step waited for
        self._guess: Guess | None = None  # the last one, and the tokens since
        self._drawn: list[int] = []
        self._last_ids: list[int] = []
        self._workers, self._slow = workers, slow
        self._is_slow = False
        self._credit_s = _CREDIT_S
        self._vocab_size = vocab_size
        # One bit more than tokens: the tokenizer's end, which no model has.
        self._words = np.zeros(vocab_size // 32 + 1, np.uint32)
        self.allowed: UInt32Array = self._words[: -(-vocab_size // 32)]
        self._ends = np.zeros(len(self.allowed), np.uint32)
        ids = settings.end_of_sequence_ids
        np.bitwise_or.at(self._ends, ids // 32, np.uint32(1) << (ids % 32))
        self._end_ids = frozenset(ids.tolist())
        self._permitted = None if settings.forbidden is None else pack_bits(~settings.forbidden)

    def propose(self, most: int) -> Guess | None:
        """Return what the grammar leaves little choice of, up to `most` tokens; None if there is nothing, or no time.

        Waits until it is ready, and then for the guess, but not for long: a thread makes it, as its masks may be slow.
        """
        scout, texts = self._ready_scout(), self._texts
        if scout is None or texts is None or not texts.leaves_little(self.allowed):
            return None
        if self._guess is not None:
            texts.learn(self._guess, self._drawn)
        self._guess, self._drawn = None, []
        before = texts.last_byte(self._last_ids) if self._last_ids else b""
        self._guessing = self._workers.submit(texts.guess, scout, self.allowed, before, most)
        wait([self._guessing], timeout=_PROPOSAL_S)
        if not self._guessing.done():
            return None
        self._scouts_left = min(self._scouts_left + _SCOUTS_PER_GUESS, _MOST_SCOUTS)
        guess = self._guessing.result()
        self._guess = guess if guess.data else None
        return guess if guess.token_ids else None

    def num_allowed(self, token_ids: list[int]) -> int:
        """Return how many of the tokens may follow, one after another; 0 if that is not known in time."""
        scout = self._ready_scout()
        return 0 if scout is None else scout.validate_tokens(token_ids)

    def _ready_scout(self) -> LLMatcher | None:
        """Return the scout, if more of a text may follow and its masks are quick. Waits once for each token."""
        if self._is_slow:
            return None
        if not self.ready.done() and self._awaited is not self.ready:
            self._awaited = self.ready
            wait([self.ready], timeout=_PROPOSAL_S)
        if not self.ready.done() or self.refusal or self.is_complete or self._is_slow:
            return None
        if self._guessing is not None and not self._guessing.done():
            return None
        if self._scout is None and self._matcher is not None and self._scouts_left >= 1:
            self._scouts_left -= 1
            self._scout = self._matcher.deep_copy()
        return self._scout

    def advance(self, token_id: int) -> None:
        """Take the token that was produced; must be ready. Returns at once."""
        if self._guessing is not None and not self._guessing.done():
            self._scout = self._guessing = None  # its thread goes on with it
        self._last_ids = [token_id]
        if self._guess is not None:
            self._drawn.append(token_id)
            if len(self._drawn) > _MOST_DRAWN:
                self._guess = None
        self.ready = (self._slow if self._is_slow else self._workers).submit(self._advance, token_id)

    def begin(self, matcher: LLMatcher, output: list[int], texts: ForcedTexts) -> None:
        """Take the output so far, in a thread."""
        self._matcher, self._texts, self._last_ids = matcher, texts, output[-1:]
        until = next((at for at, token_id in enumerate(output) if token_id in self._end_ids), len(output))
        if until < len(output):
            self._end()
        elif until and not matcher.consume_tokens(output):
            self._refuse(matcher)
        else:
            self._find_allowed(matcher)

    def _advance(self, token_id: int) -> None:
        assert self._matcher is not None, "not begun"
        self._credit_s = min(self._credit_s + _CREDIT_PER_TOKEN_S, _CREDIT_S)
        if token_id in self._end_ids:
            self._end()
        elif not self.refusal:
            if self._matcher.consume_token(token_id):
                if self._scout is not None and not self._scout.consume_token(token_id):
                    self._scout = None  # a guess came to a limit
                self._find_allowed(self._matcher)
            else:
                self._refuse(self._matcher)

    def _find_allowed(self, matcher: LLMatcher) -> None:
        """Fill in what may come next."""
        began = time.thread_time()
        words = self._words
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        took_s = time.thread_time() - began
        self._credit_s -= took_s
        self._is_slow = took_s > _SLOW_MASK_S
        if matcher.is_error():
            self._refuse(matcher)
            return
        if self._credit_s < 0:
            self.refusal = TOO_COMPLEX_TOKEN
            return
        end = np.uint32(1 << self._vocab_size % 32)
        accepts = bool(words[-1] & end)
        words[-1] &= end - np.uint32(1)
        self.is_complete = not words.any()
        if accepts:
            self.allowed |= self._ends
        self._leave_permitted()

    def _end(self) -> None:
        """Nothing but the end may follow the end: it comes again where a minimum length is not reached."""
        self._words[:] = 0
        self.allowed |= self._ends
        self.is_complete = True
        self._leave_permitted()

    def _leave_permitted(self) -> None:
        if self._permitted is not None:
            self.allowed &= self._permitted
        if not self.allowed.any():
            self.refusal = NOTHING_ALLOWED_TOKEN

    def _refuse(self, matcher: LLMatcher) -> None:
        """Say why the matcher has stopped with an error."""
        is_limit = matcher.stop_reason() in ("ParserTooComplex", "LexerTooComplex") or "too " in matcher.get_error()
        self.refusal = TOO_COMPLEX_TOKEN if is_limit else NOTHING_ALLOWED_TOKEN
        log.info("a grammar has stopped: %s", matcher.get_error().split("\n")[0][:200])


class WordFilter:
    """The automaton of a slot with `bad_words`, around that of its grammar if it has one."""

    def __init__(self, settings: SamplingSettings, inner: Automaton | None) -> None:
        assert settings.forbidden is not None, "words come with the tokens that are forbidden"
        self._inner = inner
        self._ready: Future[None] = Future()
        self._ready.set_result(None)
        self.is_late = False
        self._words = settings.bad_words
        self._most = max(map(len, self._words), default=0)
        lengths: dict[int, set[int]] = {}
        for prefix in self._words:
            lengths.setdefault(prefix[-1], set()).add(len(prefix))
        self._lengths = lengths  # of what comes before the words' last tokens, by the last of it
        self._newest = settings.history_token_ids[settings.prompt_length :].tolist()
        self._permitted = pack_bits(~settings.forbidden)
        self._ends = self._ends_now()

    @property
    def ready(self) -> Future[None]:
        """When the grammar's thread is done; at once without one."""
        return self._ready if self._inner is None else self._inner.ready

    @property
    def allowed(self) -> UInt32Array:
        """As of `Automaton`, without the tokens that would end a word."""
        allowed = (self._permitted if self._inner is None else self._inner.allowed).copy()
        for ends in self._ends:
            np.bitwise_and.at(allowed, ends // 32, ~(np.uint32(1) << (ends % 32)))
        return allowed

    @property
    def refusal(self) -> int:
        """As of `Automaton`."""
        if self._inner is not None and self._inner.refusal:
            return self._inner.refusal
        return 0 if self.allowed.any() else NOTHING_ALLOWED_TOKEN

    @property
    def is_complete(self) -> bool:
        """As of `Automaton`."""
        return self._inner is not None and self._inner.is_complete

    def advance(self, token_id: int) -> None:
        """Take the token that was produced."""
        if self._words:
            self._newest.append(token_id)
            del self._newest[: -self._most]
            self._ends = self._ends_now()
        if self._inner is not None:
            self._inner.advance(token_id)

    def _ends_now(self) -> list[UInt32Array]:
        """Return the tokens that would end words, once for each token: there may be words of a hundred lengths."""
        lengths = self._lengths.get(self._newest[-1], ()) if self._newest else ()
        found = (self._words.get(tuple(self._newest[-length:])) for length in lengths)
        return [ends for ends in found if ends is not None]

    def propose(self, most: int) -> Guess | None:
        """As of `Automaton`: a word among the guesses is found when its last token is drawn."""
        return None if self._inner is None else self._inner.propose(most)

    def num_allowed(self, token_ids: list[int]) -> int:
        """As of `Automaton`."""
        return len(token_ids) if self._inner is None else self._inner.num_allowed(token_ids)


def refusals(
    automata: list[Automaton],
    follows: list[bool],
    patience_s: float | None,
    is_computing: Callable[[], bool] = lambda: False,
) -> list[int]:
    """Wait, but not for long, for what each allows; return why its row gets no token, or 0.

    follows       whether the row was computed as if a token had been produced for the one before it. If
                  none was, because its mask was late, this one is of no use.
    patience_s    how long to wait after the forward pass; None: as long as it takes
    is_computing  whether the forward pass goes on: until its end, waiting costs nothing
    """
    useful = [not (automaton.is_late and after) for automaton, after in zip(automata, follows, strict=True)]
    waiting = [
        automaton.ready
        for automaton, is_useful in zip(automata, useful, strict=True)
        if is_useful and not automaton.ready.done()
    ]
    while waiting and is_computing():
        waiting = list(wait(waiting, timeout=_POLL_S).not_done)
    if waiting:
        wait(waiting, timeout=patience_s)
    codes = []
    for automaton, is_useful in zip(automata, useful, strict=True):
        automaton.is_late = not is_useful or not automaton.ready.done()
        if not automaton.is_late:
            automaton.ready.result()  # raises what went wrong
        codes.append(NOT_READY_TOKEN if automaton.is_late else automaton.refusal)
    return codes


def make_grammars(
    read: Callable[[], Vocabulary] | None, vocab_size: int, patience_s: float | None = PATIENCE_S
) -> Grammars | None:
    """Return what compiles grammars, or None, with a warning, where that cannot be; arguments as in `Grammars`."""
    if read is None:
        log.warning("structured output is off: the model has no tokenizer.json")
        return None
    if importlib.util.find_spec("llguidance") is None:
        log.warning("structured output is off: it needs the package llguidance")
        return None
    return Grammars(read, vocab_size, patience_s)


def open_automaton(grammars: Grammars | None, settings: SamplingSettings) -> Automaton | None:
    """Return the automaton of a slot, if it needs one. Raises PlanError if there is nothing to make it with."""
    if not settings.is_constrained:
        return None
    if settings.grammar and grammars is None:
        raise PlanError("sampling_updates: grammar is set, but this worker takes none")
    inner = grammars.open(settings) if settings.grammar and grammars is not None else None
    return inner if inner is not None and not settings.bad_words else WordFilter(settings, inner)


def pack_bits(flags: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> UInt32Array:
    """Return flags [N] as bits, lowest first, in words [ceil(N / 32)]."""
    packed = np.zeros(-(-len(flags) // 32) * 4, np.uint8)
    bits = np.packbits(flags, bitorder="little")
    packed[: len(bits)] = bits
    return packed.view("<u4").astype(np.uint32)


def _make_tokenizer(vocabulary: Vocabulary) -> LLTokenizer:
    """Return the vocabulary as the library wants it, with an end of its own after the last token."""
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Tokens(vocabulary)))


class _Tokens:
    """What llguidance asks of a tokenizer. It is never asked to encode: see `no_forcing` in the grammars."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = len(vocabulary.tokens)
        self.tokens = [*vocabulary.tokens, b"<end>"]
        self.special_token_ids = [*vocabulary.special_token_ids, self.eos_token_id]

    def __call__(self, _text: str | bytes) -> list[int]:
        """Return no tokens."""
        return []


def parser_limits() -> LLParserLimits:
    """Return what keeps one grammar from taking a worker's memory, and masks from taking seconds.

    Gateways try grammars out with the same ones (`services/gateway/constraints/process.py`).
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=10_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def _be_gentle() -> None:
    """Weigh a tenth of a thread that computes steps. On Linux a thread has a niceness of its own.

    The lowest policy, SCHED_IDLE, does hardly less harm, but a grammar that takes 0.1 s to compile took 1.5 s where
    steps take all cores.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
