"""Say how far Octavo's figures beside its peers are from what the machine allows at all.

    python benchmarks/peers/run.py --home FOLDER --output results.json
    python benchmarks/case_floors.py results.json [--seconds 2]

The floor of a run is max(bytes / read rate, operations / dot rate) of SmolLM2-135M in bf16, for the prompts and
outputs that the run had. Every token is computed once, a prefix that prompts share once for all of them. Steps are
as few as the streams allow: each makes a token of every stream, and prompts take a step for 2,048 tokens. A step
reads the weights, and the keys and values of every sequence that gets a token, those of a shared prefix once.
Reading and computing overlap fully; server, client and wire take nothing; nothing is guessed.

Both rates are measured when this runs, as in `cpu_step.py`: on the same machine, which does nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpu_step import HEADS, KEY_OPERATIONS, LAYERS, ROW_OPERATIONS, TOKEN_OPERATIONS, Roofline, bytes_of_weights

from octavo.gpu_worker.quantization import Quantization
from octavo.services.bench import cases

STEP_TOKENS = 2048
KV_BYTES = 2 * 2 * LAYERS * HEADS.num_kv_heads * HEADS.head_dim  # of a token


@dataclass(frozen=True)
class Work:
    """What a run asks for: requests that each have `prompt` tokens, the first `shared` in common, and make `output`.

    width  sequences that run at once
    """

    requests: int
    width: int
    prompt: float
    shared: float
    output: float

    def prompt_tokens(self) -> float:
        """Tokens of prompts that are computed."""
        return self.shared + self.requests * (self.prompt - self.shared)

    def operations(self) -> float:
        """Multiplications and additions, twice a product."""
        prompt_keys = self.shared**2 / 2 + self.requests * (self.prompt**2 - self.shared**2) / 2
        decoded = self.requests * (self.output - 1)
        keys = (LAYERS - 1) * prompt_keys + self.requests * self.prompt
        keys += LAYERS * decoded * (self.prompt + self.output / 2)
        linear = (self.prompt_tokens() + decoded) * TOKEN_OPERATIONS + (self.requests + decoded) * ROW_OPERATIONS
        return linear + keys * KEY_OPERATIONS

    def bytes_read(self) -> float:
        """Weights in every step, keys and values in those that decode."""
        decode_steps = self.requests * (self.output - 1) / self.width
        steps = decode_steps + self.prompt_tokens() / STEP_TOKENS
        kept = self.shared + self.width * (self.prompt - self.shared + self.output / 2)
        return steps * bytes_of_weights(Quantization.NONE) + decode_steps * kept * KV_BYTES


def work_of(case: str, repeat: int, run: dict[str, Any]) -> Work:
    """Return what a run of a case asked for; how much prompts share follows from their texts."""
    prompts, _, streams = cases.work(case, repeat, cases.Plan())
    texts = [prompt.text for prompt in prompts]
    pairs = zip(min(texts), max(texts), strict=False)  # what these two begin with alike, all do
    num_common = next((at for at, (one, other) in enumerate(pairs) if one != other), 0) if case == "prefix" else 0
    prompt = run["prompt_tokens"] / run["requests"]
    shared = prompt * num_common / statistics.mean(map(len, texts))
    width = streams if cases.is_closed_loop(case) else len(prompts)
    return Work(run["requests"], width, prompt, shared, run["output_tokens"] / run["requests"])


def main() -> None:
    """Print a Markdown row for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what run.py wrote with --output")
    parser.add_argument("--contender", default="octavo")
    parser.add_argument("--seconds", type=float, default=2.0, help="for measuring each rate")
    options = parser.parse_args()
    results = json.loads(options.results.read_text())[options.contender]
    roofline = Roofline(num_threads=0, variant="")
    reads, dots = roofline.read_rates(options.seconds), roofline.dot_rates(options.seconds)
    read_rate, dot_rate = max(reads), max(dots)
    print(
        f"reading {read_rate / 1e6:.1f} GB/s (median {statistics.median(reads) / 1e6:.1f}), "
        f"bf16 pairs {dot_rate / 1e6:,.0f} GFLOP/s (median {statistics.median(dots) / 1e6:,.0f})\n"
    )
    print("| case | s | bytes, GB: s | operations, GFLOP: s | floor s | share of it |")
    print("| --- " * 6 + "|")
    for case, runs in results["runs"].items():
        rounds = results["rounds"][case]
        measured = [(work_of(case, each, run), run["seconds"]) for each, run in zip(rounds, runs, strict=True)]
        floors = [(work.bytes_read() / read_rate / 1e3, work.operations() / dot_rate / 1e3) for work, _ in measured]
        shares = [max(floor) / seconds for floor, (_, seconds) in zip(floors, measured, strict=True)]
        work, seconds = measured[-1]
        by_bytes, by_operations = floors[-1]
        cells = [
            case,
            f"{seconds:.2f}",
            f"{work.bytes_read() / 1e9:,.0f}: {by_bytes:.2f}",
            f"{work.operations() / 1e9:,.0f}: {by_operations:.2f}",
            f"{max(floors[-1]):.2f}",
            ", ".join(f"{share:.0%}" for share in shares),
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
