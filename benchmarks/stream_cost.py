"""What streaming a token costs a gateway over HTTP, compared to gRPC: python benchmarks/stream_cost.py [--rounds 3].

Runs gateway_stream.py and http_stream.py in turn, with the options given, and prints the medians of the gateway's CPU
time for a token and their ratio. Exits with 1 if HTTP costs 15 % more than gRPC, or more than that.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from pathlib import Path

MAX_RATIO = 1.15
_COST = re.compile(r"= ([0-9.]+) us a token")


def cost_us(script: str, options: list[str]) -> float:
    """Run a benchmark; return what a token costs."""
    command = [sys.executable, str(Path(__file__).parent / script), *options]
    line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    print(f"{script}: {line.strip()}", flush=True)
    found = _COST.search(line)
    assert found is not None, line
    return float(found[1])


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    given, options = parser.parse_known_args()
    rounds = [(cost_us("gateway_stream.py", options), cost_us("http_stream.py", options)) for _ in range(given.rounds)]
    grpc, http = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(f"gRPC {grpc:.1f} us a token, HTTP {http:.1f} us: {http / grpc:.2f} times as much")
    return int(http / grpc >= MAX_RATIO)


if __name__ == "__main__":
    sys.exit(main())
