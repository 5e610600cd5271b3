"""`octavo batch run`: a run that is killed half way and resumed, and its throughput beside `octavo bench`'s.

    python benchmarks/batch.py [--requests 10000] [--rounds 3]

First a file of short requests is run, killed with kill -9 when half of the results are there, and run again: it must
end with one result for each request. Then files of chat prompts are run in turn with `octavo bench --case offline`
(all at once over gRPC) at the same server: the ratio of the output tokens a second is what the file costs.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from octavo.services.bench import workloads
from octavo.services.offline.local_server import LocalServer

COMMAND = (sys.executable, "-m", "octavo.services.cli", "batch", "run")
SUMMARY = re.compile(r"([\d,]+) tokens in ([\d.]+) s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--requests", type=int, default=10_000, help="of the run that is killed; 0: leave it out")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison; 0: leave it out")
    parser.add_argument("--round-requests", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="octavo-batch-") as folder, LocalServer(options.model) as server:
        if options.requests:
            killed_and_resumed(server, Path(folder), options.requests)
        if options.rounds:
            compare(server, Path(folder), options)


def killed_and_resumed(server: LocalServer, folder: Path, count: int) -> None:
    requests, results = folder / "short.jsonl", folder / "short-results.jsonl"
    with requests.open("w") as file:
        for number in range(count):
            body = {"custom_id": f"n{number}", "prompt": f"Number {number} is", "max_tokens": 4, "seed": number}
            file.write(json.dumps(body) + "\n")
    command = [*COMMAND, "--url", server.url, "--in", str(requests), "--out", str(results)]
    started = time.monotonic()
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as run:
        while count_lines(results) < count // 2:
            if run.poll() is not None:
                raise SystemExit("the run ended before it could be killed")
            time.sleep(0.05)
        run.kill()
    kept = count_lines(results)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    found = [json.loads(line) for line in results.read_text().splitlines()]
    ids = {result["custom_id"] for result in found}
    failed = sum(result["response"] is None or result["response"]["status_code"] != 200 for result in found)
    print(
        f"killed at {kept:,} of {count:,} results and resumed: {len(found):,} results, {len(ids):,} different ones, "
        f"{failed} failures, {seconds:.0f} s in all"
    )
    if len(found) != count or len(ids) != count or failed:
        raise SystemExit("results are missing, there twice, or failures")


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def compare(server: LocalServer, folder: Path, options: argparse.Namespace) -> None:
    """Print the rates of both ways in turn, and the median of their ratios."""
    ratios = []
    for number in range(options.rounds):
        rates = {}
        drawn = workloads.chat(options.round_requests, str(number), options.max_tokens)
        for way, run in (("bench", by_bench), ("file", by_file)):
            # The same prompts both ways, but for a first line that makes them new to the prefix cache.
            prompts = [
                {"prompt": f"{number} {way} {place}\n{each.text}", "max_tokens": each.max_tokens}
                for place, each in enumerate(drawn)
            ]
            rates[way] = run(server, folder, prompts)
        ratios.append(rates["file"] / rates["bench"])
        print(f"round {number + 1}: bench {rates['bench']:.0f}, file {rates['file']:.0f} tokens/s", flush=True)
    print(f"a file's throughput is {statistics.median(ratios):.3f} of that of octavo bench offline (median)")


def by_file(server: LocalServer, folder: Path, prompts: Sequence[Mapping[str, Any]]) -> float:
    """Return the output tokens a second of `octavo batch run`."""
    requests, results = folder / "round.jsonl", folder / "round-results.jsonl"
    write_lines(requests, [{**each, "temperature": 0, "ignore_eos": True} for each in prompts])
    results.unlink(missing_ok=True)
    command = [*COMMAND, "--url", server.url, "--in", str(requests), "--out", str(results)]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    summary = SUMMARY.search(run.stdout)
    if run.returncode or summary is None:
        raise SystemExit(f"the run failed: {run.stdout}")
    return float(summary[1].replace(",", "")) / float(summary[2])


def by_bench(server: LocalServer, folder: Path, prompts: Sequence[Mapping[str, Any]]) -> float:
    """Return the output tokens a second of `octavo bench`."""
    path, output = folder / "prompts.jsonl", folder / "bench.json"
    write_lines(path, prompts)
    command = [sys.executable, "-m", "octavo.services.cli", "bench", "--address", server.address, "--case", "offline"]
    command += ["--repeats", "1", "--requests", str(len(prompts)), "--max-tokens", "0", "--prompts", str(path)]
    subprocess.run([*command, "--output", str(output)], stdout=subprocess.DEVNULL, check=True)
    (run,) = json.loads(output.read_text())["runs"]["offline"]
    return float(run["output_rate"])


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


if __name__ == "__main__":
    main()
