"""The whole path from a gateway's stream to the GPU: gRPC, a scheduler process, ZeroMQ, a worker."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from lab import Lab
from loop import Engine, plans_of, replay, requests_of
from models import SMOLLM2, TINY, random_model
from report import Row
from steps import largest_engine, steady

from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.lifetime import Progress
from octavo.gpu_worker.loading.loading import LoadedModel

_NEEDED = ("zmq", "uvloop", "grpc_health", "google.rpc")


def measure_stack(lab: Lab) -> Iterator[Row]:
    """Decode through the scheduler's process and both transports, beside the same plans made beforehand: A B A B."""
    missing = [name for name in _NEEDED if not _is_there(name)]
    if missing:
        yield Row("stack", "scheduler and transport", note=f"skipped: {', '.join(missing)} not installed")
        return
    shape, batch = lab.pick((SMOLLM2, 256), (TINY, 2))
    context, num_new = lab.pick((128, 192), (12, 8))
    loaded = random_model(lab, shape, context + num_new)
    _, engine = largest_engine(lab, loaded, shape, (batch,), context + num_new)
    plans = plans_of(engine, requests_of(shape.vocab_size, batch, context, num_new))
    alone, together = [], []
    for _ in range(2):
        engine.reset()
        alone += steady(replay(engine, plans).decode_us(batch))
        together += steady(_through_the_stack(lab, loaded, engine, batch, context, num_new))
    step, looped = statistics.median(alone), statistics.median(together)
    note = f"{looped:.0f} us a step at the gateway's end, {step:.0f} us without"
    yield Row("stack", f"{shape.name} batch {batch}, decode", 1e6 * batch / looped, "tok/s")
    yield Row("stack", "share of scheduler and transport", 100 * (1 - step / looped), "%", at_most=5.0, note=note)


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


def _through_the_stack(
    lab: Lab, loaded: LoadedModel, engine: Engine, batch: int, context: int, num_new: int
) -> list[float]:
    """Serve the batch once; return the times between steps in microseconds, as a gateway sees them."""
    from octavo.gpu_worker.worker import Worker

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        address, endpoint = f"unix:{folder}/gateways", f"ipc://{folder}/workers"
        limits = engine.limits
        scheduler = subprocess.Popen(
            [
                *(sys.executable, "-m", "octavo.services.scheduler", "--log-level=error"),
                *(f"--scheduler-address={address}", f"--worker-endpoint={endpoint}"),
                *(f"--max-num-seqs={limits.max_running}", f"--max-num-batched-tokens={limits.max_batch_tokens}"),
                f"--max-prefill-tokens={limits.max_batch_tokens}",
            ]
        )
        stack.callback(_end, scheduler)
        config = WorkerConfig(
            model=loaded.model_version,
            device=lab.pick("cuda", "reference"),  # the interpreter stands in for no GPU here
            worker_endpoint=endpoint,
            kv_cache_memory=limits.num_blocks * engine.runner.kv_block_bytes() * lab.pick(1, 2),
        )
        stop = threading.Event()
        worker = Worker(config, "worker", loaded, Progress(-1), stop)
        thread = threading.Thread(target=worker.run)
        thread.start()
        stack.callback(thread.join)
        stack.callback(stop.set)
        client = Path(__file__).parent / "stack_client.py"
        sizes = [str(size) for size in (loaded.model.vocab_size, batch, context, num_new)]
        done = subprocess.run(
            [sys.executable, str(client), address, *sizes], capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout))


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
