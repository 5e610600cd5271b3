"""Say what a case costs: its steps alone, a deployment of Octavo, and vLLM, in turn.

    python benchmarks/peers/case_steps.py prefix --home FOLDER [--rounds 3] [--repeats 3]

    prefix   32 prompts at once that share about 1,024 tokens, with about 36 of their own and 32 tokens out
    prefill  four documents of about 2,060 tokens, one after the other, one token out

A case's steps alone are those that a scheduler makes of it, on the cpu device in this process, with random weights in
the shapes of SmolLM2-135M. There is no request, no text and no other process: what the deployment takes beyond them is
the cost of serving. The floor is the one of `case_floors.py`, with two bytes a weight.

The deployment's processor time is given by process, with that of the client. FOLDER is the one of `run.py`. Run it on
a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import peers
from case_floors import STEP_TOKENS, Work
from cpu_step import BLOCK_TOKENS, MAX_POSITIONS, RandomModel, Roofline, make_step
from run import PORT, prepare, serving

from octavo.gpu_worker.devices.cpu.device import CpuDevice
from octavo.gpu_worker.ops import StepInput
from octavo.services.bench import cases

# Prompts of the workloads have these many tokens on average.
CASES = {
    "prefix": Work(requests=32, width=32, prompt=1060, shared=1024, output=32),
    "prefill": Work(requests=4, width=1, prompt=2060, shared=0, output=1),
}
BESIDE_DECODES = 512  # tokens of prompts in a step that others wait for
THREADS = 2  # of vLLM
STEPS, OCTAVO, VLLM, CLIENT = "steps alone", "Octavo", "vLLM", "client"


def steps_of(work: Work) -> dict[str, list[StepInput]]:
    """Return the steps of a case by what they are for."""
    requests, prompt, shared = work.requests, int(work.prompt), int(work.shared)
    first = [make_step(1, at, min(STEP_TOKENS, prompt - at)) for at in range(0, prompt, STEP_TOKENS)]
    others = first * (requests - 1)
    if shared:
        own = prompt - shared
        together = BESIDE_DECODES // own
        others = [
            make_step(min(together, requests - number), shared, own, shared, first=number)
            for number in range(1, requests, together)
        ]
    decode = [make_step(requests, prompt + made, 1, shared) for made in range(int(work.output) - 1)]
    return {"first prompt": first, "other prompts": others, "decode": decode}


def time_steps(device: CpuDevice, steps: dict[str, list[StepInput]]) -> dict[str, float]:
    """Run the steps once and return the seconds by what they are for."""
    seconds = {}
    for name, its in steps.items():
        started = time.perf_counter()
        for step in its:
            device.forward(step)
        seconds[name] = time.perf_counter() - started
    return seconds


async def measure(contender: peers.Contender, case: str, log: Path, repeats: range, cpu: Counter[str]) -> list[float]:
    """Start a server, run a case with other prompts in each repeat, and return the seconds of each.

    cpu  gets the processor seconds of the server's processes and of this one, by name
    """
    readings: list[Counter[str]] = []

    def read() -> float:
        readings.append(cpu_by_process())
        return 0.0

    found = []
    async with serving(contender, log) as (_, transport):
        for repeat in repeats:
            run = await cases.run_case(case, repeat, transport, cases.Plan(), read)  # reads before and after it
            if run.failed:
                raise RuntimeError(f"{contender.name}: {run.failed} of {run.requests} requests failed; see {log}")
            found.append(run.seconds)
            before, after = readings[-2:]
            cpu.update(after - before)
    return found


def cpu_by_process() -> Counter[str]:
    """Return the processor seconds of this process and of those below it, by name; of the same name together."""
    client = psutil.Process()
    found = Counter({CLIENT: sum(client.cpu_times()[:2])})
    for process in client.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            name = words[1] if words[:1] == ["octavo"] else process.name()  # a zombie has no command line
            found[name] += sum(process.cpu_times()[:2])
    return found


def row(name: str, seconds: Sequence[float], vllm: Sequence[float]) -> str:
    """Return a Markdown row: the median, the least and the most, and how many times as long vLLM took."""
    cells = [name, f"{statistics.median(seconds):.2f}", f"{min(seconds):.2f} to {max(seconds):.2f}"]
    ratios = [theirs / ours for ours, theirs in zip(seconds, vllm, strict=True)]
    cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return f"| {' | '.join(cells)} |"


async def main() -> None:
    """Measure in turn, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="of the case in a round, with other prompts")
    options = parser.parse_args()
    home = options.home.resolve()
    _, model = prepare(home)
    work = CASES[options.case]
    device = CpuDevice(RandomModel(), STEP_TOKENS, work.requests, MAX_POSITIONS // BLOCK_TOKENS)
    device.allocate_kv(work.requests * MAX_POSITIONS // BLOCK_TOKENS + 1)
    steps = {name: its for name, its in steps_of(work).items() if its}
    parts: dict[str, list[float]] = {name: [] for name in steps}
    seconds: dict[str, list[float]] = {STEPS: [], OCTAVO: [], VLLM: []}  # a figure for each repeat of each round
    cpu: Counter[str] = Counter()
    for round_ in range(options.rounds):
        repeats = range(round_ * options.repeats, (round_ + 1) * options.repeats)
        time_steps(device, steps)
        for _ in repeats:
            part = time_steps(device, steps)
            seconds[STEPS].append(sum(part.values()))
            for name, each in part.items():
                parts[name].append(each)
        octavo, vllm = peers.octavo(model, PORT), peers.vllm(home, model, PORT, THREADS, prefix_cache=work.shared > 0)
        seconds[OCTAVO] += await measure(octavo, options.case, home / "octavo.log", repeats, cpu)
        seconds[VLLM] += await measure(vllm, options.case, home / "vllm.log", repeats, Counter())
        latest = ", ".join(
            f"{name} {statistics.median(its[-options.repeats :]):.2f} s" for name, its in seconds.items()
        )
        print(f"round {round_ + 1}: {latest}", flush=True)

    print("\n| | s, median | least to most | vLLM took so many times as long |\n| --- | --- | --- | --- |")
    for name, its in {**parts, **seconds}.items():
        print(row(name, its, seconds[VLLM]))
    print(f"\nfloor of the machine, two bytes a weight: {floor_s(work):.2f} s\n")
    requests = len(seconds[OCTAVO]) * work.requests
    print("| process | processor time, ms a request | share of all |\n| --- | --- | --- |")
    for name, used in cpu.most_common():
        print(f"| {name} | {used / requests * 1e3:.1f} | {used / cpu.total():.0%} |")


def floor_s(work: Work) -> float:
    """Return the least seconds that the machine takes for a case, at the rates that it has now."""
    roofline = Roofline(num_threads=0, variant="")
    read_rate, dot_rate = max(roofline.read_rates(2.0)), max(roofline.dot_rates(2.0))
    return max(work.bytes_read() / read_rate, work.operations() / dot_rate) / 1e3


if __name__ == "__main__":
    asyncio.run(main())
