"""The worker's protocol, over a real socket, with a scheduler's end in the test."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import zmq

from octavo.gpu_worker import worker
from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.devices import make_runner
from octavo.gpu_worker.devices.reference.device import ReferenceDevice
from octavo.gpu_worker.engine import count_blocks
from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.lifetime import Progress
from octavo.gpu_worker.loading.loading import LoadedModel, load_model
from octavo.gpu_worker.protocol import PROTOCOL_REVISION
from octavo.gpu_worker.steps.batch import Step
from octavo.gpu_worker.steps.host_runner import HostMemory
from octavo.gpu_worker.steps.runner import Outcome, Runner
from octavo.gpu_worker.steps.runner import Running as RunningStep
from octavo.gpu_worker.worker import Worker
from octavo.worker.v1 import worker_pb2

from .test_batch import column
from .tiny import make_checkpoint

TIMEOUT_MS = 20_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, "llama")
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(folder, "auto", 0, lambda *_: None)


class Scheduler:
    """The scheduler's end of the socket."""

    def __init__(self, path: Path) -> None:
        self.endpoint = f"ipc://{path}"
        self.identity = b""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.bind(self.endpoint)

    def close(self) -> None:
        self._socket.close()
        self._context.term()

    def send(self, epoch: int, revision: int = PROTOCOL_REVISION, **kind: Any) -> None:
        self.send_raw(worker_pb2.WorkerFrame(protocol_revision=revision, epoch=epoch, **kind).SerializeToString())

    def send_raw(self, *parts: bytes) -> None:
        self._socket.send_multipart([self.identity, *parts])

    def expect(self, kind: str, where: Callable[[worker_pb2.WorkerFrame], bool] = lambda _: True) -> Any:
        """Return the next message of a kind; heartbeats and hellos before it are passed over."""
        while True:
            assert self._socket.poll(TIMEOUT_MS), f"no {kind} came"
            self.identity, data = self._socket.recv_multipart()
            frame = worker_pb2.WorkerFrame.FromString(data)
            found = frame.WhichOneof("kind")
            if found == kind and where(frame):
                assert frame.protocol_revision == PROTOCOL_REVISION
                return getattr(frame, kind)
            assert found in ("heartbeat", "worker_hello", kind), f"{found} came instead of {kind}: {frame}"

    def join(self, epoch: int = 1, **limits: int) -> worker_pb2.WorkerReady:
        self.expect("worker_hello")
        fields: dict[str, Any] = {"kv_block_size": 16, "max_batch_tokens": 64, "max_running": 4, "kv_blocks": 20}
        self.send(epoch, worker_config=worker_pb2.WorkerConfig(**{**fields, **limits}))
        ready: worker_pb2.WorkerReady = self.expect("worker_ready", lambda frame: frame.epoch == epoch)
        return ready


class Running:
    """A worker in a thread, and its scheduler."""

    def __init__(self, scheduler: Scheduler, worker: Worker, stop: threading.Event) -> None:
        self.scheduler = scheduler
        self.worker = worker
        self.stop = stop
        self.status: int | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self) -> int | None:
        """Wait for its end; return its exit status."""
        self._thread.join(timeout=TIMEOUT_MS / 1000)
        assert not self._thread.is_alive()
        return self.status

    def _run(self) -> None:
        self.status = self.worker.run()


@pytest.fixture
def running(loaded: LoadedModel, tmp_path: Path) -> Iterator[Running]:
    scheduler = Scheduler(tmp_path / "worker.sock")
    config = WorkerConfig(
        model="unused", device="reference", worker_endpoint=scheduler.endpoint, kv_cache_memory=4 << 20, group_id="g"
    )
    stop = threading.Event()
    running = Running(scheduler, Worker(config, "worker-1", loaded, Progress(-1), stop), stop)
    yield running
    stop.set()
    running.end()
    scheduler.close()


def prompt(step_id: int = 1, slot: int = 0, token_ids: tuple[int, ...] = (5, 6, 7), **update: Any) -> Any:
    """A plan that opens a slot and computes a prompt on block slot + 1."""
    return worker_pb2.StepPlan(
        step_id=step_id,
        num_sequences=1,
        num_tokens=len(token_ids),
        slot_indexes=column(slot),
        query_lengths=column(len(token_ids)),
        context_lengths=column(0),
        token_ids=column(*token_ids),
        block_table_rows=column(slot),
        block_table_counts=column(1),
        block_ids=column(slot + 1),
        sampling_updates=[worker_pb2.SamplingUpdate(**{"slot": slot, "top_p": 1.0, **update})],
        row_flags=bytes([1]),
    )


def next_token(step_id: int, context: int, slot: int = 0) -> Any:
    """A plan that computes the token the slot sampled last."""
    return worker_pb2.StepPlan(
        step_id=step_id,
        num_sequences=1,
        num_tokens=1,
        slot_indexes=column(slot),
        query_lengths=column(1),
        context_lengths=column(context),
        row_flags=bytes([3]),
    )


def tokens(result: worker_pb2.StepResult) -> list[int]:
    found: list[int] = np.frombuffer(result.token_ids, "<u4").tolist()
    return found


def generate(scheduler: Scheduler, epoch: int) -> list[int]:
    """Four greedy tokens, with two plans in flight."""
    scheduler.send(epoch, step_plan=prompt())
    scheduler.send(epoch, step_plan=next_token(2, 3))
    made = tokens(scheduler.expect("step_result"))
    scheduler.send(epoch, step_plan=next_token(3, 4))
    made += tokens(scheduler.expect("step_result"))
    scheduler.send(epoch, step_plan=next_token(4, 5))
    made += tokens(scheduler.expect("step_result"))
    return made + tokens(scheduler.expect("step_result"))


def test_a_worker_introduces_itself_and_joins(running: Running, loaded: LoadedModel) -> None:
    hello = running.scheduler.expect("worker_hello")
    assert (hello.worker_id, hello.world_size, hello.rank, hello.group_id) == ("worker-1", 1, 0, "g")
    assert hello.model_version == loaded.model_version
    assert hello.code_version
    assert running.scheduler.identity == b"worker-1"
    running.scheduler.expect("worker_hello")  # again, until it is answered

    ready = running.scheduler.join()

    assert (ready.kv_blocks, ready.max_model_len, ready.vocab_size) == (20, 304, 320)


def test_steps_are_computed_in_order_and_answered(running: Running, folder: Path) -> None:
    running.scheduler.join()
    made = generate(running.scheduler, 1)

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    true = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert made == true[0, 3:].tolist()
    assert running.scheduler.expect("heartbeat", lambda frame: frame.heartbeat.last_step_id == 4)


def test_results_hold_times_and_log_probabilities(running: Running) -> None:
    running.scheduler.join()
    running.scheduler.send(1, step_plan=prompt(logprobs=2, chosen_logprob=True))

    result = running.scheduler.expect("step_result")

    assert (result.step_id, result.slot_indexes, result.ranks) == (1, column(0), column(1))
    assert result.forward_us > 0
    assert result.sample_us > 0
    assert np.frombuffer(result.candidate_token_ids, "<u4")[0] == tokens(result)[0]
    assert np.frombuffer(result.logprobs, "<f4")[0] == np.frombuffer(result.candidate_logprobs, "<f4")[0] < 0


def test_log_probabilities_of_a_prompt_are_those_of_the_whole_model(running: Running, folder: Path) -> None:
    ids = [5, 6, 7, 8, 9, 10, 11]
    settings = worker_pb2.SamplingUpdate(
        slot=0, top_p=1.0, prompt_logprobs=2, prompt_length=7, history_token_ids=column(*ids)
    )
    parts = ((ids[:4], 0, 0), (ids[4:], 4, 1))  # in two steps: the second one makes a token
    plans = [
        worker_pb2.StepPlan(
            step_id=number,
            num_sequences=1,
            num_tokens=len(part),
            slot_indexes=column(0),
            query_lengths=column(len(part)),
            context_lengths=column(context),
            token_ids=column(*part),
            row_flags=bytes([samples]),
            block_table_rows=column(0) if not context else b"",
            block_table_counts=column(1) if not context else b"",
            block_ids=column(1) if not context else b"",
            sampling_updates=[settings] if not context else [],
        )
        for number, (part, context, samples) in enumerate(parts, 1)
    ]
    assert running.scheduler.join().prompt_logprobs
    for plan in plans:
        running.scheduler.send(1, step_plan=plan)
    results = [running.scheduler.expect("step_result") for _ in plans]

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    true = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    got = np.concatenate([np.frombuffer(result.logprobs, "<f4") for result in results])
    np.testing.assert_allclose(got, true[torch.arange(6), ids[1:]].detach(), atol=1e-4)
    assert [len(result.logprobs) // 4 for result in results] == [4, 2]
    best = np.concatenate([np.frombuffer(result.candidate_token_ids, "<u4") for result in results]).reshape(-1, 2)
    assert best.tolist() == true[:6].topk(2).indices.tolist()
    assert tokens(results[1]) == [int(true[6].argmax())]


def test_a_repeated_step_is_ignored(running: Running) -> None:
    running.scheduler.join()
    for step in (prompt(), prompt(), next_token(2, 3), next_token(2, 3), next_token(3, 4)):
        running.scheduler.send(1, step_plan=step)
    assert [running.scheduler.expect("step_result").step_id for _ in range(3)] == [1, 2, 3]


def test_a_gap_is_a_fault_and_the_worker_joins_again(running: Running) -> None:
    running.scheduler.join()
    running.scheduler.send(1, step_plan=prompt())
    first = tokens(running.scheduler.expect("step_result"))
    running.scheduler.send(1, step_plan=next_token(3, 4))

    fault = running.scheduler.expect("worker_fault")

    assert (fault.reason, fault.step_id, fault.fatal) == ("STEP_GAP", 3, False)
    running.scheduler.send(1, step_plan=next_token(2, 3))  # of the ended epoch: dropped
    running.scheduler.join(epoch=2)
    running.scheduler.send(2, step_plan=prompt())
    assert tokens(running.scheduler.expect("step_result")) == first


def test_a_new_epoch_forgets_slots_and_drops_frames_of_the_old(running: Running) -> None:
    running.scheduler.join()
    made = generate(running.scheduler, 1)
    config = worker_pb2.WorkerConfig(kv_block_size=16, max_batch_tokens=64, max_running=4, kv_blocks=20)
    running.scheduler.send(7, worker_config=config)
    running.scheduler.expect("worker_ready", lambda frame: frame.epoch == 7)
    running.scheduler.send(1, step_plan=next_token(5, 6))

    assert generate(running.scheduler, 7) == made
    assert running.worker.num_dropped == 1


def test_other_limits_build_another_cache(running: Running) -> None:
    running.scheduler.join()
    config = worker_pb2.WorkerConfig(max_batch_tokens=32, max_running=2, kv_blocks=10)
    running.scheduler.send(2, worker_config=config)

    ready = running.scheduler.expect("worker_ready", lambda frame: frame.epoch == 2)

    assert (ready.kv_blocks, ready.max_model_len) == (10, 144)
    assert len(generate(running.scheduler, 2)) == 4


def test_what_is_wrong_with_one_sequence_is_a_fault_of_its_slot_and_the_worker_goes_on(running: Running) -> None:
    running.scheduler.join()
    made = generate(running.scheduler, 1)
    running.scheduler.send(2, worker_config=worker_pb2.WorkerConfig(max_batch_tokens=64, max_running=4, kv_blocks=20))
    running.scheduler.expect("worker_ready", lambda frame: frame.epoch == 2)
    both, bad = prompt(), prompt(slot=1, token_ids=(5, 1_000_000))
    for name in ("slot_indexes", "query_lengths", "context_lengths", "token_ids", "block_table_rows"):
        setattr(both, name, getattr(both, name) + getattr(bad, name))
    for name in ("block_table_counts", "block_ids", "row_flags"):
        setattr(both, name, getattr(both, name) + getattr(bad, name))
    both.num_sequences, both.num_tokens = 2, 5
    both.sampling_updates.extend(bad.sampling_updates)

    running.scheduler.send(2, step_plan=both)
    running.scheduler.send(2, step_plan=next_token(2, 3))
    fault = running.scheduler.expect("worker_fault")
    again = tokens(running.scheduler.expect("step_result"))[:1] + tokens(running.scheduler.expect("step_result"))

    assert (fault.step_id, fault.HasField("slot"), fault.slot, fault.fatal) == (1, True, 1, False)
    assert "token id is not below" in fault.message
    assert again == made[:2]


def test_a_plan_that_breaks_the_contract_is_a_fault(running: Running) -> None:
    running.scheduler.join()
    running.scheduler.send(1, step_plan=prompt(slot=4))

    fault = running.scheduler.expect("worker_fault")

    assert (fault.reason, fault.step_id, fault.fatal) == ("INVALID_PLAN", 1, False)
    running.scheduler.join(epoch=2)


def test_malformed_frames_are_counted_and_dropped(running: Running) -> None:
    running.scheduler.join()
    running.scheduler.send_raw(b"\xff\xff\xff\xff")
    running.scheduler.send_raw(b"")
    running.scheduler.send_raw(b"", b"two parts")
    running.scheduler.send(1, step_plan=prompt())
    running.scheduler.expect("step_result")
    assert running.worker._link.num_malformed == 3


def test_a_fenced_worker_forgets_its_plans_and_says_hello(running: Running) -> None:
    running.scheduler.join()
    running.scheduler.send(1, step_plan=prompt())
    running.scheduler.expect("step_result")
    running.scheduler.send(1, fenced=worker_pb2.Fenced(reason="too slow"))
    running.scheduler.send(1, step_plan=prompt())  # of the epoch that has ended
    running.scheduler.expect("worker_hello")
    running.scheduler.join(epoch=2)
    running.scheduler.send(2, step_plan=prompt())
    assert running.scheduler.expect("step_result").step_id == 1
    assert running.worker.num_dropped == 1


def test_another_protocol_revision_is_refused(running: Running) -> None:
    running.scheduler.expect("worker_hello")
    running.scheduler.send(1, revision=99, worker_config=worker_pb2.WorkerConfig())
    fault = running.scheduler.expect("worker_fault")
    assert fault.reason == "PROTOCOL_REVISION"
    assert f"revision {PROTOCOL_REVISION}, the scheduler 99" in fault.message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kv_block_size": 32}, "hold 16 tokens"),
        ({"weights_sha256": "0" * 16}, "this worker's model is"),
        ({"dtype": "float16"}, "dtype"),
        ({"kv_blocks": 4}, "raise --kv-cache-memory"),
    ],
)
def test_a_configuration_that_cannot_be_met_ends_the_worker(
    running: Running, config: dict[str, Any], message: str
) -> None:
    running.scheduler.expect("worker_hello")
    running.scheduler.send(1, worker_config=worker_pb2.WorkerConfig(**config))

    fault = running.scheduler.expect("worker_fault")

    assert fault.fatal
    assert fault.reason == "CONFIG_REFUSED"
    assert message in fault.message
    assert running.end() == 1


def test_a_device_error_is_fatal(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    running.scheduler.join()

    def fail(*_: object) -> None:
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(ReferenceDevice, "forward", fail)
    running.scheduler.send(1, step_plan=prompt())

    fault = running.scheduler.expect("worker_fault")

    assert (fault.reason, fault.fatal, fault.step_id) == ("DEVICE_FAULT", True, 1)
    assert "on fire" in fault.message
    assert running.end() == 1


def test_out_of_memory_makes_steps_smaller_and_serving_goes_on(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    ready = running.scheduler.join()
    assert ready.max_batch_tokens == 64
    made = generate(running.scheduler, 1)
    for epoch, left in ((2, 32), (3, 16), (4, 8), (5, 4)):
        with monkeypatch.context() as broken:
            broken.setattr(ReferenceDevice, "forward", fail)
            running.scheduler.send(epoch - 1, step_plan=prompt(step_id=5 if epoch == 2 else 1))
            fault = running.scheduler.expect("worker_fault")
        assert (fault.reason, fault.fatal) == ("OUT_OF_MEMORY", False)
        assert f"at most {left} tokens" in fault.message
        assert running.scheduler.join(epoch).max_batch_tokens == left
    assert generate(running.scheduler, 5) == made

    monkeypatch.setattr(ReferenceDevice, "forward", fail)
    running.scheduler.send(5, step_plan=prompt(step_id=5))

    assert running.scheduler.expect("worker_fault").fatal  # as many as there are slots is the least
    assert running.end() == 1


class Held:
    """A runner whose steps end when the test says so."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.steps: list[HeldStep] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def start(self, step: Step) -> HeldStep:
        self.steps.append(HeldStep(self.runner.start(step)))
        return self.steps[-1]


class HeldStep:
    """A step that was started."""

    def __init__(self, step: RunningStep) -> None:
        self.ended = threading.Event()
        self._step = step

    def is_done(self) -> bool:
        return self.ended.is_set()

    def wait(self) -> Outcome:
        assert self.ended.wait(TIMEOUT_MS / 1000)
        return self._step.wait()


def test_two_plans_run_before_the_first_has_a_result(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Held] = []

    def make(*args: Any, **settings: Any) -> Runner:
        held.append(Held(make_runner(*args, **settings)))
        return held[0]

    monkeypatch.setattr("octavo.gpu_worker.engine.make_runner", make)
    running.scheduler.join()
    for plan in (prompt(), next_token(2, 3)):
        running.scheduler.send(1, step_plan=plan)
    # It shows life while they run, and what it has not ended is not reported as done.
    heartbeat = running.scheduler.expect("heartbeat", lambda _: len(held[0].steps) == 2)
    assert heartbeat.last_step_id == 0

    held[0].steps[1].ended.set()
    held[0].steps[0].ended.set()

    assert [running.scheduler.expect("step_result").step_id for _ in range(2)] == [1, 2]
    running.scheduler.send(1, step_plan=next_token(3, 4))
    running.scheduler.expect("heartbeat", lambda _: len(held[0].steps) == 3)
    running.scheduler.send(1, step_plan=next_token(9, 9))  # a gap: what is in flight is nobody's
    assert running.scheduler.expect("worker_fault").reason == "STEP_GAP"
    running.scheduler.join(epoch=2)
    assert len(held[0].steps) == 3


@pytest.fixture
def threads_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "HostThreads", worker.DeviceThread)


def test_one_thread_builds_every_engine_and_starts_every_step(
    threads_of_a_gpu: None, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs of a GPU refer to memory that a library keeps for the thread that captured them."""
    threads: dict[str, set[threading.Thread]] = {"build": set(), "compute": set(), "idle": set()}
    was_idle = threading.Event()
    build, compute, idle = worker.make_engine, ReferenceDevice.forward, HostMemory.use_idle_time

    def noted(kind: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            threads[kind].add(threading.current_thread())
            if kind == "idle":
                was_idle.set()
            return function(*args)

        return call

    monkeypatch.setattr(worker, "make_engine", noted("build", build))
    monkeypatch.setattr(ReferenceDevice, "forward", noted("compute", compute))
    monkeypatch.setattr(HostMemory, "use_idle_time", noted("idle", idle))
    for epoch, kv_blocks in ((1, 20), (2, 19)):
        was_idle.clear()
        running.scheduler.join(epoch, kv_blocks=kv_blocks)
        running.scheduler.send(epoch, step_plan=prompt())
        running.scheduler.expect("step_result")
        assert was_idle.wait(TIMEOUT_MS / 1000)
        running.scheduler.send(epoch, step_plan=next_token(9, 9))  # a gap
        running.scheduler.expect("worker_fault")

    assert all(len(found) == 1 for found in threads.values()), threads
    assert threads["build"] == threads["compute"] == threads["idle"]
    (thread,) = threads["build"]
    running.stop.set()
    running.end()
    thread.join(TIMEOUT_MS / 1000)
    assert not thread.is_alive()


def test_an_engine_is_gone_before_the_next_one_is_built(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both together may take more memory than there is."""
    devices: list[weakref.ref[ReferenceDevice]] = []
    alive: list[int] = []
    build = worker.make_engine

    def make_engine(*args: Any) -> Any:
        alive.append(sum(1 for device in devices if device() is not None))
        engine = build(*args)
        devices.append(weakref.ref(engine.runner._device))  # type: ignore[attr-defined]
        return engine

    monkeypatch.setattr(worker, "make_engine", make_engine)
    gc.collect()
    gc.disable()  # what is gone then is gone at once
    try:
        for epoch, kv_blocks in ((1, 20), (2, 19), (3, 18)):
            running.scheduler.join(epoch, kv_blocks=kv_blocks)
            running.scheduler.send(epoch, step_plan=prompt())
            running.scheduler.expect("step_result")
            running.scheduler.send(epoch, step_plan=next_token(9, 9))  # a gap
            running.scheduler.expect("worker_fault")
    finally:
        gc.enable()

    assert alive == [0, 0, 0]


def test_shutdown_ends_the_worker(running: Running) -> None:
    running.scheduler.join()
    running.scheduler.send(1, shutdown=worker_pb2.Shutdown())
    assert running.end() == 0


def test_a_worker_says_hello_again_when_the_scheduler_falls_silent(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.gpu_worker.worker._SILENCE_S", 0.3)
    running.scheduler.join()
    running.scheduler.expect("worker_hello", lambda frame: frame.epoch == 0)
    running.scheduler.join(epoch=2)


def test_room_for_less_than_a_useful_context_is_refused() -> None:
    assert count_blocks(kv_cache_memory=1000, block_bytes=100, wanted=0) == 10
    assert count_blocks(kv_cache_memory=1000, block_bytes=100, wanted=6) == 6
    with pytest.raises(ModelError, match=r"room for 48 tokens.* from 450 to 500 bytes"):
        count_blocks(kv_cache_memory=450, block_bytes=100, wanted=0)
    with pytest.raises(ModelError, match=r"room for 48 tokens.* from 1200 to 1300 bytes"):
        count_blocks(kv_cache_memory=1200, block_bytes=100, wanted=0, num_groups=3)


def test_the_process_reports_progress_and_ends_on_sigterm(folder: Path, tmp_path: Path) -> None:
    scheduler = Scheduler(tmp_path / "worker.sock")
    read, write = os.pipe()
    command = [sys.executable, "-m", "octavo.gpu_worker", "--model", str(folder), "--device", "reference"]
    command += ["--worker-endpoint", scheduler.endpoint, "--kv-cache-memory", "4MiB", "--progress-fd", str(write)]
    process = subprocess.Popen([*command, "--num-threads", "1"], pass_fds=[write], stderr=subprocess.PIPE, text=True)
    os.close(write)
    try:
        scheduler.join()
        name = Path(f"/proc/{process.pid}/comm").read_text().strip()
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
    finally:
        process.kill()
        scheduler.close()
    with os.fdopen(read) as lines:
        progress = [json.loads(line) for line in lines]
    assert process.returncode == 0, log
    assert name == "octavo worker"
    assert [line["phase"] for line in progress][-3:] == ["load", "join", "ready"]
    assert progress[-3]["done"] > 0


@pytest.mark.parametrize(("given", "used"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_threads_of_torch_are_told_not_to_compute_while_they_wait_before_torch_is_there(
    given: dict[str, str], used: str
) -> None:
    code = """
import os, sys
from octavo.gpu_worker.__main__ import run
from octavo.gpu_worker.config import WorkerConfig
assert "torch" not in sys.modules
run(WorkerConfig(model="/nonexistent", device="reference"))
print(os.environ["OMP_WAIT_POLICY"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**environment, **given})

    assert run.stdout == f"{used}\n", run.stderr


def test_a_model_that_cannot_be_loaded_ends_the_process_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "octavo.gpu_worker", "--model", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "cannot load the model" in result.stderr
    assert "Traceback" not in result.stderr


class StuckStep:
    """Holds the worker up in the middle of its next step, at a product of matrices, until `goes_on` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, product: int = 6) -> None:
        self.goes_on = threading.Event()
        self.is_stuck = threading.Event()
        self._multiply = torch.mm
        self._num_left = product
        monkeypatch.setattr(torch, "mm", self._held_up)

    def _held_up(self, *args: Any, **options: Any) -> Any:
        self._num_left -= 1
        if not self._num_left:
            self.is_stuck.set()
            assert self.goes_on.wait(TIMEOUT_MS / 1000)
        return self._multiply(*args, **options)


def test_a_worker_shows_life_progress_and_processor_time_while_a_step_runs(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.scheduler.join()
    before = running.scheduler.expect("heartbeat", lambda frame: frame.epoch == 1)
    step = StuckStep(monkeypatch)
    running.scheduler.send(1, step_plan=prompt())
    assert step.is_stuck.wait(TIMEOUT_MS / 1000)
    stuck = [running.scheduler.expect("heartbeat") for _ in range(4)][-1]  # the first may be of before
    again = running.scheduler.expect("heartbeat")
    step.goes_on.set()

    assert running.scheduler.expect("step_result").step_id == 1
    assert stuck.progress >= before.progress + 5  # what is done of the step can be seen in it
    assert again.progress == stuck.progress  # and then no more
    assert 0 < before.processor_time_us <= stuck.processor_time_us <= again.processor_time_us
    after = running.scheduler.expect("heartbeat", lambda frame: frame.heartbeat.last_step_id == 1)
    assert after.progress > again.progress


def test_what_comes_while_a_step_runs_for_long_does_not_fill_the_queue(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.scheduler.join()
    step = StuckStep(monkeypatch)
    running.scheduler.send(1, step_plan=prompt())
    assert step.is_stuck.wait(TIMEOUT_MS / 1000)
    for _ in range(20):  # more than the queues of both ends and the system's buffers hold
        for _ in range(900):
            running.scheduler.send(1, heartbeat=worker_pb2.Heartbeat())
        running.scheduler.expect("heartbeat")
    running.scheduler.send(1, step_plan=next_token(2, 3))
    running.scheduler.expect("heartbeat")
    step.goes_on.set()

    assert [running.scheduler.expect("step_result").step_id for _ in range(2)] == [1, 2]
