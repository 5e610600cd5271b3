"""Plant bugs, one at a time in a copy of this checkout, and see which ones the tests notice.

    python -m tests.planted [WORD ...]

Each bug of bugs.py is one edit, and names the tests that are run with it. With words, only bugs with one
of them in their name or file are planted. The status is 1 if a bug got away, or its edit or its tests are out of date.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .bugs import BUGS, Bug

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300  # of a test: a bug may make it hang, and the first use of what is compiled takes a minute
CAUGHT, GOT_AWAY = "caught", "GOT AWAY"


def main() -> int:
    words = sys.argv[1:]
    bugs = [bug for bug in BUGS if not words or any(word in f"{bug.name} {bug.file}" for word in words)]
    num_caught = 0
    with tempfile.TemporaryDirectory(prefix="octavo-planted-") as folder:
        copy = Path(folder) / "octavo"
        copy_checkout(copy)
        for number, bug in enumerate(bugs, start=1):
            started = time.monotonic()
            outcome, reason = plant(bug, copy)
            num_caught += outcome == CAUGHT
            took = f"{time.monotonic() - started:.0f} s"
            print(f"{number}/{len(bugs)} {outcome}: {bug.name} ({bug.file}), {took}: {reason}", flush=True)
    print(f"{num_caught} of {len(bugs)} caught")
    return int(num_caught < len(bugs))


def copy_checkout(target: Path) -> None:
    """Copy what git knows or would take, as it is now."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(command, cwd=ROOT, text=True).split("\0"):
        if name and os.path.lexists(ROOT / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


def plant(bug: Bug, copy: Path) -> tuple[str, str]:
    """Run a bug's tests with it; return what became of it, and what showed that."""
    file = copy / bug.file
    text = file.read_text()
    if text.count(bug.old) != 1:
        return "OUT OF DATE", f"its text is there {text.count(bug.old)} times"
    file.write_text(text.replace(bug.old, bug.new))
    try:
        return run_tests(bug, copy)
    finally:
        file.write_text(text)


def run_tests(bug: Bug, copy: Path) -> tuple[str, str]:
    environment = os.environ | {"PYTHONPATH": f"{copy / 'src'}:{copy}", "PYTHONDONTWRITEBYTECODE": "1"}
    if bug.file.endswith((".cpp", ".h")):  # what is compiled of it stays out of the user's cache
        environment["XDG_CACHE_HOME"] = str(copy.parent / "cache")
    if any("/interpreted/" in test for test in bug.tests):
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"--timeout={TIMEOUT_S}"]
    command += [f"--basetemp={copy.parent / 'tmp'}", *bug.tests]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    if found := re.search(r"^(?:FAILED|ERROR) (tests/.*)$", done.stdout, re.MULTILINE):
        last = found[1] + (", which hung" if "Failed: Timeout (>" in done.stdout else "")
    if done.returncode == 0:
        return GOT_AWAY, last
    return (CAUGHT, last) if done.returncode == 1 else ("BROKEN", last)


if __name__ == "__main__":
    sys.exit(main())
