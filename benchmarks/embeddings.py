"""Embeds 1,000 sentences with Octavo, sentence-transformers and ONNX Runtime, in turn, with the same weights.

python benchmarks/embeddings.py HOME [--rounds N] [--workload FILE] [--sentences N] [--threads N] [--model FOLDER]

The peers are installed into an environment below HOME (torch is large: some minutes the first time). Octavo is a whole
deployment on the cpu device, asked over gRPC in one call; the peers run in a process of their own, with the batch
size that is best for them. All keep float32 weights. Printed are the medians of all rounds, in sentences a second
by the clock and by the processor's time (all processes of a contender, the client included), and the ratios: on a
machine that others use, the second is the one to look at, with one thread: threads that wait for each other burn time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import psutil

from octavo.inference.v1 import embedding_pb2, embedding_pb2_grpc
from octavo.services.cli import demo_model
from octavo.services.offline.local_server import LocalServer

ROOT = Path(__file__).resolve().parent.parent
WORKLOAD = ROOT / "services" / "bench" / "workloads" / "embeddings.jsonl"
PACKAGES = ["sentence-transformers==6.2.0", "onnxruntime==1.32.0", "onnx==1.23.2", "torch==2.14.1"]
PEERS = ("sentence-transformers", "onnxruntime")
_START_S = 300


class Peer:
    """A process that embeds when told to."""

    def __init__(self, kind: str, home: Path, model: Path, texts: Path, threads: int) -> None:
        python, script = home / "venv" / "bin" / "python", ROOT / "benchmarks" / "peers" / "embedders.py"
        command = [python, script, kind, model, texts, home, str(threads)]
        self.name = kind
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._batch_size = self._read().split()[1]

    def measure(self) -> tuple[float, float, np.ndarray]:
        """Return the seconds, the processor's seconds and the first vectors."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        result = json.loads(self._read())
        return result["seconds"], result["cpu_s"], np.array(result["vectors"], np.float32)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended; its messages are above")
        return line


class Octavo:
    """A deployment on the cpu device, which ends when this process does."""

    name = "octavo"

    def __init__(self, model: Path, texts: Sequence[str]) -> None:
        self._server = LocalServer(str(model), ["--device=cpu"])
        self._server.__enter__()
        channel = grpc.insecure_channel(self._server.address, [("grpc.max_receive_message_length", 64 << 20)])
        self._stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)  # type: ignore[no-untyped-call]
        inputs = [embedding_pb2.EmbedInput(text=text) for text in texts]
        self._request = embedding_pb2.EmbedRequest(model=model.name, inputs=inputs)
        self.measure()

    def measure(self) -> tuple[float, float, np.ndarray]:
        """Return the seconds, the processor's seconds and the first vectors."""
        started, cpu = time.perf_counter(), self._cpu_s()
        response = self._stub.Embed(self._request, timeout=_START_S)
        vectors = np.stack([np.frombuffer(each.values, "<f4") for each in response.embeddings])
        return time.perf_counter() - started, self._cpu_s() - cpu, vectors[:16]

    def close(self) -> None:
        """Stop the deployment."""
        self._server.close()

    def _cpu_s(self) -> float:
        me = psutil.Process()
        processes = [
            me,
            *(each for each in me.children(recursive=True) if "embedders.py" not in " ".join(each.cmdline())),
        ]
        return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def install(home: Path) -> None:
    """Install the peers, unless they are there."""
    if not (home / "venv" / ".done").exists():
        subprocess.run([sys.executable, "-m", "venv", home / "venv"], check=True)
        python = home / "venv" / "bin" / "python"
        subprocess.run(["nice", "-n", "19", python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        (home / "venv" / ".done").touch()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("home", type=Path, help="where the peers are installed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workload", type=Path, default=WORKLOAD, help="JSONL file with a text in each line")
    parser.add_argument("--sentences", type=int, default=1000, help="of the workload, at least 16")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False), help="of each contender")
    parser.add_argument("--model", type=Path, help="the MiniLM folder; default: fetched")
    options = parser.parse_args()
    options.home.mkdir(parents=True, exist_ok=True)
    install(options.home)
    model = options.model or demo_model.fetch(demo_model.cache_dir(), lambda *_: None, demo_model.MINILM)
    rows = options.workload.read_text().splitlines()[: options.sentences]
    # Each contender takes as many threads as it sees cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    with contextlib.ExitStack() as closing, tempfile.NamedTemporaryFile("w", suffix=".jsonl") as texts:
        texts.write("\n".join(rows) + "\n")
        texts.flush()
        contenders: list[Octavo | Peer] = []
        for make in (
            lambda: Octavo(model, [json.loads(row)["text"] for row in rows]),
            *(partial(Peer, kind, options.home, model, Path(texts.name), options.threads) for kind in PEERS),
        ):
            contenders.append(make())
            closing.callback(contenders[-1].close)
        measured = [[each.measure() for each in contenders] for _ in range(options.rounds)]
    report([each.name for each in contenders], len(rows), measured)


def report(names: Sequence[str], count: int, measured: Sequence[Sequence[tuple[float, float, np.ndarray]]]) -> None:
    """Print medians over the rounds of what each contender measured."""
    truth = measured[0][names.index(PEERS[0])][2]
    rates = {
        name: [statistics.median(count / each[number][kind] for each in measured) for kind in (0, 1)]
        for number, name in enumerate(names)
    }
    print("contender              sentences/s   octavo is   per CPU second   octavo is   least cosine")
    for number, name in enumerate(names):
        (clock, cpu), (my_clock, my_cpu) = rates[name], rates["octavo"]
        cosine = float((measured[0][number][2] * truth).sum(1).min())
        print(f"{name:22} {clock:11.0f}   {my_clock / clock:8.2f}x   {cpu:14.0f}   {my_cpu / cpu:8.2f}x   {cosine:.7f}")


if __name__ == "__main__":
    main()
