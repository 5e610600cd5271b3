"""Run tests of the native CPU kernels with sanitizers of the compiler.

    python -m tests.sanitizers [--quick] [--seeds N] [address|thread ...]

address  reads and writes beside what is allocated, and undefined behaviour; a piece of an arena is memory of its own
thread   data races of the pool and of steps; of other libraries nothing is reported

Each sanitizer compiles the kernels once, into the user's cache folder. Quick: the few tests that reach most of it, for
at most 90 s on two cores with everything compiled. Skips a sanitizer that this machine cannot run. Exits with 1 after
a failure; a report is in the output of the test that failed.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from octavo.kernels.cpu import build, library

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 1800
QUICK_TESTS = ("tests/kernels/test_cpu_threads.py", "tests/gpu_worker/test_cpu_random_steps.py")
TESTS = (
    *QUICK_TESTS,
    "tests/kernels/test_cpu_sampling.py",
    "tests/gpu_worker/test_cpu_device.py",
    "tests/gpu_worker/test_cpu_experts.py",
    "tests/gpu_worker/test_cpu_compressed.py",
    "tests/gpu_worker/test_cpu_rowwise.py",
    "tests/gpu_worker/test_cpu_shared_prefix.py",
    "tests/gpu_worker/test_cpu_needed_rows.py",
    "tests/gpu_worker/test_cpu_quantization.py",
    "tests/gpu_worker/test_encoders.py",
)
# They start a process with other kernels, fork, or measure.
LEFT_OUT = "as_long_as_the_process or refuses or lacks or stack or forked or uses_no_processor_time"


@dataclass(frozen=True)
class Sanitizer:
    """How one is compiled in, and run."""

    flags: str
    libraries: tuple[str, ...]
    options: dict[str, str]


SANITIZERS = {
    "address": Sanitizer(
        "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer",
        ("libasan.so", "libubsan.so"),
        {"ASAN_OPTIONS": "detect_leaks=0:exitcode=66", "UBSAN_OPTIONS": "print_stacktrace=1"},
    ),
    "thread": Sanitizer(
        "-O1 -g1 -fsanitize=thread",
        ("libtsan.so",),
        {"TSAN_OPTIONS": "exitcode=66:halt_on_error=1:ignore_noninstrumented_modules=1:report_signal_unsafe=0"},
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="SANITIZER", help=f"{' or '.join(SANITIZERS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="few tests")
    parser.add_argument("--seeds", type=int, default=0, help="of random steps; default: 40, or 2 if quick")
    options = parser.parse_args()
    if unknown := set(options.names) - set(SANITIZERS):
        parser.error(f"there is no sanitizer {', '.join(sorted(unknown))}")
    codes = [
        run(name, options.quick, options.seeds or (2 if options.quick else 40)) for name in options.names or SANITIZERS
    ]
    return max(codes)


def run(name: str, is_quick: bool, num_seeds: int) -> int:
    """Run the tests with one sanitizer; return their exit code, 0 if it cannot be run here."""
    started = time.monotonic()
    sanitizer = SANITIZERS[name]
    preloaded = [path_of(file) for file in sanitizer.libraries]
    environment = {
        **os.environ,
        **sanitizer.options,
        "LD_PRELOAD": " ".join(preloaded),
        "OCTAVO_SANITIZER_FLAGS": sanitizer.flags,
        "OCTAVO_SANITIZER_VARIANT": variant(),
        "OCTAVO_RANDOM_STEP_SEEDS": str(num_seeds),
        "OMP_NUM_THREADS": "1",
    }
    # Addresses as random as newer kernels make them leave the sanitizer of threads no room.
    prefix = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
    python = [*prefix, sys.executable]
    if "" in preloaded or subprocess.run([*python, "-c", ""], env=environment, capture_output=True).returncode != 0:
        print(f"sanitizer {name}: cannot be run on this machine, skipped", flush=True)
        return 0
    pytest = ["-m", "pytest", "-p", "tests.sanitizers.plugin", "-p", "no:cacheprovider", "-q", "-x"]
    command = [*python, *pytest, "-k", f"not ({LEFT_OUT})", *(QUICK_TESTS if is_quick else TESTS)]
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=TIMEOUT_S).returncode
    print(f"sanitizer {name}: {'failed' if code else 'no finding'}, {time.monotonic() - started:.0f} s", flush=True)
    return code


def variant() -> str:
    """Return the variant that is run: the most of the code in vectors, none of it in tiles, which no sanitizer sees."""
    return next(name for name in library.runnable_variants() if name != "amx" and not name.endswith("_vnni"))


def path_of(file: str) -> str:
    """Return where the compiler has a library of its own; nothing if it has none."""
    output = subprocess.run(
        [*build._find_compiler(), f"-print-file-name={file}"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return output if "/" in output else ""


if __name__ == "__main__":
    sys.exit(main())
