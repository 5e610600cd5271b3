"""Tries constraints out: what the forks of a limited process do (see `limited_server`).

The frame that sets it up is JSON that says what the vocabulary is. Then each request is JSON, `{"kind", "value",
"continued"}`, the last one in base64 of uint32, and is answered with `{"grammar"}` or `{"error", "place"}`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import random
import re
import time
from array import array
from typing import TYPE_CHECKING, Any

from octavo.services.gateway.constraints.grammar import (
    HEADER,
    ConstraintError,
    children,
    grammar_of,
    grammar_of_schema,
    read_schema,
    without_format,
)
from octavo.services.gateway.offload.limited_server import Answer, Limits, serve

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# A niceness of 5 is a third of what a worker's thread weighs. With the lowest policy (SCHED_IDLE) it would do even less
# harm, but 0.2 s of processor time took a second and more beside a worker that computes on all cores.
LIMITS = Limits(cpu_s=0.2, wall_s=5.0, memory=512 << 20, niceness=5)
_UNIMPLEMENTED = re.compile(r"Unimplemented keys: \[(.*?)\]")
_ADVICE = {"uniqueItems": "leave it out (in Python's types: list in place of set), and drop what comes twice"}
_TRIAL_TOKENS = 24
_MAX_MASK_S = 0.05
_MAX_UNKNOWN_FORMATS = 16
TOO_LONG = f"it takes more than {LIMITS.cpu_s:g} s of processor time: make it simpler"
TOO_LARGE = "it takes too much memory, or is nested too deeply: make it simpler"


def main() -> None:
    """Serve until stdin ends."""
    serve(_set_up, LIMITS)


def _set_up(first: bytes) -> tuple[Answer, bytes]:
    vocabulary = json.loads(first)
    tokenizer = make_tokenizer([name.encode("latin-1") for name in vocabulary["tokens"]], vocabulary["special"])
    for kind, value in (("json_schema", '{"type": "object"}'), ("regex", "[a-z]+")):
        with contextlib.suppress(ConstraintError):  # a vocabulary may have no braces
            try_out(kind, value, [], tokenizer)  # what is made ready once is inherited by forks
    return lambda request: json.dumps(_answer(json.loads(request), tokenizer)).encode(), b""


# -- in a fork -------------------------------------------------------------------------------------


def _answer(request: dict[str, Any], tokenizer: LLTokenizer) -> dict[str, Any]:
    try:
        continued = array("I", base64.b64decode(request["continued"])).tolist()
        return {"grammar": try_out(request["kind"], request["value"], continued, tokenizer)}
    except ConstraintError as error:
        return {"error": error.message, "place": error.place}
    except (MemoryError, RecursionError):
        return {"error": TOO_LARGE, "place": ""}


def try_out(kind: str, value: Any, continued: list[int], tokenizer: LLTokenizer) -> str:
    """Return the grammar of a constraint that a worker can keep to. Raises ConstraintError.

    continued  output tokens that must match the beginning
    """
    grammar = grammar_of(kind, value)
    matcher = _matcher(tokenizer, grammar)
    if matcher.is_error() and kind == "json_schema":
        schema = read_schema(value)
        for _ in range(_MAX_UNKNOWN_FORMATS):
            shorter = without_format(schema, matcher.get_error())
            if shorter is None:
                break
            schema, grammar = shorter, grammar_of_schema(shorter)
            matcher = _matcher(tokenizer, grammar)
        if matcher.is_error():
            raise ConstraintError(_words(matcher.get_error()), _place(tokenizer, schema, matcher.get_error()))
    if matcher.is_error():
        message = _words(matcher.get_error())
        raise ConstraintError(message, _line(matcher.get_error()) if kind == "grammar" else "")
    _walk(matcher, continued)
    return grammar


def _matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    from llguidance import LLMatcher

    return LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())


def parser_limits() -> LLParserLimits:
    """Return the limits of the workers (`gpu_worker/sampling/grammars.py`): what passes here passes there."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=10_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def _walk(matcher: LLMatcher, continued: list[int]) -> None:
    """Follow the output so far, and then a few tokens at random, to meet what would be slow in a worker."""
    for number in range(_TRIAL_TOKENS):
        began = time.thread_time()
        mask = matcher.compute_bitmask()
        if time.thread_time() - began > _MAX_MASK_S:
            raise ConstraintError("it takes too long to follow: make it simpler")
        if matcher.is_error() and "too " in matcher.get_error():
            raise ConstraintError(f"too complex: {_words(matcher.get_error())}")
        if number == 0 and (matcher.is_error() or not any(mask)):
            raise ConstraintError("no text matches it")
        if number == 0 and continued and not matcher.consume_tokens(continued):
            raise ConstraintError("the output that is continued does not match it", "continue_output")
        if number or not continued:
            token_id = _any_bit(mask)
            if matcher.is_error() or matcher.is_stopped() or token_id is None or not matcher.consume_token(token_id):
                return


_random = random.Random(0)


def _any_bit(mask: bytes) -> int | None:
    """Return a bit that is set, of the first byte that has one from a random place on; None if there is none."""
    start = _random.randrange(len(mask))
    rest = (mask[start:] + mask[:start]).lstrip(b"\0")
    if not rest:
        return None
    place = (start + len(mask) - len(rest)) % len(mask)
    return place * 8 + _random.choice([bit for bit in range(8) if mask[place] >> bit & 1])


def _place(tokenizer: LLTokenizer, schema: dict[str, Any], error: str) -> str:
    """Return the JSON pointer of the innermost schema that has the same error by itself."""
    definitions: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    pointer, part = "#", schema
    while True:
        for at, child in children(part):
            alone = _matcher(tokenizer, grammar_of_schema({**definitions, **child}))
            if at.startswith(("/$defs", "/definitions")):
                alone = _matcher(tokenizer, grammar_of_schema(child))
            if alone.is_error() and _words(alone.get_error()) == _words(error):
                pointer, part = pointer + at, child
                break
        else:
            return pointer


def _words(error: str) -> str:
    """Return an engine's error without the engine's view of the source."""
    text = error.split("<state>")[0].split("\n   1 | ")[0]
    if unimplemented := _UNIMPLEMENTED.search(text):
        names = unimplemented[1].replace('"', "")
        advice = _ADVICE.get(names, "leave it out, and check it in the answer")
        return f"{names} cannot be kept to while tokens are drawn; {advice}"
    for _ in range(2):
        text = text.split(": ", 1)[1] if text.startswith(("at ", "failed to compile JSON schema: ")) else text
    return " ".join(text.split())[:300]


def _line(error: str) -> str:
    """Return where in the client's own text an engine's error is."""
    if not error.startswith("at "):
        return ""
    line, _, rest = error[3:].partition("(")
    column = rest.partition(")")[0]
    own = int(line) - HEADER.count("\n") if line.isdigit() else 0
    return f"line {own}, column {column}" if own > 0 else ""


def make_tokenizer(tokens: list[bytes], special_token_ids: list[int]) -> LLTokenizer:
    """Return a vocabulary as the engine wants it, with an end of its own after the last token."""
    from llguidance import LLTokenizer, TokenizerWrapper

    class Tokens:
        eos_token_id = len(tokens)
        bos_token_id = None

        def __init__(self) -> None:
            self.tokens = [*tokens, b"<end>"]
            self.special_token_ids = [*special_token_ids, len(tokens)]

        def __call__(self, _text: str | bytes) -> list[int]:
            return []  # never needed: see HEADER

    return LLTokenizer(TokenizerWrapper(Tokens()))


if __name__ == "__main__":
    main()
