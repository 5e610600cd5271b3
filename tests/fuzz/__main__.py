"""Fuzz a target, guided by coverage.

    python -m tests.fuzz TARGET [-max_total_time=60] [libFuzzer's other flags]
    python -m tests.fuzz all    [-max_total_time=60]: every target in turn, for so long each

Starts from the corpus in tests/fuzz/corpus and adds to it what reaches more code; an input that raises is written to
crash-* in the current folder: put it into the corpus with the fix. Needs atheris: pip install -e ".[fuzz]".
"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["octavo"]):
    from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
MAX_INPUT_BYTES = 4096


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in (*TARGETS, "all"):
        print(f"{__doc__}\nTargets: {', '.join(TARGETS)}")
        return 2
    name, flags = sys.argv[1], sys.argv[2:]
    if name == "all":
        return max(subprocess.call([sys.executable, "-m", "tests.fuzz", each, *flags]) for each in TARGETS)
    logging.disable(logging.CRITICAL)  # thousands of workers are lost
    folder = CORPUS / name
    folder.mkdir(parents=True, exist_ok=True)
    atheris.Setup([sys.argv[0], f"-max_len={MAX_INPUT_BYTES}", *flags, str(folder)], TARGETS[name])
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
