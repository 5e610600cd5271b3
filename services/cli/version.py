"""`octavo version`."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence

from octavo import __version__


def main(argv: Sequence[str]) -> int:
    """Print the version; `argv[0]` is the command's name."""
    if argv[1:] and argv[1:] != ["--help"]:
        print(f"octavo version: unexpected argument {argv[1]}", file=sys.stderr)
        return 2
    print(f"octavo {__version__} (Python {platform.python_version()}, {platform.system()} {platform.machine()})")
    return 0
