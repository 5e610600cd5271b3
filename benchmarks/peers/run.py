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
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

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
OCTAVO = "octavo"
# Speculation is on by default in Octavo, where it pays, and off in the peers.
WITHOUT_SPECULATION = f"{OCTAVO}-without-speculation"
# Peers need other settings for these: one that looks prefixes up, one whose slots hold so long prompts.
APART = {"vllm": {"prefix"}, "llama": {"prefill", "prefix"}}


@dataclasses.dataclass
class Turn:
    """What a contender came to in one turn."""

    name: str
    round_: int
    runs: dict[str, Run] = dataclasses.field(default_factory=dict)  # by case
    ready_s: list[float] = dataclasses.field(default_factory=list)  # of each server that it took
    peak_memory: int = 0

    def figure(self, measure: str) -> float | None:
        """Return the figure of a measure, or None if it was not taken."""
        if measure == "ready":
            return statistics.median(self.ready_s) if self.ready_s else None
        run = self.runs.get(measure.split()[0])
        return None if run is None else float(getattr(run, MEASURES[measure][1]))


def prepare(home: Path) -> tuple[Path, Path]:
    """Install the peers; return the model as a GGUF file and as a folder. What is there is used again."""
    home.mkdir(parents=True, exist_ok=True)
    peers.install(home)
    source = demo_model.fetch(demo_model.cache_dir(), lambda *_: None)
    return source, models.folder_from_gguf(home / "vllm" / "bin" / "python", source, home / "model")


@contextlib.asynccontextmanager
async def serving(contender: peers.Contender, log: Path) -> AsyncIterator[tuple[Server, OpenAITransport]]:
    """Start a contender, and stop it at the end; meanwhile it is settled and can be asked."""
    url = f"http://127.0.0.1:{PORT}"
    async with (
        Server(contender.command, url + contender.ready_path, log, contender.environment) as server,
        OpenAITransport(url, contender.model, contender.extra) as transport,
    ):
        await asyncio.sleep(SETTLE_S)
        yield server, transport


async def measure_server(contender: peers.Contender, chosen: list[str], turn: Turn, log: Path) -> None:
    """Start a contender, run the cases, stop it."""
    async with serving(contender, log) as (server, transport):
        turn.ready_s.append(server.ready_s)
        for case in chosen:
            turn.runs[case] = run = await cases.run_case(case, turn.round_, transport, cases.Plan(), server.cpu_seconds)
            print(f"  {contender.name}: {case} {run.output_rate:.0f} out tok/s, {run.failed} failed", flush=True)
        turn.peak_memory = max(turn.peak_memory, server.peak_memory)


def measure_openvino(home: Path, folder: Path, threads: int, chosen: list[str], turn: Turn) -> None:
    """Run the cases in a process of OpenVINO's environment."""
    work = {}
    for case in chosen:
        prompts, warm_up, width = cases.work(case, turn.round_, cases.Plan())
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
        turn.runs[case] = run = summarise(case, outcomes, measured["seconds"])
        print(f"  openvino, {threads} thread(s): {case} {run.output_rate:.0f} out tok/s", flush=True)


def ratios(turns: list[Turn]) -> list[str]:
    """Return Markdown rows: Octavo's figure, and how many times better it is than the best server and than OpenVINO."""
    rows = ["| measure | octavo | best server | which | ratio | OpenVINO, no server | ratio |", "| --- " * 7 + "|"]
    for measure, (title, field, more_is_better) in MEASURES.items():
        compared = _compare(turns, measure)
        if not compared:
            continue
        scale, form = 1000 if field == "itl_p50" else 1, ",.0f" if more_is_better else ",.1f"
        servers = {name: ratio for name, ratio in compared.items() if not name.startswith("openvino")}
        in_process = {name: ratio for name, ratio in compared.items() if name not in servers}
        cells = [title, f"{scale * _median(turns, OCTAVO, measure):{form}}"]
        for peers_there in (servers, in_process):
            best = min(peers_there, key=peers_there.__getitem__, default="-")
            cells.append(f"{scale * _median(turns, best, measure):{form}}" if peers_there else "-")
            ratio = f"**{peers_there[best]:.2f}**" if peers_there else "-"
            cells += [best, ratio] if peers_there is servers else [ratio]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _compare(turns: list[Turn], measure: str) -> dict[str, float]:
    """Return by peer how many times better Octavo was in the turns beside theirs, as the median over the rounds."""
    found: dict[str, list[float]] = {}
    for before, turn, after in zip(turns, turns[1:], turns[2:], strict=False):
        beside = [each for each in (before, after) if each.name == OCTAVO and each.round_ == turn.round_]
        ours = [figure for each in beside if (figure := each.figure(measure)) is not None]
        theirs = turn.figure(measure)
        if turn.name.startswith(OCTAVO) or theirs is None or not ours:
            continue
        mean = statistics.mean(ours)
        found.setdefault(turn.name, []).append(mean / theirs if MEASURES[measure][2] else theirs / mean)
    return {name: statistics.median(each) for name, each in found.items()}


def _median(turns: list[Turn], name: str, measure: str) -> float:
    figures = (turn.figure(measure) for turn in turns if turn.name == name)
    return statistics.median(figure for figure in figures if figure is not None)


def by_contender(turns: list[Turn]) -> dict[str, list[Turn]]:
    """Return each contender's turns."""
    return {name: [turn for turn in turns if turn.name == name] for name in dict.fromkeys(turn.name for turn in turns)}


def runs_of(turns: list[Turn]) -> dict[str, list[Run]]:
    """Return the runs of some turns by case."""
    measured = dict.fromkeys(case for turn in turns for case in turn.runs)
    return {case: [turn.runs[case] for turn in turns if case in turn.runs] for case in measured}


def details(turns: list[Turn]) -> list[str]:
    """Return the table of every contender."""
    lines = []
    for name, its in by_contender(turns).items():
        lines += [f"\n### {name}\n"]
        if ready_s := [each for turn in its for each in turn.ready_s]:
            peak = max(turn.peak_memory for turn in its) / 2**20
            lines += [f"Ready after {statistics.median(ready_s):.1f} s; at most {peak:,.0f} MiB.\n"]
        lines += [report.table(runs_of(its))]
    return lines


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--case", nargs="+", default=list(CASES))
    parser.add_argument("--only", nargs="+", default=[OCTAVO, WITHOUT_SPECULATION, "vllm", "llama", "openvino"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--output", type=Path, help="write everything there, as JSON")
    options = parser.parse_args()
    home = options.home.resolve()
    source, model = prepare(home)
    gguf = models.bfloat16_gguf(source, home / "model-bf16.gguf")
    turns: list[Turn] = []
    print("machine:", json.dumps(report.machine_facts()), flush=True)
    for round_ in range(options.rounds):
        print(f"round {round_ + 1}, load {psutil.getloadavg()[0]:.1f}", flush=True)
        for kind, threads in _order(options.only, options.threads):
            turn = Turn(f"{kind}, {threads} thread(s)" if threads else kind, round_)
            turns.append(turn)
            try:
                await measure(kind, threads, options.case, turn, home, model, gguf)
            except (ServerError, subprocess.SubprocessError) as error:
                print(f"  {turn.name} was not measured: {error}", flush=True)
    for line in [*ratios(turns), *details(turns)]:
        print(line)
    if options.output:
        document = {name: document_of(its) for name, its in by_contender(turns).items()}
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def document_of(turns: list[Turn]) -> dict[str, Any]:
    """Return what a contender came to, for JSON; `rounds` says which prompts each of its runs had."""
    runs = runs_of(turns)
    rounds = {case: [turn.round_ for turn in turns if case in turn.runs] for case in runs}
    return report.document(runs, ready_s=[each for turn in turns for each in turn.ready_s], rounds=rounds)


def _order(kinds: list[str], threads: list[int]) -> list[tuple[str, int]]:
    """Return kinds of contenders with their threads (0: their own choice) in the order of a round."""
    others = [
        (kind, each) for kind in kinds if kind != OCTAVO for each in ([0] if kind.startswith(OCTAVO) else threads)
    ]
    if OCTAVO not in kinds:
        return others
    return [(OCTAVO, 0), *(turn for other in others for turn in (other, (OCTAVO, 0)))]


async def measure(kind: str, threads: int, chosen: list[str], turn: Turn, home: Path, model: Path, gguf: Path) -> None:
    """Run one contender's turn."""
    if kind == "openvino":
        folder = models.openvino_ir(home, model, home / "openvino-model")
        await asyncio.to_thread(measure_openvino, home, folder, threads, chosen, turn)
        return
    log = home / f"{kind}.log"
    if kind == OCTAVO:
        await measure_server(peers.octavo(model, PORT), chosen, turn, log)
        return
    if kind == WITHOUT_SPECULATION:
        contender = peers.octavo(model, PORT, speculates=False)
        await measure_server(contender, [case for case in chosen if case in ("c1", "c8")], turn, log)
        return
    for is_apart in (False, True):
        part = [case for case in chosen if (case in APART[kind]) == is_apart]
        if part:
            contender = (
                peers.vllm(home, model, PORT, threads, prefix_cache=is_apart)
                if kind == "vllm"
                else peers.llama(home, gguf, PORT, threads, long_prompts=is_apart)
            )
            await measure_server(contender, part, turn, log)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
