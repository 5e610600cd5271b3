"""What waits to be computed, counted."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.services.scheduler.sequence import Sequence


@dataclass(slots=True)
class Work:
    """Tokens of prompts, tokens of outputs as far as they are expected, and in how many sequences."""

    prompt: int = 0
    output: int = 0
    sequences: int = 0

    @classmethod
    def of(cls, seq: Sequence) -> Work:
        """Return that of a sequence that waits."""
        return cls(len(seq.tokens), seq.num_expected_left, 1)

    @property
    def tokens(self) -> int:
        """Both kinds together: what tenants are charged for."""
        return self.prompt + self.output

    def add(self, other: Work) -> None:
        """Add the work of others."""
        self.prompt += other.prompt
        self.output += other.output
        self.sequences += other.sequences

    def remove(self, other: Work) -> None:
        """Take away what was added."""
        self.prompt -= other.prompt
        self.output -= other.output
        self.sequences -= other.sequences
