from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from octavo.kernels.cpu import library
from octavo.kernels.cpu.runtime import Arena, Runtime

TIMEOUT_S = 60
OWN_SIGNALS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGPROF}


def argmax_is_right(runtime: Runtime, num_rows: int = 64) -> bool:
    logits = np.random.default_rng(num_rows).standard_normal((num_rows, 400)).astype(np.float32)
    return bool((runtime.argmax(logits) == logits.argmax(1)).all())


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_every_item_of_many_short_jobs_runs_once(num_threads: int) -> None:
    runtime = Runtime(num_threads=num_threads)

    assert all(argmax_is_right(runtime, num_rows) for num_rows in (0, 1, 2, 3, 40) * 200)


def test_calls_from_several_threads_take_turns() -> None:
    runtime = Runtime(num_threads=3)
    results: list[bool] = []
    callers = [
        threading.Thread(target=lambda: results.append(all(argmax_is_right(runtime) for _ in range(100))))
        for _ in range(4)
    ]

    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(TIMEOUT_S)

    assert results == [True] * 4


def test_a_forked_child_goes_on_alone_and_may_exit() -> None:
    runtime = Runtime(num_threads=4)
    assert argmax_is_right(runtime)
    logits = np.random.default_rng(0).standard_normal((8, 100)).astype(np.float32)

    def check() -> None:
        tokens = runtime.argmax(logits)
        runtime._release()
        os._exit(0 if tokens.tolist() == logits.argmax(1).tolist() else 1)

    child = multiprocessing.get_context("fork").Process(target=check)
    child.start()
    child.join(TIMEOUT_S)

    assert child.exitcode == 0
    assert argmax_is_right(runtime)


def test_an_idle_pool_uses_no_processor_time() -> None:
    runtime = Runtime(num_threads=4)
    argmax_is_right(runtime)

    before = os.times()
    threading.Event().wait(0.3)
    after = os.times()

    assert after.user + after.system - before.user - before.system < 0.1


def test_a_runtime_that_is_dropped_ends_its_threads() -> None:
    library.load()
    before = len(os.listdir("/proc/self/task"))
    runtime = Runtime(num_threads=6)
    assert len(os.listdir("/proc/self/task")) == before + 5

    del runtime

    assert len(os.listdir("/proc/self/task")) == before


def test_the_roofline_reads_what_it_says_and_counts_operations() -> None:
    runtime = Runtime(num_threads=2)
    memory = Arena(runtime)
    address = memory.allocate(1 << 20)

    assert runtime.measure_read(address, 1 << 20) == 1 << 20
    assert runtime.measure_dot(2) == 2 * runtime.measure_dot(1) > 0


def test_memory_is_there_as_long_as_the_process_is() -> None:
    """A worker that is stopped while it starts may still store packed weights, which it reads there."""
    code = """
import atexit, ctypes, os
atexit.register(lambda: os.write(1, (ctypes.c_char * 4).from_address(address)))  # runs last: it comes first
from octavo.kernels.cpu.runtime import Arena, Runtime
arena = Arena(Runtime(num_threads=1))
address = arena.allocate(1 << 24)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=TIMEOUT_S)

    assert (run.stdout, run.stderr) == (bytes(4), b"")


def test_threads_are_there_as_long_as_the_process_is() -> None:
    """A daemon thread may run a step while the interpreter ends."""
    code = """
import atexit
atexit.register(lambda: print(runtime._release.alive, runtime.argmax(logits).tolist()))  # runs last: it comes first
import numpy as np
from octavo.kernels.cpu.runtime import Runtime
runtime = Runtime(num_threads=2)
logits = np.eye(3, dtype=np.float32)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, text=True, timeout=TIMEOUT_S)

    assert (run.stdout, run.stderr) == ("True [0, 1, 2]\n", "")


def test_a_thread_that_the_system_refuses_is_an_error_and_leaves_none_behind() -> None:
    code = """
import os, resource
from octavo.kernels.cpu import library
from octavo.kernels.cpu.runtime import Runtime
runtime = Runtime(num_threads=2)
num_tasks = len(os.listdir("/proc/self/task"))
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (64 << 20),) * 2)
for num_threads in (64, -1):
    try:
        Runtime(num_threads=num_threads)
    except library.KernelError as error:
        print(error)
print(len(os.listdir("/proc/self/task")) - num_tasks)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, text=True, timeout=TIMEOUT_S)

    refused, negative, num_tasks = run.stdout.splitlines()
    assert "of 64; ask for fewer" in refused
    assert "at least one thread, not -1" in negative
    assert num_tasks == "0"


def test_memory_that_a_thread_lacks_is_an_error_and_the_pool_goes_on() -> None:
    code = """
import resource
import numpy as np
from octavo.kernels.cpu.runtime import Runtime
from octavo.kernels.draw import STRUCT
runtime = Runtime(num_threads=2)
logits = np.zeros((2, 20_000_000), np.float32)
draws = np.zeros(2, dtype=STRUCT)
draws["temperature"] = draws["top_p"] = 1
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (40 << 20),) * 2)
try:
    runtime.draw(logits, draws)
except MemoryError as error:
    print(error)
print(runtime.argmax(np.eye(3, dtype=np.float32)).tolist())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, text=True, timeout=TIMEOUT_S)

    assert run.stdout.splitlines() == ["octavo_draw: the system refuses memory", "[0, 1, 2]"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_threads_take_no_signals_but_their_own_faults_and_a_profiler() -> None:
    others = set(os.listdir("/proc/self/task"))
    runtime = Runtime(num_threads=3)
    assert argmax_is_right(runtime)
    tasks = set(os.listdir("/proc/self/task")) - others

    assert len(tasks) == 2
    for task in tasks:
        while not (signals := signals_of(task)):  # until it runs, it takes none at all
            os.sched_yield()
        assert signals == OWN_SIGNALS


def signals_of(task: str) -> set[signal.Signals]:
    """Return the signals that a thread does not block."""
    blocked = int(Path(f"/proc/self/task/{task}/status").read_text().partition("SigBlk:")[2].split()[0], 16)
    numbers = set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}
    return {number for number in numbers if not blocked >> (number - 1) & 1}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_thread_has_the_stack_that_it_needs_whatever_the_system_gives() -> None:
    code = """
from octavo.kernels.cpu.runtime import Runtime
def mapped():
    return int(open("/proc/self/statm").read().split()[0]) * 4096
Runtime(num_threads=1)
before = mapped()
runtime = Runtime(num_threads=5)
print(mapped() - before >= 4 * (4 << 20))
"""
    command = ["sh", "-c", 'ulimit -s 1024 && exec "$0" -c "$1"', sys.executable, code]
    run = subprocess.run(command, capture_output=True, check=False, text=True, timeout=TIMEOUT_S)

    assert run.stdout == "True\n", run.stderr


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_count_what_they_have_done(num_threads: int) -> None:
    runtime = Runtime(num_threads=num_threads)
    counts = [runtime.progress()]
    for _ in range(5):
        assert argmax_is_right(runtime)
        counts.append(runtime.progress())

    assert counts == sorted(set(counts))
    assert runtime.progress() == counts[-1]
