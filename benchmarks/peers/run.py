"""Measure Octavo and its peers in turn on this machine, and print the ratios.

    python benchmarks/peers/run.py --home FOLDER [--rounds 2] [--case c1 ...] [--only octavo llama ...]

FOLDER gets an environment for each peer and the models (about 15 GB); what is there is used again. A turn is a
contender that starts, runs every case and stops; Octavo has one before and after each of the others: A B A C A. A
machine that changes in the course of minutes is the same for neighbours, so a peer's figure is compared with the mean
of the two turns of Octavo beside it, and a ratio is the median over the rounds. A peer counts with the better of one
and two threads. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))
import models
import peers

from octavo.services.bench import cases, report
from octavo.services.bench.outcomes import Outcome, Run, summarise
from octavo.services.bench.server import Server, ServerError
from octavo.services.bench.transports import OpenAITransport
from octavo.services.cli import demo_model

CASES = ("c1", "c8", "c32", "offline", "prefill", "prefix")
PORT = 18200
# What is compared, by case: title, field of Run, and whether more is better.
MEASURES = {
    "c1": ("output tokens/s at concurrency 1", "output_rate", True),
    "c8": ("output tokens/s at concurrency 8", "output_rate", True),
    "c32": ("output tokens/s at concurrency 32", "output_rate", True),
    "c32 ITL": ("median inter-token latency at concurrency 32, ms", "itl_p50", False),
    "offline": ("output tokens/s, 64 requests at once", "output_rate", True),
    "prefill": ("prompt tokens/s, documents of about 2,048 tokens", "prompt_rate", True),
    "prefix": ("seconds for 32 requests with a shared prefix", "seconds", False),
    "ready": ("seconds from launch until it serves", "ready_s", False),
}
SETTLE_S = 3.0  # after a server is ready: what it still does in the background then is not measured
# Speculation is on by default in Octavo, where it pays, and off in the peers.
WITHOUT_SPECULATION = "octavo-without-speculation"
# Peers need other settings for these: one that looks prefixes up, one whose slots hold so long prompts.
APART = {"vllm": {"prefix"}, "llama": {"prefill", "prefix"}}


@dataclasses.dataclass
class Result:
    """What one contender came to, over all rounds."""

    runs: dict[str, list[Run]] = dataclasses.field(default_factory=dict)
    ready_s: list[float] = dataclasses.field(default_factory=list)
    peak_memory: int = 0
    turn: int = 0  # the present one, of all contenders
    turns: dict[str, list[int]] = dataclasses.field(default_factory=dict)  # of each of `runs`, and of "ready"

    def add(self, case: str, run: Run) -> None:
        """Take the run of a case in the present turn."""
        self.runs.setdefault(case, []).append(run)
        self.turns.setdefault(case, []).append(self.turn)

    def figures(self, measure: str) -> list[tuple[int, float]]:
        """Return a measure's figures with their turns."""
        case, (_, field, _) = measure.split()[0], MEASURES[measure]
        values = self.ready_s if measure == "ready" else [getattr(run, field) for run in self.runs.get(case, [])]
        return list(zip(self.turns.get(case, []), values, strict=True))


async def measure_server(contender: peers.Contender, round_: int, chosen: list[str], result: Result, log: Path) -> None:
    """Start a contender, run the cases, stop it."""
    url = f"http://127.0.0.1:{PORT}"
    async with (
        Server(contender.command, url + contender.ready_path, log, contender.environment) as server,
        OpenAITransport(url, contender.model, contender.extra) as transport,
    ):
        result.ready_s.append(server.ready_s)
        result.turns.setdefault("ready", []).append(result.turn)
        await asyncio.sleep(SETTLE_S)
        for case in chosen:
            run = await cases.run_case(case, round_, transport, cases.Plan(), server.cpu_seconds)
            result.add(case, run)
            print(f"  {contender.name}: {case} {run.output_rate:.0f} out tok/s, {run.failed} failed", flush=True)
        result.peak_memory = max(result.peak_memory, server.peak_memory)


def measure_openvino(home: Path, folder: Path, threads: int, round_: int, chosen: list[str], result: Result) -> None:
    """Run the cases in a process of OpenVINO's environment."""
    work = {}
    for case in chosen:
        prompts, warm_up, width = cases.work(case, round_, cases.Plan())
        work[case] = {
            "streams": width if cases.is_closed_loop(case) else 0,
            "prefix_cache": case == "prefix",
            "warm_up": [dataclasses.asdict(prompt) for prompt in warm_up],
            "prompts": [dataclasses.asdict(prompt) for prompt in prompts],
        }
    script = Path(__file__).with_name("openvino_in_process.py")
    done = subprocess.run(
        [home / "openvino" / "bin" / "python", script, folder, str(threads)],
        input=json.dumps(work), capture_output=True, text=True, check=True, timeout=1800,
    )  # fmt: skip
    for case, measured in json.loads(done.stdout).items():
        outcomes = [Outcome(**outcome) for outcome in measured["outcomes"]]
        run = summarise(case, outcomes, measured["seconds"])
        result.add(case, run)
        print(f"  openvino, {threads} thread(s): {case} {run.output_rate:.0f} out tok/s", flush=True)


def ratios(results: dict[str, Result]) -> list[str]:
    """Return Markdown rows: Octavo's figure, and how many times better it is than the best server and than OpenVINO."""
    rows = ["| measure | octavo | best server | which | ratio | OpenVINO, no server | ratio |", "| --- " * 7 + "|"]
    ours = results.get("octavo", Result())
    for measure, (title, field, more_is_better) in MEASURES.items():
        compared = {name: ratio for name, result in results.items() if (ratio := _ratio(ours, result, measure))}
        compared.pop("octavo", None)
        compared.pop(WITHOUT_SPECULATION, None)
        if not compared:
            continue
        scale, form = 1000 if field == "itl_p50" else 1, ",.0f" if more_is_better else ",.1f"
        servers = {name: ratio for name, ratio in compared.items() if not name.startswith("openvino")}
        in_process = {name: ratio for name, ratio in compared.items() if name not in servers}
        cells = [title, f"{scale * _median(ours, measure):{form}}"]
        for peers_there in (servers, in_process):
            best = min(peers_there, key=peers_there.__getitem__, default="-")
            cells.append(f"{scale * _median(results[best], measure):{form}}" if peers_there else "-")
            ratio = f"**{peers_there[best]:.2f}**" if peers_there else "-"
            cells += [best, ratio] if peers_there is servers else [ratio]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _ratio(ours: Result, theirs: Result, measure: str) -> float:
    """Return how many times better Octavo was in the turns beside theirs, as the median; 0 where none was measured."""
    our_figures, more_is_better = dict(ours.figures(measure)), MEASURES[measure][2]
    ratios = []
    for turn, figure in theirs.figures(measure):
        beside = [our_figures[each] for each in (turn - 1, turn + 1) if each in our_figures]
        if beside:
            mean = statistics.mean(beside)
            ratios.append(mean / figure if more_is_better else figure / mean)
    return statistics.median(ratios) if ratios else 0.0


def _median(result: Result, measure: str) -> float:
    return statistics.median(figure for _, figure in result.figures(measure))


def details(results: dict[str, Result]) -> list[str]:
    """Return the table of every contender."""
    lines = []
    for name, result in results.items():
        lines += [f"\n### {name}\n"]
        if result.ready_s:
            ready, peak = statistics.median(result.ready_s), result.peak_memory / 2**20
            lines += [f"Ready after {ready:.1f} s; at most {peak:,.0f} MiB.\n"]
        lines += [report.table(result.runs)]
    return lines


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--case", nargs="+", default=list(CASES))
    parser.add_argument("--only", nargs="+", default=["octavo", WITHOUT_SPECULATION, "vllm", "llama", "openvino"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--output", type=Path, help="write everything there, as JSON")
    options = parser.parse_args()
    home = options.home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    peers.install(home)
    source = demo_model.fetch(demo_model.cache_dir(), lambda *_: None)
    model = models.folder_from_gguf(home / "vllm" / "bin" / "python", source, home / "model")
    gguf = models.bfloat16_gguf(source, home / "model-bf16.gguf")
    results: dict[str, Result] = {}
    turns = _turns(options.only, options.threads)
    print("machine:", json.dumps(report.machine_facts()), flush=True)
    for round_ in range(options.rounds):
        print(f"round {round_ + 1}, load {psutil.getloadavg()[0]:.1f}", flush=True)
        for number, (kind, threads) in enumerate(turns):
            name = f"{kind}, {threads} thread(s)" if threads else kind
            result = results.setdefault(name, Result())
            result.turn = round_ * (len(turns) + 1) + number  # the last of a round is nobody's neighbour
            try:
                await measure(kind, threads, round_, options.case, result, home, model, gguf)
            except (ServerError, subprocess.SubprocessError) as error:
                print(f"  {name} was not measured: {error}", flush=True)
    for line in [*ratios(results), *details(results)]:
        print(line)
    if options.output:
        document = {name: report.document(result.runs, ready_s=result.ready_s) for name, result in results.items()}
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def _turns(kinds: list[str], threads: list[int]) -> list[tuple[str, int]]:
    """Return kinds of contenders with their threads (0: their own choice) in the order of a round."""
    others = [
        (kind, each) for kind in kinds if kind != "octavo" for each in ([0] if kind == WITHOUT_SPECULATION else threads)
    ]
    if "octavo" not in kinds:
        return others
    return [("octavo", 0), *(turn for other in others for turn in (other, ("octavo", 0)))]


async def measure(
    kind: str, threads: int, round_: int, chosen: list[str], result: Result, home: Path, model: Path, gguf: Path
) -> None:
    """Run one contender's turn."""
    if kind == "openvino":
        folder = models.openvino_ir(home, model, home / "openvino-model")
        await asyncio.to_thread(measure_openvino, home, folder, threads, round_, chosen, result)
        return
    log = home / f"{kind}.log"
    if kind == "octavo":
        await measure_server(peers.octavo(model, PORT), round_, chosen, result, log)
        return
    if kind == WITHOUT_SPECULATION:
        contender = peers.octavo(model, PORT, speculates=False)
        await measure_server(contender, round_, [case for case in chosen if case in ("c1", "c8")], result, log)
        return
    for is_apart in (False, True):
        part = [case for case in chosen if (case in APART[kind]) == is_apart]
        if part:
            contender = (
                peers.vllm(home, model, PORT, threads, prefix_cache=is_apart)
                if kind == "vllm"
                else peers.llama(home, gguf, PORT, threads, long_prompts=is_apart)
            )
            await measure_server(contender, round_, part, result, log)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
