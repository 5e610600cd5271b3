"""What is to be computed, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from octavo.services.scheduler.sequence import Sequence
from octavo.services.scheduler.worker_group import WorkerGroup


@dataclass(slots=True)
class Work:
    """Tokens of prompts, and tokens of outputs as far as they are expected."""

    prompt: int = 0
    output: int = 0

    @classmethod
    def of(cls, seq: Sequence) -> Work:
        """Return that of a sequence that waits."""
        return cls(len(seq.tokens), seq.num_expected_left)

    @property
    def tokens(self) -> int:
        """Both together: what tenants are charged for."""
        return self.prompt + self.output

    def add(self, other: Work) -> None:
        """Add the work of another one."""
        self.prompt += other.prompt
        self.output += other.output

    def remove(self, other: Work) -> None:
        """Take away what was added."""
        self.prompt -= other.prompt
        self.output -= other.output


@dataclass(frozen=True, slots=True)
class Prices:
    """What tokens cost, in seconds of all workers: a prompt's share a step with others, an output's take one each."""

    prompt_s: float
    output_s: float

    @classmethod
    def of(cls, groups: Iterable[WorkerGroup]) -> Prices:
        """Return those of groups that run as many sequences as they can; 0 if nothing is known yet."""
        prompts_per_s = outputs_per_s = 0.0
        for group in groups:
            num_running, cost = max(group.num_running, 1), group.cost
            if step_s := cost.seconds(num_running):
                outputs_per_s += num_running / step_s
            if token_s := cost.token_s:
                prompts_per_s += 1 / token_s
        return cls(1 / prompts_per_s if prompts_per_s else 0.0, 1 / outputs_per_s if outputs_per_s else 0.0)

    def seconds(self, work: Work) -> float:
        """Return what work costs."""
        return work.prompt * self.prompt_s + work.output * self.output_s
