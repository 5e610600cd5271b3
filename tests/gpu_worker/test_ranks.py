"""A group of ranks is one worker to its scheduler, and starts or ends as a whole."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.distributed.follower import Follower
from octavo.gpu_worker.distributed.ranks import Ranks
from octavo.gpu_worker.engine import Engine
from octavo.gpu_worker.errors import RankError
from octavo.gpu_worker.lifetime import Progress
from octavo.gpu_worker.loading.loading import LoadedModel, load_model
from octavo.gpu_worker.loading.sharding import Sharding
from octavo.gpu_worker.sampling.sampler import Sampler
from octavo.gpu_worker.worker import Worker
from octavo.worker.v1 import worker_pb2
from tests.ports import free_port

from .test_batch import column
from .test_worker import TIMEOUT_MS, Scheduler, generate, next_token, prompt, tokens
from .tiny import make_checkpoint

NUM_RANKS = 3  # so that rank 0 leads more than one


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, "llama", num_attention_heads=6, num_key_value_heads=6, hidden_size=48)
    return path


@pytest.fixture(scope="module")
def parts(folder: Path) -> list[LoadedModel]:
    return [load_model(folder, "auto", 0, lambda *_: None, Sharding(rank, NUM_RANKS)) for rank in range(NUM_RANKS)]


class Rank(threading.Thread):
    """One rank in a thread; `status` is what its process would exit with."""

    def __init__(self, config: WorkerConfig, part: LoadedModel) -> None:
        super().__init__()
        self.stop = threading.Event()
        self.status: int | None = None
        self.error = ""
        self._config = config
        self._part = part
        self.start()

    def run(self) -> None:
        try:
            self.status = self._serve()
        except RankError as error:
            self.error = str(error)

    def _serve(self) -> int:
        if self._config.rank:
            return Follower(self._config, self._part, self.stop).run()
        if self._config.world_size == 1:
            return Worker(self._config, "worker-1", self._part, Progress(-1), self.stop).run()
        ranks = Ranks(self._config, self._part)
        try:
            if not ranks.connect(self.stop):
                return 0
        except RankError:
            ranks.close()
            raise
        return Worker(self._config, "worker-1", self._part, Progress(-1), self.stop, ranks).run()

    def end(self) -> int | None:
        self.join(timeout=TIMEOUT_MS / 1000)
        assert not self.is_alive()
        return self.status


class Group:
    """All ranks, and their scheduler."""

    def __init__(self, folder: Path, parts: list[LoadedModel], **settings: Any) -> None:
        self.scheduler = Scheduler(folder / "worker.sock")
        self._settings: dict[str, Any] = {
            "model": "unused", "device": "reference", "worker_endpoint": self.scheduler.endpoint,
            "kv_cache_memory": 4 << 20, "group_id": "g", "world_size": NUM_RANKS,
            "rendezvous": f"ipc://{folder}/ranks.sock", **settings,
        }  # fmt: skip
        self.ranks = [self.start(rank, part) for rank, part in enumerate(parts)]

    def start(self, rank: int, part: LoadedModel, **settings: Any) -> Rank:
        return Rank(WorkerConfig(**{**self._settings, "rank": rank, **settings}), part)

    def close(self) -> None:
        for rank in self.ranks:
            rank.stop.set()
        for rank in self.ranks:
            rank.end()
        self.scheduler.close()


@pytest.fixture
def group(tmp_path: Path, parts: list[LoadedModel]) -> Iterator[Group]:
    running = Group(tmp_path, parts)
    yield running
    running.close()


def test_a_group_is_one_worker_and_gives_the_tokens_of_one_process(group: Group, folder: Path, tmp_path: Path) -> None:
    hello = group.scheduler.expect("worker_hello")
    assert (hello.worker_id, hello.rank, hello.world_size, hello.group_id) == ("worker-1", 0, NUM_RANKS, "g")
    ready = group.scheduler.join()
    assert (ready.kv_blocks, ready.vocab_size) == (20, 320)
    made = generate(group.scheduler, 1)

    (tmp_path / "alone").mkdir()
    alone = Group(tmp_path / "alone", [load_model(folder, "auto", 0, lambda *_: None)], world_size=1)
    alone.scheduler.join()
    assert generate(alone.scheduler, 1) == made
    alone.close()


def test_all_ranks_forget_with_a_new_epoch_and_build_anew_for_other_limits(group: Group) -> None:
    group.scheduler.join()
    made = generate(group.scheduler, 1)
    same = worker_pb2.WorkerConfig(kv_block_size=16, max_batch_tokens=64, max_running=4, kv_blocks=20)
    group.scheduler.send(2, worker_config=same)
    group.scheduler.expect("worker_ready", lambda frame: frame.epoch == 2)
    assert generate(group.scheduler, 2) == made
    group.scheduler.send(3, worker_config=worker_pb2.WorkerConfig(max_batch_tokens=32, max_running=2, kv_blocks=10))
    assert group.scheduler.expect("worker_ready", lambda frame: frame.epoch == 3).kv_blocks == 10
    assert generate(group.scheduler, 3) == made


def test_a_plan_that_breaks_the_contract_costs_no_rank(group: Group) -> None:
    group.scheduler.join()
    group.scheduler.send(1, step_plan=prompt(slot=4))
    assert group.scheduler.expect("worker_fault").reason == "INVALID_PLAN"
    group.scheduler.join(epoch=2)
    assert len(generate(group.scheduler, 2)) == 4
    group.scheduler.send(2, step_plan=next_token(9, 6))
    assert group.scheduler.expect("worker_fault").reason == "STEP_GAP"
    group.scheduler.join(epoch=3)
    assert len(generate(group.scheduler, 3)) == 4
    assert [rank.status for rank in group.ranks] == [None] * NUM_RANKS


def test_every_rank_draws_the_same_tokens(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[int, list[bytes]] = {}
    lock = threading.Lock()
    sample = Sampler.sample

    def recorded(self: Sampler, *arguments: Any) -> Any:
        sampled = sample(self, *arguments)
        with lock:
            drawn.setdefault(threading.get_ident(), []).append(sampled.token_ids.tobytes())
        return sampled

    monkeypatch.setattr(Sampler, "sample", recorded)
    group.scheduler.join()
    settings = {"temperature": 1.5, "seed": 11, "top_p": 0.9, "repetition_penalty": 1.3, "prompt_length": 3}
    group.scheduler.send(1, step_plan=prompt(**settings, history_token_ids=column(5, 6, 7)))
    for step in range(2, 8):
        group.scheduler.send(1, step_plan=next_token(step, step + 1))
    made = [column(*tokens(group.scheduler.expect("step_result"))) for _ in range(7)]
    group.scheduler.send(1, shutdown=worker_pb2.Shutdown())
    assert [rank.end() for rank in group.ranks] == [0] * NUM_RANKS
    assert list(drawn.values()) == [made] * NUM_RANKS
    assert len(set(made)) > 1


def test_a_rank_that_ends_while_nothing_is_computed_ends_the_group(group: Group) -> None:
    group.scheduler.join()
    group.ranks[1].stop.set()

    fault = group.scheduler.expect("worker_fault")

    assert (fault.reason, fault.fatal, fault.message) == ("RANK_LOST", True, "rank 1 is gone")
    assert group.ranks[0].end() == 1
    group.ranks[2].end()


def test_a_rank_that_fails_in_a_step_ends_the_group(
    tmp_path: Path, parts: list[LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = Group(tmp_path, parts, rank_timeout_s=2.0)  # threads that fail leave their connections open
    group.scheduler.join()
    start = Engine.start

    def fail(self: Engine, plan: worker_pb2.StepPlan) -> None:
        if threading.current_thread() is group.ranks[2]:
            raise MemoryError("rank 2 has none left")
        start(self, plan)

    monkeypatch.setattr(Engine, "start", fail)
    group.scheduler.send(1, step_plan=prompt())

    fault = group.scheduler.expect("worker_fault")

    assert (fault.reason, fault.fatal, fault.step_id) == ("RANK_LOST", True, 1)
    assert [rank.end() for rank in group.ranks] == [1, 1, 1]
    group.close()


def test_ranks_that_differ_are_refused(tmp_path: Path, parts: list[LoadedModel]) -> None:
    group = Group(tmp_path, parts[:1])
    other = LoadedModel(parts[1].model, parts[1].architecture, parts[1].max_model_len, "another")
    group.ranks.append(group.start(1, other))
    assert group.ranks[0].end() is None
    assert group.ranks[0].error.startswith("rank 1 has model_version 'another', rank 0 ")
    group.close()


def test_a_rank_that_starts_over_ends_the_group(group: Group, parts: list[LoadedModel]) -> None:
    group.scheduler.join()
    group.ranks.append(group.start(1, parts[1]))  # as after a crash that nobody noticed
    fault = group.scheduler.expect("worker_fault")
    assert (fault.reason, fault.message) == ("RANK_LOST", "rank 1 starts over")


@pytest.mark.parametrize("killed", [0, 1])
def test_processes_end_with_a_rank_that_is_killed_or_hangs(folder: Path, tmp_path: Path, killed: int) -> None:
    """Rank 0 is killed; rank 1 hangs. Nobody computes: only their signs of life are missing."""
    scheduler = Scheduler(tmp_path / "worker.sock")
    command = [sys.executable, "-m", "octavo.gpu_worker", "--model", str(folder), "--device", "reference"]
    command += ["--worker-endpoint", scheduler.endpoint, "--kv-cache-memory", "4MiB", "--num-threads", "1"]
    command += ["--world-size", "2", "--rendezvous", f"tcp://127.0.0.1:{free_port()}", "--rank-timeout-s", "2"]
    processes = [
        subprocess.Popen([*command, "--rank", str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    try:
        scheduler.join()
        for process in processes:
            addresses = {
                each.laddr.ip for each in psutil.Process(process.pid).net_connections() if each.status == "LISTEN"
            }
            assert addresses == {"127.0.0.1"}
        processes[killed].send_signal(signal.SIGSTOP if killed else signal.SIGKILL)
        _, log = processes[1 - killed].communicate(timeout=30)
        assert processes[1 - killed].returncode == 1
        assert ("rank 0 is gone" if killed == 0 else "rank 1 is silent") in log
    finally:
        for process in processes:
            process.kill()
            process.communicate()
        scheduler.close()


def test_a_model_that_cannot_be_split_ends_each_rank_with_one_line(folder: Path) -> None:
    command = [sys.executable, "-m", "octavo.gpu_worker", "--model", str(folder), "--device", "reference"]
    result = subprocess.run(
        [*command, "--rank", "1", "--world-size", "4"], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1
    assert "6 query heads cannot be split over 4 ranks evenly; this model can be split over 2, 3, 6" in result.stderr
    assert "Traceback" not in result.stderr
