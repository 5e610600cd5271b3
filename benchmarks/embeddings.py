"""Embeds 1,000 sentences with Octavo, sentence-transformers and ONNX Runtime, in turn, with the same weights.

python benchmarks/embeddings.py HOME [--rounds N] [--sentences N] [--threads N] [--model FOLDER]

The peers are installed into an environment below HOME (torch is large: some minutes the first time). Octavo is a whole
deployment on the cpu device, asked over gRPC in one call; the peers run in a process of their own, with the batch
size that is best for them. All keep float32 weights. Printed are the medians of all rounds, in sentences a second
by the clock and by the processor's time (all processes of a contender, the client included), and the ratios: on a
machine that others use, the second is the one to look at, with one thread: threads that wait for each other burn time.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import grpc
import numpy as np
import psutil

from octavo.inference.v1 import embedding_pb2, embedding_pb2_grpc
from octavo.services.cli import demo_model

ROOT = Path(__file__).resolve().parent.parent
WORKLOAD = ROOT / "services" / "bench" / "workloads" / "embeddings.jsonl"
PACKAGES = ["sentence-transformers==6.2.0", "onnxruntime==1.32.0", "onnx==1.23.2", "torch==2.14.1"]
PEERS = ("sentence-transformers", "onnxruntime")
_START_S = 300


class Peer:
    """A process that embeds when told to."""

    def __init__(self, kind: str, home: Path, model: Path, count: int, threads: int) -> None:
        script = ROOT / "benchmarks" / "peers" / "embedders.py"
        command = [
            *_cores(threads),
            home / "venv" / "bin" / "python",
            script,
            kind,
            model,
            WORKLOAD,
            home,
            str(count),
            str(threads),
        ]
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
    """A deployment on the cpu device."""

    name = "octavo"

    def __init__(self, model: Path, count: int, threads: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        command = [
            *_cores(threads),
            sys.executable,
            "-P",
            "-m",
            "octavo.services.cli",
            "serve",
            str(model),
            "--device=cpu",
        ]
        command += [f"--grpc-address={address}", "--http-address="]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self._process.stdout is not None
        while "ready" not in (line := self._process.stdout.readline()):
            if not line:
                raise SystemExit("octavo serve ended")
        channel = grpc.insecure_channel(address, [("grpc.max_receive_message_length", 64 << 20)])
        self._stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)  # type: ignore[no-untyped-call]
        rows = WORKLOAD.read_text().splitlines()[:count]
        inputs = [embedding_pb2.EmbedInput(text=json.loads(row)["text"]) for row in rows]
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
        self._process.terminate()
        self._process.wait()

    def _cpu_s(self) -> float:
        serving = psutil.Process(self._process.pid)
        processes = [psutil.Process(), serving, *serving.children(recursive=True)]
        return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def _cores(count: int) -> list[str]:
    """Return what lets a command use so many cores: each contender takes as many threads as it sees cores."""
    return ["taskset", "--cpu-list", f"0-{count - 1}"]


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
    parser.add_argument("--sentences", type=int, default=1000, help="of the workload, at least 16")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False), help="of each contender")
    parser.add_argument("--model", type=Path, help="the MiniLM folder; default: fetched")
    options = parser.parse_args()
    options.home.mkdir(parents=True, exist_ok=True)
    install(options.home)
    model = options.model or demo_model.fetch(demo_model.cache_dir(), lambda *_: None, demo_model.MINILM)
    count = min(options.sentences, len(WORKLOAD.read_text().splitlines()))
    sizes = (count, options.threads)
    contenders = [Octavo(model, *sizes), *(Peer(kind, options.home, model, *sizes) for kind in PEERS)]
    clock: dict[str, list[float]] = {each.name: [] for each in contenders}
    cpu: dict[str, list[float]] = {each.name: [] for each in contenders}
    vectors = {}
    for _ in range(options.rounds):
        for each in contenders:
            seconds, cpu_s, vectors[each.name] = each.measure()
            clock[each.name].append(count / seconds)
            cpu[each.name].append(count / cpu_s)
    for each in contenders:
        each.close()
    truth = vectors[PEERS[0]]
    print("contender              sentences/s   octavo is   per CPU second   octavo is   least cosine")
    for name in clock:
        rates = [statistics.median(table[name]) for table in (clock, cpu)]
        mine = [statistics.median(table["octavo"]) for table in (clock, cpu)]
        cosine = float((vectors[name] * truth).sum(1).min())
        print(
            f"{name:22} {rates[0]:11.0f}   {mine[0] / rates[0]:8.2f}x   {rates[1]:14.0f}   {mine[1] / rates[1]:8.2f}x"
            f"   {cosine:.7f}"
        )


if __name__ == "__main__":
    main()
