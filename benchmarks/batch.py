"""`octavo batch run`: a run that is killed half way and resumed, and its throughput beside all requests at once.

    python benchmarks/batch.py [--requests 10000] [--rounds 3]

First a file of short requests is run, killed with kill -9 when half of the results are there, and run again: it must
end with one result for each request. Then files of chat prompts are run in turn with `octavo bench`'s way of sending
them (all at once over gRPC, at the same server): the ratio of the output tokens a second is what the file costs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from octavo.services.bench import workloads
from octavo.services.bench.transports import GrpcTransport
from octavo.services.bench.workloads import Prompt
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
            asyncio.run(compare(server, Path(folder), options))


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


async def compare(server: LocalServer, folder: Path, options: argparse.Namespace) -> None:
    ratios = []
    for number in range(options.rounds):
        rates = {}
        drawn = workloads.chat(options.round_requests, str(number), options.max_tokens)
        for way in ("file", "at once") if number % 2 else ("at once", "file"):
            # The same prompts both ways, but for a first line that makes them new to the prefix cache.
            prompts = [
                Prompt(f"{number} {way} {place}\n{each.text}", each.max_tokens) for place, each in enumerate(drawn)
            ]
            rates[way] = await (by_file if way == "file" else at_once)(server, folder, prompts)
        ratios.append(rates["file"] / rates["at once"])
        print(f"round {number + 1}: file {rates['file']:.0f}, at once {rates['at once']:.0f} tokens/s", flush=True)
    print(f"a file's throughput is {statistics.median(ratios):.3f} of that of all requests at once (median)")


async def by_file(server: LocalServer, folder: Path, prompts: Sequence[Prompt]) -> float:
    requests, results = folder / "round.jsonl", folder / "round-results.jsonl"
    fields = [
        {"prompt": each.text, "max_tokens": each.max_tokens, "temperature": 0, "ignore_eos": True} for each in prompts
    ]
    requests.write_text("\n".join(map(json.dumps, fields)) + "\n")
    results.unlink(missing_ok=True)
    command = [*COMMAND, "--url", server.url, "--in", str(requests), "--out", str(results)]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    said, _ = await process.communicate()
    summary = SUMMARY.search(said.decode())
    if process.returncode or summary is None:
        raise SystemExit(f"the run failed: {said.decode()}")
    return float(summary[1].replace(",", "")) / float(summary[2])


async def at_once(server: LocalServer, folder: Path, prompts: Sequence[Prompt]) -> float:
    del folder
    async with GrpcTransport(server.address) as transport:
        started = time.monotonic()
        outcomes = await asyncio.gather(*(transport.generate(prompt) for prompt in prompts))
        seconds = time.monotonic() - started
    if errors := [outcome.error for outcome in outcomes if outcome.error]:
        raise SystemExit(f"requests failed: {errors[0]}")
    return sum(outcome.output_tokens for outcome in outcomes) / seconds


if __name__ == "__main__":
    main()
