"""What computes the steps of an epoch.

A step is started, and its result is collected later: a device that works on its own has the next
step ready when it ends one. Steps are collected in the order in which they were started.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from octavo.gpu_worker.ops import LoraPair, UInt32Array
from octavo.gpu_worker.sampling.sampler import Sampled
from octavo.gpu_worker.steps.batch import Step
from octavo.gpu_worker.steps.pooler import Vectors

MAX_STEPS_IN_FLIGHT = 2


class Guesses(NamedTuple):
    """See `Guesses` in worker.proto."""

    proposer: str
    drafted: int
    accepted: int
    time_us: int


@dataclass(frozen=True)
class Outcome:
    """What a step made, and what it took. Of a model that makes vectors nothing is sampled.

    token_counts  as `StepResult.token_counts`; None if it is empty
    guesses       as `StepResult.guesses`
    """

    sampled: Sampled
    forward_us: int
    sample_us: int
    vectors: Vectors | None = None
    token_counts: UInt32Array | None = None
    guesses: tuple[Guesses, ...] = ()


class Running(Protocol):
    """A step that was started."""

    def is_done(self) -> bool:
        """Tell whether `wait` would return at once."""

    def wait(self) -> Outcome:
        """Return what the step made; called once. Raises what went wrong in it."""


class Runner(Protocol):
    """A device with all that plans refer to: block tables, sampling settings, last tokens.

    scores_prompts  slots may ask for log probabilities of their prompts
    max_row_tokens  most tokens that a step makes of a row
    kv_windows      the window of each KV group
    """

    name: str
    kv_windows: tuple[int, ...]
    scores_prompts: bool
    max_row_tokens: int

    def kv_block_bytes(self) -> int:
        """Bytes that one block of 16 tokens takes, over all layers, keys and values; 0 if there is no cache."""

    def kv_memory_bytes(self) -> int:
        """Bytes for the KV cache where the settings do not say."""

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocate the zeroed cache, block 0 (never read as data) included. Called once."""

    def memory_used_bytes(self) -> int:
        """Memory in use where the weights and the cache are; 0 if unknown."""

    def progress(self) -> int:
        """A number that grows with every piece of a step that is done, many times in a step; 0: it cannot tell.

        Called by another thread while a step is started or waited for.
        """

    def reset(self) -> None:
        """Forget every slot and drop the steps in flight; weights and KV memory stay."""

    def close(self) -> None:
        """Give back all memory, weights included; nothing else may be called then."""

    def start(self, step: Step) -> Running:
        """Start a step, with at most MAX_STEPS_IN_FLIGHT not yet collected. Raises what went wrong."""

    def adapter_modules(self) -> dict[str, tuple[int, int]]:
        """See `ops.Device`; so are the others. Empty: no slot may have an adapter."""

    def pack_adapter(self, pairs: Iterable[LoraPair]) -> Any:
        """Called by another thread, also while a step is started or waited for."""

    def set_adapter(self, adapter_id: int, packed: Any | None) -> None:
        """Called between the starts of steps."""

    def use_idle_time(self) -> bool:
        """Prepare a piece of what makes later steps faster; False if there is none left."""
