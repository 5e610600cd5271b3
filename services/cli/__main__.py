"""Finds the command that a person typed and runs it."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

# Name: (module with `main(argv) -> int`, what it does).
COMMANDS = {
    "serve": ("octavo.services.cli.serve", "serve a model on this machine: starts all processes and looks after them"),
    "chat": ("octavo.services.cli.chat", "talk to a server in the terminal"),
    "generate": ("octavo.services.cli.generate", "stream one answer to standard output"),
    "batch": ("octavo.services.cli.batch", "answer the requests of a file"),
    "top": ("octavo.services.cli.top", "show what a server does right now"),
    "bench": ("octavo.services.cli.bench", "measure a server as its clients see it"),
    "health": ("octavo.services.cli.health", "ask whether a process is well, for probes and after an installation"),
    "model": ("octavo.services.cli.model", "fetch a model into a folder, seal it with checksums, verify it"),
    "keys": ("octavo.services.cli.keys", "make API keys, and keys for the hop between hosts"),
    "gateway": ("octavo.services.cli.one_process", "run one gateway process"),
    "scheduler": ("octavo.services.cli.one_process", "run one scheduler process"),
    "worker": ("octavo.services.cli.one_process", "run one worker process"),
    "version": ("octavo.services.cli.version", "show the version"),
}

USAGE = f"""usage: octavo COMMAND [options]

Serves large language models over gRPC.

commands:
{chr(10).join(f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items())}

Start with:
  octavo serve demo        a small model, downloaded once; demo-embed is one for embeddings
  octavo chat              in another terminal

`octavo COMMAND --help` shows a command's options.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: this process's arguments) names; return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if name in ("-V", "--version"):
        name = "version"
    if name not in COMMANDS:
        print(USAGE if not name else f"octavo: {_unknown(name)}", end="\n" if name else "", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[name][0])
    try:
        # The processes share a module, so each command gets its name too.
        status: int = module.main([name, *arguments[1:]])
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output is gone, as in `octavo generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        return 141
    return status


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean `octavo {near[0]}`?" if near else "`octavo --help` lists the commands"
    return f"unknown command {name!r}; {hint}"


if __name__ == "__main__":
    raise SystemExit(main())
