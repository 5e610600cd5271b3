"""Settings that `octavo chat` and `octavo generate` share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from octavo.services.cli.server_options import ServerConfig

if TYPE_CHECKING:
    from octavo.services.client import GenerationOptions

_SAMPLING = "sampling"
# By the field of the request: what a person typed.
_FLAGS = {
    "generation.stop.max_new_tokens": "--max-tokens",
    "generation.stop.stop_sequences": "--stop",
    "generation.sampling.temperature": "--temperature",
    "generation.sampling.top_p": "--top-p",
    "generation.sampling.top_k": "--top-k",
    "generation.sampling.seed": "--seed",
}


@dataclass(frozen=True, kw_only=True)
class ClientConfig(ServerConfig):
    """Which server, which model, and how it chooses tokens. None means the model's own default."""

    model: str = field(
        default="", metadata={"help": "which model; not needed if the server has one", "metavar": "NAME"}
    )
    system: str = field(
        default="", metadata={"help": "what the model is told before the conversation", "metavar": "TEXT"}
    )
    max_tokens: int | None = field(default=None, metadata={"group": _SAMPLING, "help": "most tokens of an answer"})
    temperature: float | None = field(
        default=None,
        metadata={"group": _SAMPLING, "help": "how freely tokens are chosen; 0 takes the most likely ones"},
    )
    top_p: float | None = field(
        default=None, metadata={"group": _SAMPLING, "help": "choose among the likeliest tokens with this probability"}
    )
    top_k: int | None = field(
        default=None, metadata={"group": _SAMPLING, "help": "choose among so many of the likeliest tokens; 0: all"}
    )
    seed: int | None = field(default=None, metadata={"group": _SAMPLING, "help": "the same seed, the same answer"})
    stop: tuple[str, ...] = field(
        default=(),
        metadata={
            "group": _SAMPLING,
            "help": "a text that ends an answer; can be repeated",
            "metavar": "TEXT",
            "verbatim": True,
        },
    )

    def explain(self, error: Exception) -> str:
        """See ServerConfig; options are called as on the command line."""
        text = super().explain(error)
        for name, flag in _FLAGS.items():
            text = text.replace(name, flag)
        return text

    def options(self) -> GenerationOptions:
        """Return the options that are set, for the client."""
        options: GenerationOptions = {}
        if self.max_tokens is not None:
            options["max_new_tokens"] = self.max_tokens
        if self.temperature is not None:
            options["temperature"] = self.temperature
        if self.top_p is not None:
            options["top_p"] = self.top_p
        if self.top_k is not None:
            options["top_k"] = self.top_k
        if self.seed is not None:
            options["seed"] = self.seed
        if self.stop:
            options["stop"] = self.stop
        return options
