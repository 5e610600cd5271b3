"""Finds the command that a person typed and runs it."""

from __future__ import annotations

import difflib
import errno
import importlib
import io
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
    "admin": ("octavo.services.cli.admin", "operate a process: drain it, list and end requests, set quotas ..."),
    "bench": ("octavo.services.cli.bench", "measure a server as its clients see it"),
    "health": ("octavo.services.cli.health", "ask whether a process is well, for probes and after an installation"),
    "model": (
        "octavo.services.cli.model",
        "check whether a model is served; fetch, seal and verify one",
    ),
    "keys": ("octavo.services.cli.keys", "make API keys, and keys for the hop between hosts"),
    "gateway": ("octavo.services.cli.one_process", "run one gateway process"),
    "scheduler": ("octavo.services.cli.one_process", "run one scheduler process"),
    "worker": ("octavo.services.cli.one_process", "run one worker process"),
    "version": ("octavo.services.cli.version", "show the version"),
}

_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a locale without a character ends nothing
    module = importlib.import_module(COMMANDS[name][0])
    try:
        # The processes share a module, so each command gets its name too.
        status: int = module.main([name, *arguments[1:]])
        if sys.stdout is not None:  # it can be closed from the start
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output is gone, as in `octavo generate ... | head`
        _drop_output()
        return 141
    except OSError as error:
        if error.errno not in _CANNOT_WRITE or error.filename is not None:
            raise
        _drop_output()
        print(f"octavo {name}: cannot write the output: {error.strerror}", file=sys.stderr)
        return 1
    return status


def _drop_output() -> None:
    """Have what is still buffered go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean `octavo {near[0]}`?" if near else "`octavo --help` lists the commands"
    return f"unknown command {name!r}; {hint}"


if __name__ == "__main__":
    raise SystemExit(main())
