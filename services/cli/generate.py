"""`octavo generate PROMPT`: one answer, streamed to standard output."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from octavo.services.cli import server_options, terminal
from octavo.services.cli.server_options import ClientConfig


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(ClientConfig):
    """Settings of `octavo generate`."""

    prompt: str = field(metadata={"positional": True, "help": "what to answer; - reads it from standard input"})
    raw: bool = field(
        default=False, metadata={"help": "continue PROMPT as plain text instead of answering it as a chat"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.raw and self.system:
            raise ValueError("--system needs a chat: leave --raw out")


def main(argv: Sequence[str]) -> int:
    """Stream one answer; `argv[0]` is the command's name. Return 1, with one line on stderr, if that fails."""
    config = server_options.load(
        GenerateConfig, argv[1:], prog="octavo generate", description="Streams one answer to standard output."
    )
    prompt = terminal.read_all() if config.prompt == "-" else terminal.as_text(config.prompt)
    if not prompt.strip():
        print("octavo generate: the prompt is empty", file=sys.stderr)
        return 2
    return asyncio.run(_generate(config, prompt))


async def _generate(config: GenerateConfig, prompt: str) -> int:
    from octavo.services.client import OctavoError

    system = [{"role": "system", "content": config.system}] if config.system else []
    messages = [*system, {"role": "user", "content": prompt}]
    last = ""
    async with config.client() as client:
        try:
            stream = (
                client.stream(prompt, model=config.model, **config.options())
                if config.raw
                else client.stream(messages=messages, model=config.model, **config.options())
            )
            async with stream:
                async for delta in stream:
                    terminal.write(delta.text)
                    last = delta.text or last
        except (OctavoError, ValueError, TypeError) as error:
            if last:
                terminal.write("\n")
            print(f"octavo generate: {config.explain(error)}", file=sys.stderr)
            return 1
    if not last.endswith("\n"):
        terminal.write("\n")
    return 0
