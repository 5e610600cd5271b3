"""Run the simulation from the command line.

    python -m tests.simulation [--seeds 10000] [--first 0] [--seconds 0] [--processes 1]

Prints how many seeds and events ran, how fast, and which faults were met; of requests with a deadline
how many were in time, late or refused, and how many of the refused ones would have been in time
if nobody had been refused. A failing seed is printed with the commit, what it broke and the
shortest script that still breaks it, and the status is 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from .run import run_in_processes, run_seeds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10_000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seconds", type=float, default=0.0, help="stop after so long; 0: only when all have run")
    parser.add_argument("--processes", type=int, default=1, help="that run seeds at the same time")
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.seeds)
    max_seconds = options.seconds or float("inf")
    if options.processes > 1:
        summary = run_in_processes(seeds, options.processes, max_seconds)
    else:
        summary = run_seeds(seeds, max_seconds)
    print(
        f"{summary.num_seeds} seeds, {summary.num_events} events in {summary.seconds:.1f} s: "
        f"{summary.num_seeds / summary.seconds:.0f} seeds/s, {summary.num_events / summary.seconds:.0f} events/s"
    )
    print("met: " + ", ".join(f"{what} {count}" for what, count in sorted(summary.counts.items())))
    for where in ("", " among faults"):
        met, missed, refused = (summary.counts[f"deadline {what}{where}"] for what in ("met", "missed", "refused"))
        print(f"deadlines{where}: {met} in time, {missed} admitted and late, {refused} refused")
    print(f"refused in vain: {summary.counts['deadline refused in vain']} would have been in time without limits")
    if summary.failure is None:
        return 0
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print(f"seed {summary.failure.seed} at commit {commit.stdout.strip()} fails: {summary.failure.error}")
    print("shortest script:")
    for line in summary.failure.script:
        print(f"  {line}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
