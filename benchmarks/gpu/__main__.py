"""Check and measure the GPU path on the GPU of this machine.

    PYTHONPATH=src:. python benchmarks/gpu check [--model PATH] [--json FILE] [--interpret]
    PYTHONPATH=src:. python benchmarks/gpu bench [--model PATH] [--json FILE] [--interpret]

`check` compares every kernel with plain torch and the `cuda` device with the `reference` device, `bench`
measures against what the machine can do; each takes less than ten minutes on an H100. torch, triton and
what requirements.txt lists are needed. Each section runs in a process of its own with a time limit: what
fails or hangs in one is a failed row. The exit status is 0 if every target was met, 1 if not, 2 if there
is no GPU or something needed is not there.

--interpret runs the same code with tiny sizes in Triton's interpreter, without a GPU; times mean
nothing then and are not judged.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from report import Row, failures, from_json, table

NO_GPU = NOT_READY = 2
REQUIREMENTS = Path(__file__).parent / "requirements.txt"
NEEDED = ("torch", "numpy", "safetensors", "transformers", "grpc", "octavo.worker.v1.worker_pb2")
MACHINE = "machine"
# Where `bench` measures none: those of an H100, so that shares can still be read.
ASSUMED = {"copy": 3350.0, "bf16": 800.0, "int8": 1600.0, "fp8": 1600.0}


@dataclass(frozen=True)
class Section:
    """A part that runs in a process of its own: `function` of `module`, at most `seconds`."""

    name: str
    module: str
    function: str
    seconds: int


SECTIONS = {
    "check": (
        Section("kernels", "checks", "check_kernels", 190),
        Section("tokens", "tokens", "check_tokens", 120),
        Section("ranks", "ranks", "check_ranks", 75),
        Section("sanitizer", "sanitizer", "check_sanitizer", 210),
    ),
    "bench": (
        Section("ceilings", "kernel_speed", "measure_ceilings", 30),
        Section("attention", "kernel_speed", "measure_attention", 70),
        Section("rows", "kernel_speed", "measure_rows", 35),
        Section("linear", "kernel_speed", "measure_linears", 65),
        Section("experts", "kernel_speed", "measure_experts", 40),
        Section("small steps", "steps", "measure_small_steps", 60),
        Section("8B steps", "steps", "measure_8b_steps", 80),
        Section("8B int8 steps", "steps", "measure_quantized_steps", 50),
        Section("throughput", "steps", "measure_throughput", 45),
        Section("stack", "stack", "measure_stack", 70),
        Section("start", "steps", "measure_start", 50),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=SECTIONS)
    parser.add_argument("--only", default="", help="run only sections whose name contains this")
    parser.add_argument("--model", type=Path, help="a model's folder or .gguf file, such as SmolLM2's")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--interpret", action="store_true", help="tiny sizes, in Triton's interpreter")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--ceilings", type=json.loads, default=ASSUMED, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.section:
        return run_section(parsed)
    if lacking := missing_packages():
        print("\n".join(lacking), file=sys.stderr)
        print(f"install {REQUIREMENTS}; without a network see gpu-wheels in the Makefile", file=sys.stderr)
        return NOT_READY
    if not parsed.interpret and not has_gpu():
        print("no GPU is here, or torch cannot use it; --interpret runs tiny sizes without one", file=sys.stderr)
        return NO_GPU
    return run_all(parsed)


def missing_packages() -> list[str]:
    """Return what cannot be imported, and why: packages that are not there, or a protobuf that is too old."""
    lacking = []
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except Exception as error:
            lacking.append(f"{name} cannot be imported: {error}")
    return lacking


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def run_all(parsed: argparse.Namespace) -> int:
    """Run the sections one after the other, print the table, write the results."""
    machine = _describe(parsed)
    if parsed.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    rows: list[Row] = []
    started = time.monotonic()
    for section in SECTIONS[parsed.command]:
        if parsed.only in section.name:
            begun = time.monotonic()
            rows += run_here(section, parsed) if parsed.interpret else run_in_child(section, parsed, _ceilings(rows))
            print(f"{section.name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    print(table(rows, judged=not parsed.interpret))
    failed = failures(rows, judged=not parsed.interpret)
    print(f"\n{len(rows)} rows, {failed} failed, {time.monotonic() - started:.0f} s")
    if parsed.json:
        results = {"machine": machine, "judged": not parsed.interpret, "rows": [asdict(row) for row in rows]}
        parsed.json.write_text(json.dumps(results, indent=1))
    return 1 if failed or not rows else 0


def run_in_child(section: Section, parsed: argparse.Namespace, ceilings: dict[str, float]) -> list[Row]:
    """Run a section in a child; return its rows, and one more if it failed or had to be ended."""
    command = [sys.executable, str(Path(__file__).parent), parsed.command, "--section", section.name]
    command += ["--ceilings", json.dumps(ceilings)]
    command += ["--model", str(parsed.model)] if parsed.model else []
    seconds = section.seconds * (5 if parsed.interpret else 1)  # the limits are a GPU's
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    if parsed.interpret:
        command.append("--interpret")
        environment["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        wrong = ""
        try:
            done = subprocess.run(command, stdout=output, stderr=errors, check=False, timeout=seconds, env=environment)
            if done.returncode:
                wrong = f"ended with status {done.returncode}"
        except subprocess.TimeoutExpired:
            wrong = f"did not end within {seconds} s"
        output.seek(0)
        errors.seek(0)
        rows = [from_json(line) for line in output if line.startswith("{")]
        if wrong:
            last = errors.read().strip().splitlines()[-1:]
            rows.append(Row(section.name, "the section", passed=False, note=": ".join([wrong, *last])))
    return rows


def run_here(section: Section, parsed: argparse.Namespace) -> list[Row]:
    """Run a section in this process, which saves the time of its start: tiny sizes need no protection from it."""
    from lab import Lab

    lab = Lab(interpreted=True, tiny=True, model=parsed.model, ceilings=ASSUMED)
    rows: list[Row] = []
    try:
        rows += getattr(importlib.import_module(section.module), section.function)(lab)
    except Exception as error:
        traceback.print_exc()
        rows.append(Row(section.name, "the section", passed=False, note=f"{type(error).__name__}: {error}"))
    return rows


def run_section(parsed: argparse.Namespace) -> int:
    """Run one section in this process: a line of JSON for each row."""
    from lab import Lab, describe

    lab = Lab(interpreted=parsed.interpret, tiny=parsed.interpret, model=parsed.model, ceilings=parsed.ceilings)
    if parsed.section == MACHINE:
        print(json.dumps(describe(lab)))
        return 0
    (section,) = [section for section in SECTIONS[parsed.command] if section.name == parsed.section]
    try:
        for row in getattr(importlib.import_module(section.module), section.function)(lab):
            print(row.to_json(), flush=True)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _ceilings(rows: Sequence[Row]) -> dict[str, float]:
    """Return what was measured so far in place of what is assumed."""
    measured = {row.name.removesuffix(" product"): row.value for row in rows if row.section == "ceilings" and row.value}
    return {**ASSUMED, **measured}


def _describe(parsed: argparse.Namespace) -> dict[str, Any]:
    """Describe the machine, in a child: what looks at a GPU takes memory there."""
    command = [sys.executable, str(Path(__file__).parent), parsed.command, "--section", MACHINE]
    command += ["--interpret"] if parsed.interpret else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    lines = done.stdout.strip().splitlines()
    return dict(json.loads(lines[-1])) if lines and done.returncode == 0 else {"card": "cannot be described"}


if __name__ == "__main__":
    sys.exit(main())
