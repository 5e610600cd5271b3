"""What a benchmark sends: texts from `workloads/`, drawn so that a seed names them.

Prompts are plain text and are sent as such, so that every server gets the same work whatever its
chat template is; how many tokens they are is the server's to say.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent / "workloads"
_CHARACTERS_PER_TOKEN = 4.1  # of these texts, for SmolLM2's tokenizer; only aims at a length

PREFILL_TOKENS = 2048
PREFIX_TOKENS = 1024
PREFIX_QUESTIONS = 32
PREFIX_OUTPUT_TOKENS = 32


@dataclass(frozen=True)
class Prompt:
    """One request: its text, and how many tokens to produce (exactly: ends of sequence are ignored)."""

    text: str
    max_tokens: int


def chat(count: int, seed: str, max_tokens: int = 0, path: Path = _FOLDER / "chat.jsonl") -> list[Prompt]:
    """Return `count` one-turn prompts, about 140 tokens on average; `max_tokens` 0 takes each row's own.

    `path` names a JSONL file with `messages` (or `prompt`) and `max_tokens` in each row. Raises
    ValueError for a file without usable rows.
    """
    rows = _rows(path)
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    chosen = [rows[order[number % len(rows)]] for number in range(count)]
    return [Prompt(_text(row, path), max_tokens or _output_tokens(row, path)) for row in chosen]


def prefill(count: int, seed: str, tokens: int = PREFILL_TOKENS) -> list[Prompt]:
    """Return `count` different documents of about `tokens` tokens, with one token of output each."""
    path = _FOLDER / "summarise.jsonl"
    paragraphs = [paragraph for row in _rows(path) for paragraph in _text(row, path).split("\n\n")]
    rng = random.Random(seed)
    return [Prompt(_long_text(paragraphs, rng, tokens), 1) for _ in range(count)]


def shared_prefix(seed: str, questions: int = PREFIX_QUESTIONS) -> list[Prompt]:
    """Return prompts that share about 1,024 tokens, new for each seed, before about 32 of their own."""
    (document,) = prefill(1, f"prefix {seed}", PREFIX_TOKENS)
    asked = chat(questions, f"questions {seed}")
    own = int(32 * _CHARACTERS_PER_TOKEN)
    return [Prompt(f"{document.text}\n\nQuestion: {prompt.text[:own]}", PREFIX_OUTPUT_TOKENS) for prompt in asked]


def _long_text(paragraphs: Sequence[str], rng: random.Random, tokens: int) -> str:
    """Join paragraphs in a random order up to a length; a first line makes each text new to a prefix cache.

    Paragraphs of all documents: a single document has between 3 and 6 characters a token.
    """
    length = int(tokens * _CHARACTERS_PER_TOKEN)
    text = f"Document {rng.getrandbits(64):016x}.\n"
    while len(text) < length:
        text += rng.choice(paragraphs) + "\n\n"
    return text[:length]


def _rows(path: Path) -> list[dict[str, object]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read prompts from {path}: {error}") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold one JSON object on each line, with messages or prompt")
    return rows


def _output_tokens(row: dict[str, object], path: Path) -> int:
    count = row.get("max_tokens", 128)
    if not isinstance(count, int) or not 0 < count < 1 << 20:
        raise ValueError(f"{path}: max_tokens must be a positive whole number, not {count!r}")
    return count


def _text(row: dict[str, object], path: Path) -> str:
    if isinstance(prompt := row.get("prompt"), str):
        return prompt
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{path}: a row has neither prompt nor messages")
    return "\n\n".join(str(message["content"]) for message in messages)
