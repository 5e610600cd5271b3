# mypy: allow-untyped-calls
"""Compile every Triton kernel for every target without a GPU, and check what comes out.

    python -m tools.kernels.aot [--target cuda:90]... [--only TEXT] [--timeout SECONDS] [--jobs N] [--fresh]
        [--markdown]

Prints a row for each kernel, configuration and target. The exit status is 1 if one does not
compile, spills, wants more shared memory than the target has, leaves room for fewer blocks on a
multiprocessor than its `AotSpec` wants, or lacks an instruction that it requires. Each is compiled in a
child process: a compiler that dies or hangs costs one row. Triton's wheel brings the compilers and
disassemblers, so nothing else need be installed. What came out is kept in the user's cache folder for as
long as neither Triton nor the kernel nor its configuration changes; the rules are checked anew each time.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import inspect
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from octavo.kernels.aot_spec import AotSpec
from octavo.kernels.configs import MULTIPROCESSORS, SHARED_MEMORY, TARGETS

MODULES = (
    "paged_attention",
    "encoder_attention",
    "rotary_kv",
    "rms_norm",
    "layer_norm",
    "gated",
    "moe",
    "expert_routing",
    "quantized_linear",
    "sampling_kernels",
    "alternatives",
    "pooling",
    "step_inputs",
)

_SASS_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_SASS_KINDS = {
    "mma": re.compile(r"(HMMA|IMMA|QMMA|OMMA|DMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)\b"),
    "wgmma": re.compile(r"(HGMMA|IGMMA|QGMMA|UTC\w*MMA)\b"),
    "ld128": re.compile(r"(LDG|LDGSTS)\..*\b128\b"),
    "tma": re.compile(r"UTMALDG\b"),
}
_GCN_INSTRUCTION = re.compile(r"^\s+([a-z][a-z0-9_]+)(?=\s|$)", re.MULTILINE)
_GCN_KINDS = {
    "mma": re.compile(r"v_(mfma|wmma|smfmac)_"),
    "wgmma": re.compile(r"(?!)"),
    "ld128": re.compile(r"(global|buffer|flat)_load_(lds_)?(dwordx4|b128)"),
    "tma": re.compile(r"(?!)"),
}
# In PTX, before ptxas builds the exact division from the like.
_INEXACT = re.compile(
    r"\b(?:fma\.\w+(?:\.ftz)?\.f32|div\.(?:full|approx)(?:\.ftz)?\.f32|(?:mul|add|sub)(?:\.\w+)?\.ftz\.f32)"
)


_MACHINE_CODE = {"cuda:86": "cuda:80"}
"""Targets that are judged by the machine code of another one, which they can run: only its limits differ."""


@dataclass
class Row:
    """What a kernel became. None: not known.

    registers  per thread; on hip, vector registers
    spills     bytes stored and loaded, on hip registers
    shared     bytes of shared memory (LDS) of a block
    blocks     how many fit on a multiprocessor (compute unit), by registers and shared memory
    counts     instructions by kind, see `AotSpec.require`
    inexact    fused multiply-adds and approximate divisions, where Triton's output shows them (cuda)
    problems   why the row fails; empty if it passes
    """

    kernel: str
    target: str
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    blocks: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    inexact: int = 0
    problems: list[str] = field(default_factory=list)


def compile_all(
    targets: Sequence[str] = TARGETS,
    only: str = "",
    timeout: float = 120.0,
    modules: Sequence[str] = MODULES,
    jobs: int = 1,
    kept: KeptRows | None = None,
) -> list[Row]:
    """Compile each spec whose name contains `only`, for each of its targets that is in `targets`.

    timeout  seconds that one compilation may take
    modules  of `octavo.kernels`, each with AOT_SPECS
    jobs     compilations at once
    kept     rows of earlier calls; None: all is compiled
    """
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "interpreted kernels cannot be compiled"
    waiting = []
    for name in modules:
        module = importlib.import_module(f"octavo.kernels.{name}")
        for spec in module.AOT_SPECS:
            chosen = [target for target in spec.targets if target in targets and only in spec.name]
            waiting += [(module, spec, target) for target in chosen]
    rows: list[Row | None] = [None] * len(waiting)
    running: dict[int, _Compilation] = {}
    # Those that are judged by the machine code of another target come last: it is there then.
    for number, (module, spec, target) in sorted(enumerate(waiting), key=lambda item: item[1][2] in _MACHINE_CODE):
        while len(running) >= jobs:
            _collect(running, rows, kept)
        if kept is not None and (row := kept.find(module, spec, target)) is not None:
            rows[number] = row
            continue
        running[number] = _Compilation(module, spec, target, timeout)
    while running:
        _collect(running, rows, kept)
    if kept is not None:
        kept.forget_old()
    return [row for row in rows if row is not None]


class KeptRows:
    """Rows in a folder, each under the hash of all that it depends on."""

    def __init__(self, folder: Path, max_age_s: float = 30 * 86400.0) -> None:
        """max_age_s: for how long a row is kept that nothing asks for."""
        self._folder = folder
        self._max_age_s = max_age_s

    def find(self, module: Any, spec: AotSpec, target: str) -> Row | None:
        """Return a row that was kept, checked by the rules of today."""
        file = self._file(module, spec, target)
        try:
            row = Row(**{**json.loads(file.read_bytes()), "target": target})
            file.touch()
        except (OSError, ValueError, TypeError):  # not there, or cut off
            return None
        _judge(row, spec)
        return row

    def keep(self, module: Any, spec: AotSpec, target: str, row: Row) -> None:
        """Keep a row of a kernel that did compile."""
        if row.registers is None:
            return
        file = self._file(module, spec, target)
        part = file.with_suffix(f".{os.getpid()}")
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(asdict(row)))
        part.replace(file)

    def forget_old(self) -> None:
        """Remove what was not asked for in a long time."""
        for file in self._folder.glob("*"):
            with contextlib.suppress(FileNotFoundError):  # another process did it
                if time.time() - file.stat().st_mtime > self._max_age_s:
                    file.unlink()

    def _file(self, module: Any, spec: AotSpec, target: str) -> Path:
        options = (spec.num_warps, spec.num_stages, spec.enable_fp_fusion)
        sizes = (sorted(spec.signature.items()), sorted(spec.constexprs.items()))
        # The key of a function covers whatever it calls, and the constants that it reads.
        function = getattr(module, spec.function)
        parts = (_surroundings(), function.cache_key, spec.name, _MACHINE_CODE.get(target, target), sizes, options)
        return self._folder / f"{hashlib.sha256(repr(parts).encode()).hexdigest()}.json"


@functools.cache
def _surroundings() -> tuple[object, ...]:
    """Return what all compilations depend on: Triton with its compilers, its settings, and how the result is read."""
    from triton.runtime.cache import triton_key

    settings = sorted(
        item for item in os.environ.items() if item[0].startswith("TRITON_") and item[0] != "TRITON_CACHE_DIR"
    )
    reading = [inspect.getsource(function) for function in (_compile, _source, _inspect_cuda, _inspect_hip, _count)]
    return triton_key(), reading, _SASS_KINDS, _GCN_KINDS, _INEXACT.pattern, settings


def _collect(running: dict[int, _Compilation], rows: list[Row | None], kept: KeptRows | None) -> None:
    """Wait until at least one compilation has ended, or is out of time; move those that have to `rows`, and keep it."""
    wait(
        [compilation.receiver for compilation in running.values()],
        timeout=min(compilation.remaining() for compilation in running.values()),
    )
    for number, compilation in list(running.items()):
        if compilation.remaining() == 0 or compilation.receiver.poll():
            rows[number] = row = compilation.result()
            del running[number]
            if kept is not None:
                kept.keep(*compilation.what, row)


def check(row: Row, spec: AotSpec) -> list[str]:
    """Return what is wrong with a row that was compiled."""
    problems = []
    if row.spills != 0:
        problems.append(f"spills {row.spills}")
    if row.shared is None or row.shared > SHARED_MEMORY[row.target]:
        problems.append(f"shared memory {row.shared} > {SHARED_MEMORY[row.target]}")
    if row.blocks is None or row.blocks < spec.min_blocks:
        problems.append(f"blocks {row.blocks} < {spec.min_blocks}")
    if row.inexact and not spec.enable_fp_fusion:
        problems.append(f"{row.inexact} operations that are not specified to the bit")
    for kind, least in spec.require.items():
        if row.counts.get(kind, 0) < least:
            problems.append(f"{kind} {row.counts.get(kind)} < {least}")
    return problems


class _Compilation:
    """One kernel of `module` that is compiled in a child process for up to `timeout` seconds."""

    def __init__(self, module: Any, spec: AotSpec, target: str, timeout: float) -> None:
        # fork: the child has Triton and the kernels imported already, and knows what Triton looks up once a process.
        _look_up()
        context = multiprocessing.get_context("fork")
        self.receiver, sender = context.Pipe(duplex=False)
        self.what = (module, spec, target)
        self._row = Row(spec.name, target)
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._cache = tempfile.TemporaryDirectory(prefix="octavo-aot-")
        self._child = context.Process(target=_child, args=(sender, module, spec, target, self._cache.name))
        self._child.start()
        sender.close()

    def remaining(self) -> float:
        """Seconds that it still has."""
        return max(self._deadline - time.monotonic(), 0.0)

    def result(self) -> Row:
        """Wait for the end; what went wrong, the compiler's death included, is a problem of the row."""
        try:
            if self.receiver.poll(self.remaining()):
                return Row(**json.loads(self.receiver.recv_bytes()))
            self._row.problems = [f"still compiling after {self._timeout:g} s"]
            self._child.kill()
        except EOFError:
            self._child.join()
            self._row.problems = [f"the compiler died with exit status {self._child.exitcode}"]
        finally:
            self._child.join()
            self.receiver.close()
            self._cache.cleanup()
        return self._row


@functools.cache
def _look_up() -> None:
    """Do what each child would do again: hash all files of Triton, which takes longer than compiling a small kernel."""
    from triton.compiler import code_generator  # noqa: F401 - imported late by Triton, when it compiles
    from triton.runtime.cache import triton_key

    triton_key()


def compile_in_child(module: Any, spec: AotSpec, target: str, timeout: float) -> Row:
    """Compile one kernel of `module`."""
    return _Compilation(module, spec, target, timeout).result()


def _child(sender: Connection, module: Any, spec: AotSpec, target: str, cache: str) -> None:
    # A kernel from the cache would come without the log of ptxas.
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    os.environ["TRITON_CACHE_DIR"] = cache
    sender.send_bytes(json.dumps(asdict(_compile(module, spec, target))).encode())


def _compile(module: Any, spec: AotSpec, target: str) -> Row:
    import triton
    from triton.backends.compiler import GPUTarget

    row = Row(spec.name, target)
    backend, arch = _MACHINE_CODE.get(target, target).split(":")
    gpu = GPUTarget(backend, int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)
    options = {
        "num_warps": spec.num_warps,
        "num_stages": spec.num_stages,
        "enable_fp_fusion": spec.enable_fp_fusion,
    }
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(_source(getattr(module, spec.function), spec), target=gpu, options=options)
    except Exception as error:  # whatever a compiler raises is the result
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        row.problems = [f"{type(error).__name__}: {' | '.join(lines[-3:])}"]
        return row
    row.shared = compiled.metadata.shared
    if backend == "cuda":
        _inspect_cuda(row, compiled.asm["cubin"], log.getvalue())
        row.inexact = len(_INEXACT.findall(compiled.asm["ptx"]))
    else:
        _inspect_hip(row, compiled.asm["amdgcn"])
    _judge(row, spec)
    return row


def _judge(row: Row, spec: AotSpec) -> None:
    """Fill in what follows from what a kernel became."""
    if row.registers is not None and row.shared is not None:
        row.blocks = fitting_blocks(row.target, row.registers, row.shared, spec.num_warps)
    row.problems = check(row, spec)


def fitting_blocks(target: str, registers: int, shared: int, num_warps: int) -> int:
    """Return how many blocks fit on a multiprocessor, by registers a thread and bytes of shared memory."""
    size = MULTIPROCESSORS[target]
    # Registers are handed out by eight a thread. A wavefront of hip stays on one of four vector units.
    warps = size.registers // max(-(-registers // 8) * 8, 8)
    by_registers = size.units * warps // num_warps
    return min(by_registers, size.shared // max(shared + size.reserved, 1))


def _source(function: Any, spec: AotSpec) -> Any:
    """Return what `triton.compile` takes: the types and constants that a launch would have found."""
    import triton

    named = {**spec.signature, **spec.constexprs}
    assert set(named) == set(function.arg_names), f"{spec.name}: {set(named) ^ set(function.arg_names)}"
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        kind, _, multiple = spec.signature.get(name, "constexpr").partition(":")
        signature[name] = kind
        if multiple:
            assert multiple == "16", f"{spec.name}.{name}: :16 is the only hint"
            attributes[(index,)] = [["tt.divisibility", 16]]
    return triton.compiler.ASTSource(
        fn=function, signature=signature, constexprs=dict(spec.constexprs), attrs=attributes
    )


def _inspect_cuda(row: Row, cubin: bytes, log: str) -> None:
    """Read the log of ptxas and the disassembled machine code."""
    registers = re.search(r"Used (\d+) registers", log)
    row.registers = int(registers.group(1)) if registers else None
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    row.spills = sum(map(int, spilled)) if spilled else None
    row.counts = _count(_SASS_INSTRUCTION.findall(_disassemble(cubin)), _SASS_KINDS)


def _disassemble(cubin: bytes) -> str:
    """Return the machine code, or nothing if no tool can read it (then requirements fail)."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        # -ndf: without the analysis of data flow, which takes time and changes nothing that is read here.
        for tool, flags in ((knobs.nvidia.nvdisasm, ("-c", "-ndf")), (knobs.nvidia.cuobjdump, ("-sass",))):
            done = subprocess.run([tool.path, *flags, str(file)], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return done.stdout
    return ""


def _inspect_hip(row: Row, assembly: str) -> None:
    """Read the assembly and the metadata at its end."""
    fields = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", assembly))
    row.registers = int(fields["vgpr_count"]) if "vgpr_count" in fields else None
    # Scalar registers spill to lanes of vector registers, not to memory.
    row.spills = int(fields["vgpr_spill_count"]) if "vgpr_spill_count" in fields else None
    row.counts = _count(_GCN_INSTRUCTION.findall(assembly), _GCN_KINDS)


def _count(instructions: list[str], kinds: dict[str, re.Pattern[str]]) -> dict[str, int]:
    return {kind: sum(1 for name in instructions if pattern.match(name)) for kind, pattern in kinds.items()}


def table(rows: Sequence[Row], *, markdown: bool = False) -> str:
    """Return the rows as text."""
    kinds = tuple(_SASS_KINDS)
    lines = [["kernel", "target", "registers", "spills", "shared", "blocks", *kinds, "problems"]]
    for row in rows:
        numbers = [row.registers, row.spills, row.shared, row.blocks, *(row.counts.get(kind) for kind in kinds)]
        cells = ["-" if number is None else str(number) for number in numbers]
        lines.append([row.kernel, row.target, *cells, "; ".join(row.problems)])
    if markdown:
        lines.insert(1, ["---"] * len(lines[0]))
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in lines
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="compile only for this one; may be repeated")
    parser.add_argument("--only", default="", help="compile only kernels whose name contains this")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that one compilation may take")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilations at once")
    parser.add_argument("--fresh", action="store_true", help="compile also what was compiled before")
    parser.add_argument("--markdown", action="store_true", help="print the table for documentation")
    parsed = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # read by Triton when the kernels are imported
    kept = KeptRows(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "octavo" / "aot")
    rows = compile_all(
        parsed.target or TARGETS, parsed.only, parsed.timeout, jobs=parsed.jobs, kept=None if parsed.fresh else kept
    )
    import triton

    failed = sum(1 for row in rows if row.problems)
    print(table(rows, markdown=parsed.markdown))
    print(f"\nTriton {triton.__version__}: {len(rows) - failed} passed, {failed} failed")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
