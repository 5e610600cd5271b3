"""`octavo serve` as a whole, with stand-ins for the processes that it runs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from octavo.gpu_worker.config import WorkerConfig
from octavo.services.cli import addresses
from octavo.services.cli.deployment import Listen, child_specs, take_addresses
from octavo.services.cli.errors import CommandError
from octavo.services.cli.model_source import Model
from octavo.services.cli.serve import run_directory
from octavo.services.cli.serve_config import PROCESSES, ServeConfig, passed_on
from octavo.services.common.config import parse, parse_with, settings_of
from octavo.services.gateway.config import GatewayConfig
from octavo.services.scheduler.config import SchedulerConfig

# A gateway that is healthy, at the address in argv; what it and its siblings do is set by the test.
GATEWAY = """
import sys, time
from concurrent import futures
import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
server = grpc.server(futures.ThreadPoolExecutor(1))
servicer = health.HealthServicer()
servicer.set("", health_pb2.HealthCheckResponse.SERVING)
health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
server.add_insecure_port(sys.argv[1])
server.start()
time.sleep(1000)
"""
SERVE = """
import json, sys
from octavo.services.cli import deployment, serve
from octavo.services.cli.child import ChildSpec

commands = json.loads(sys.argv.pop())

def stand_ins(config, model, listen, folder, metrics=()):
    return [ChildSpec(name, tuple(part.replace("LISTEN", f"unix:{folder}/gateway-0.sock") for part in command), order,
                      progress_flag="--progress-fd" if name == "gateway" else "")
            for order, (name, command) in enumerate(commands.items())]

deployment.child_specs = stand_ins
sys.exit(serve.main(sys.argv))
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "my-model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).touch()
    return folder


class Serve:
    """A running `octavo serve` whose children are stand-ins."""

    running: ClassVar[list[subprocess.Popen[str]]] = []

    def __init__(self, run_folder: Path, model: Path, *options: str, **commands: list[str]) -> None:
        self.run_folder = run_folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(model), "--http-address=", *options, json.dumps(commands)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "XDG_RUNTIME_DIR": str(self.run_folder)},
        )
        self.running.append(self.process)

    async def ready_line(self) -> str:
        assert self.process.stdout
        return await asyncio.wait_for(asyncio.to_thread(self.process.stdout.readline), 60)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    async def end(self) -> tuple[int, str]:
        """Return exit status and stderr once it has ended."""
        _, err = await asyncio.to_thread(self.process.communicate, None, 60)
        return self.process.returncode, err


@pytest.fixture
def run_folder() -> Iterator[Path]:
    """A folder for sockets, whose path must be short: tmp_path is not. Ends what a failed test left running."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        for process in Serve.running:
            process.terminate()
            process.wait(30)
        Serve.running.clear()


async def test_it_says_when_it_is_ready_and_leaves_nothing_when_stopped(run_folder: Path, model: Path) -> None:
    run = Serve(
        run_folder, model, "--grpc-address=127.0.0.1:0", "--device=cpu",
        gateway=[sys.executable, "-c", GATEWAY, "LISTEN"], scheduler=["sleep", "1000"],
    )  # fmt: skip
    line = await run.ready_line()
    assert line.startswith("ready in "), await run.end()
    children = run.children()
    assert len(list(run.run_folder.iterdir())) == 1
    assert (next(run.run_folder.iterdir()).stat().st_mode & 0o777) == 0o700

    run.process.send_signal(signal.SIGTERM)

    status, err = await run.end()
    assert (status, err) == (0, "octavo serve: stopping (again to stop at once)\n")
    assert "s: my-model on cpu, grpc 127.0.0.1:" in line
    assert ", http" not in line
    assert len(children) == 2
    assert not any(child.is_running() for child in children)
    assert list(run.run_folder.iterdir()) == []


# What a gateway reports when it is ready, and when it is told to stop while two calls run.
REPORTS = """
import signal
from octavo.services.common.process import Reports
reports = Reports(int(sys.argv[-1].split("=")[1]))
def stop(*_):
    reports.draining(2, 30.0)
    sys.exit()
signal.signal(signal.SIGTERM, stop)
reports.ready()
"""


async def test_a_stop_says_how_many_requests_are_waited_for_and_how_long(run_folder: Path, model: Path) -> None:
    reporting = GATEWAY.replace("time.sleep", f"{REPORTS}\ntime.sleep")
    run = Serve(run_folder, model, "--grpc-address=127.0.0.1:0", gateway=[sys.executable, "-c", reporting, "LISTEN"])
    assert (await run.ready_line()).startswith("ready in "), await run.end()

    run.process.send_signal(signal.SIGINT)

    assert await run.end() == (
        0,
        "octavo serve: stopping (again to stop at once)\noctavo serve: gateway waits up to 30 s for 2 requests\n",
    )


async def test_a_stop_before_it_is_ready_is_a_stop(run_folder: Path, model: Path) -> None:
    run = Serve(run_folder, model, "--grpc-address=127.0.0.1:0", worker=["sh", "-c", "echo up; sleep 1000"])
    assert run.process.stderr
    assert await asyncio.to_thread(run.process.stderr.readline) == "worker    | up\n"

    run.process.send_signal(signal.SIGINT)

    assert (await run.end())[0] == 0
    assert list(run.run_folder.iterdir()) == []


async def test_a_child_that_fails_at_first_ends_it_with_its_words(run_folder: Path, model: Path) -> None:
    run = Serve(
        run_folder, model, "--grpc-address=127.0.0.1:0", "--log-format=json",
        scheduler=["sleep", "1000"], worker=["sh", "-c", "echo no memory; exit 7"],
    )  # fmt: skip

    status, err = await run.end()

    assert status == 1
    assert '{"process": "worker", "message": "no memory"}' in err
    assert "worker failed while starting (exit status 7): giving up" in err
    assert err.count("no memory") == 1
    assert list(run.run_folder.iterdir()) == []


async def test_a_busy_port_is_one_line_and_nothing_is_started(run_folder: Path, model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        run = Serve(run_folder, model, f"--grpc-address={address}", worker=["sh", "-c", "echo started"])

        assert await run.end() == (
            1,
            f"octavo serve: {address} is in use: stop what listens there, or choose another port\n",
        )


async def test_a_busy_port_and_a_missing_model_are_told_together(run_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        run = Serve(run_folder, Path("/no/model"), f"--grpc-address=127.0.0.1:{port}", worker=["false"])

        status, err = await run.end()

    assert status == 1
    assert [line.split(":")[1].split()[0] for line in err.splitlines()] == ["127.0.0.1", "there"]


async def test_the_http_address_is_free_and_named_when_it_is_ready(run_folder: Path, model: Path) -> None:
    run = Serve(
        run_folder, model, "--grpc-address=127.0.0.1:0", "--http-address=127.0.0.1:0",
        gateway=[sys.executable, "-c", GATEWAY, "LISTEN"],
    )  # fmt: skip

    line = await run.ready_line()

    assert ", http 127.0.0.1:" in line, line
    assert "http 127.0.0.1:0 " not in line


async def test_a_busy_http_port_is_one_line_and_nothing_is_started(run_folder: Path, model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        options = ["--grpc-address=127.0.0.1:0", f"--http-address={address}"]
        run = Serve(run_folder, model, *options, worker=["sh", "-c", "echo started"])

        assert await run.end() == (
            1,
            f"octavo serve: {address} is in use: stop what listens there, or choose another port\n",
        )


def test_one_port_cannot_serve_both_apis() -> None:
    (address,) = addresses.take_free("127.0.0.1:0", 1)
    with pytest.raises(CommandError, match="both gRPC and HTTP"):
        take_addresses(ServeConfig(model="m", grpc_address=address, http_address=address))


async def test_a_missing_model_is_one_line_and_nothing_is_started(run_folder: Path, tmp_path: Path) -> None:
    run = Serve(run_folder, tmp_path / "none", "--grpc-address=127.0.0.1:0", worker=["sh", "-c", "echo started"])

    status, err = await run.end()

    assert status == 1
    assert err.startswith(f"octavo serve: there is no {tmp_path}/none: ")
    assert err.count("\n") == 1


def test_every_option_reaches_its_process_and_is_known_there() -> None:
    config = ServeConfig(
        model="m", device="cpu", kv_cache_memory=1 << 30, max_model_len=512, reflection=False, gateways=2, workers=2,
        max_num_seqs=16, max_waiting=5, max_num_batched_tokens=64, max_prefill_tokens=32, grace_s=7, log_level="debug",
        kv_cache_dtype="fp8",
    )  # fmt: skip
    listen = [Listen("127.0.0.1:1", "127.0.0.1:3"), Listen("127.0.0.1:2", "")]

    specs = child_specs(config, Model(Path("/models/m"), "org/m"), listen, Path("/run/x"))

    built: dict[str, Any] = {}
    for spec in specs:
        kind, *options = spec.command[spec.command.index("octavo.services.cli") + 1 :]
        cls: Any = {"gateway": GatewayConfig, "scheduler": SchedulerConfig, "worker": WorkerConfig}[kind]
        if spec.progress_flag:
            options.append(f"{spec.progress_flag}=9")
        built[spec.name] = parse(cls, options, prog=kind, environ={})
    assert list(built) == ["scheduler", "worker-0", "worker-1", "gateway-0", "gateway-1"]
    scheduler, worker, gateway = built["scheduler"], built["worker-1"], built["gateway-1"]
    assert (scheduler.max_num_seqs, scheduler.max_waiting, scheduler.max_num_batched_tokens) == (16, 5, 64)
    assert (scheduler.max_prefill_tokens, scheduler.grace_s, scheduler.log_level) == (32, 7, "debug")
    assert (worker.worker_id, worker.device, worker.kv_cache_memory) == ("worker-1", "cpu", 1 << 30)
    assert worker.kv_cache_dtype == "fp8"
    assert (worker.model, worker.max_model_len, worker.progress_fd) == ("/models/m", 512, 9)
    assert 2 * worker.num_threads <= max(2, os.cpu_count() or 1)
    assert worker.worker_endpoint == scheduler.worker_endpoint == "ipc:///run/x/scheduler-workers.sock"
    assert (gateway.model_name, gateway.grpc_address, gateway.reflection) == ("org/m", "127.0.0.1:2", False)
    assert (built["gateway-0"].http_address, gateway.http_address) == ("127.0.0.1:3", "")
    assert gateway.scheduler_addresses == (scheduler.scheduler_address,) == ("unix:/run/x/scheduler.sock",)
    order = sorted(specs, key=lambda spec: spec.stop_order)
    assert [spec.name.split("-")[0] for spec in order] == ["gateway", "gateway", "scheduler", "worker", "worker"]


def test_options_of_the_processes_are_passed_on_by_flag_and_file_and_left_to_the_environment(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("tenant-weights: [a=2, b=3]\nmax-recoveries: 5\nbatch-window: 7\n")
    argv = ["m", "--batch-dir=/b", "--num-threads=3", f"--config={tmp_path}/c.yaml", "--no-access-log"]
    environ = {"OCTAVO_BATCH_WINDOW": "9"}
    config, passed = parse_with(ServeConfig, passed_on(), argv, prog="octavo serve", environ=environ)

    specs = child_specs(
        replace(config, passed=passed), Model(Path("/m"), "m"), [Listen("127.0.0.1:1", "127.0.0.1:2")], tmp_path
    )

    built: dict[str, Any] = {}
    for spec in specs:
        kind, *options = spec.command[spec.command.index("octavo.services.cli") + 1 :]
        built[kind] = parse(PROCESSES[kind], options, prog=kind, environ=environ)
    assert built["gateway"].batch_dir == Path("/b")
    assert (built["gateway"].batch_window, built["gateway"].access_log) == (9, False)
    assert (built["scheduler"].tenant_weights, built["scheduler"].max_recoveries) == (("a=2", "b=3"), 5)
    assert built["worker"].num_threads == 3


def test_what_each_process_has_for_itself_is_no_option_of_serve(tmp_path: Path) -> None:
    specs = child_specs(
        ServeConfig(model="m", workers=2), Model(Path("/m"), "m"), [Listen("127.0.0.1:1", "127.0.0.1:2")], tmp_path
    )
    set_here = {flag.split("=")[0][2:].replace("-", "_") for spec in specs for flag in spec.command}
    own = {setting.name for setting in settings_of(ServeConfig)}

    assert {setting.name for setting in passed_on()} & set_here == {"num_threads"}  # only where several share a machine
    for name in ("gateway_id", "worker_id", "rank", "admin_address", "progress_fd", "local_address"):
        assert name not in own | {setting.name for setting in passed_on()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--api-keys=/nonexistent"], "cannot read /nonexistent: No such file or directory"),
        (["--tls-certificate=/c.pem"], "--tls-certificate and --tls-key go together: give both, or neither"),
        (
            ["--max-num-seqs=9", "--max-num-batched-tokens=4"],
            "max_num_batched_tokens (4) must be at least max_num_seqs (9)",
        ),
        (["--tenant-weights=x"], "tenant_weights"),
        (["--batch-dri=x"], "unknown option --batch-dri; did you mean --batch-dir"),
        (["--gateway-id=x"], "unknown option --gateway-id"),
    ],
)
async def test_what_a_process_would_refuse_is_one_line_before_the_model_is_looked_for(
    run_folder: Path, options: list[str], message: str
) -> None:
    run = Serve(run_folder, Path("/no/model"), *options, worker=["sh", "-c", "echo started"])

    status, err = await run.end()

    assert status == 2
    assert message in err
    assert err.count("\n") == 1


async def test_a_variable_that_nothing_reads_is_named_and_what_other_commands_read_is_not(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_DEVISE", "cpu")
    monkeypatch.setenv("OCTAVO_API_KEY", "x")  # of `octavo top`
    monkeypatch.setenv("OCTAVO_TEMPERATURE", "1")  # of `octavo chat`
    monkeypatch.setenv("OCTAVO_TENANT_WEIGHTS", "a=2")  # of the scheduler
    monkeypatch.setenv("OCTAVO_GATEWAY_PORT_50051_TCP_ADDR", "10.0.0.1")  # what a cluster sets
    run = Serve(run_folder, Path("/no/model"), "--grpc-address=127.0.0.1:0", worker=["sh", "-c", "echo started"])

    status, err = await run.end()

    assert status == 1
    first, second = err.splitlines()
    assert first.startswith(
        "octavo serve: warning: OCTAVO_DEVISE in the environment is no setting; did you mean OCTAVO_DEVICE"
    )
    assert "there is no /no/model" in second


async def test_an_address_that_everybody_reaches_without_a_key_is_a_warning(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("[]")
    options = ["--grpc-address=0.0.0.0:0"]
    open_to_all = Serve(run_folder, Path("/no/model"), *options, worker=["sh", "-c", "echo started"])
    with_keys = Serve(run_folder, Path("/no/model"), *options, f"--api-keys={tmp_path}/keys", worker=["false"])

    warned, silent = (await open_to_all.end())[1], (await with_keys.end())[1]

    assert "warning: everybody who reaches 0.0.0.0:" in warned
    assert "warning" not in silent


async def test_what_to_try_next_is_told_below_the_ready_line(run_folder: Path, model: Path) -> None:
    run = Serve(
        run_folder, model, "--grpc-address=127.0.0.1:0", "--http-address=0.0.0.0:0", "--ui",
        gateway=[sys.executable, "-c", GATEWAY, "LISTEN"],
    )  # fmt: skip
    line = await run.ready_line()
    port = line.split("http 0.0.0.0:")[1].split()[0]
    assert run.process.stdout

    told = [run.process.stdout.readline().strip() for _ in range(3)]

    assert told[0] == f"a page to chat:  http://127.0.0.1:{port}/ui"
    assert told[1] == f"OpenAI base_url: http://127.0.0.1:{port}/v1"
    assert told[2].startswith("in a terminal:   octavo chat --address 127.0.0.1:")


async def test_a_stderr_that_nobody_reads_stops_nobody(run_folder: Path, model: Path, tmp_path: Path) -> None:
    talker = f"import sys\nfor _ in range(30_000): print('y' * 99)\nopen({str(tmp_path / 'said')!r}, 'w').close()"
    run = Serve(
        run_folder, model, "--grpc-address=127.0.0.1:0",
        gateway=[sys.executable, "-c", GATEWAY, "LISTEN"],
        worker=["sh", "-c", f"{sys.executable} -c \"$0\"; exec sleep 1000", talker],
    )  # fmt: skip
    assert (await run.ready_line()).startswith("ready in ")
    async with asyncio.timeout(60):
        while not (tmp_path / "said").exists():  # noqa: ASYNC110 - 3 MB, of which a pipe holds 64 KiB
            await asyncio.sleep(0.01)

    run.process.send_signal(signal.SIGTERM)

    assert await asyncio.to_thread(run.process.wait, 60) == 0
    assert run.process.stderr
    assert 0 < len(run.process.stderr.read()) <= 1 << 16


def test_each_scheduler_has_workers_of_its_own_and_every_gateway_knows_all_schedulers(tmp_path: Path) -> None:
    model = Model("m", tmp_path)
    specs = child_specs(ServeConfig(model="m", schedulers=2, workers=2), model, [Listen("127.0.0.1:1", "")], tmp_path)

    def options(name: str) -> dict[str, str]:
        (command,) = [spec.command for spec in specs if spec.name == name]
        return dict(option[2:].split("=", 1) for option in command if option.startswith("--") and "=" in option)

    names = [spec.name for spec in specs]
    assert names == ["scheduler-0", "scheduler-1", "worker-0", "worker-1", "worker-2", "worker-3", "gateway-0"]
    ends = [options(f"worker-{n}")["worker-endpoint"] for n in range(4)]
    assert ends[0] == ends[1] == options("scheduler-0")["worker-endpoint"]
    assert ends[2] == ends[3] == options("scheduler-1")["worker-endpoint"] != ends[0]
    (gateway,) = [spec.command for spec in specs if spec.name == "gateway-0"]
    known = [option.partition("=")[2] for option in gateway if option.startswith("--scheduler-addresses=")]
    assert known == [options(f"scheduler-{n}")["scheduler-address"] for n in range(2)]


def test_an_engine_alone_and_gateways_alone_find_each_other_by_address(tmp_path: Path) -> None:
    model = Model(Path("/models/m"), "m")
    engine = ServeConfig(model="m", gateways=0, scheduler_address="10.0.0.5:50052", trusted_network=True)
    front = ServeConfig(
        model="m", schedulers=0, scheduler_addresses=("10.0.0.5:50052", "file:/x"), resume_key_file=Path("/key")
    )

    scheduler, _ = child_specs(engine, model, [], tmp_path)
    (gateway,) = child_specs(front, model, [Listen("127.0.0.1:1", "")], tmp_path)

    _, *options = scheduler.command[scheduler.command.index("scheduler") :]
    built = parse(SchedulerConfig, [*options, "--progress-fd=9"], prog="scheduler", environ={})
    assert (built.scheduler_address, built.scheduler_id) == ("10.0.0.5:50052", "10.0.0.5:50052")
    assert built.health_address == f"unix:{tmp_path}/scheduler-health.sock"
    _, *options = gateway.command[gateway.command.index("gateway") :]
    found = parse(GatewayConfig, options, prog="gateway", environ={})
    assert found.scheduler_addresses == front.scheduler_addresses
    assert found.resume_key_file == Path("/key")


def test_the_ranks_of_a_worker_live_together_and_each_sees_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    config = ServeConfig(model="m", device="reference", workers=2, tensor_parallel=2)

    specs = child_specs(config, Model(Path("/models/m"), "m"), [Listen("127.0.0.1:1", "")], Path("/run/x"))

    ranks = [spec for spec in specs if spec.unit]
    built = [
        parse(WorkerConfig, spec.command[spec.command.index("worker") + 1 :], prog="w", environ={}) for spec in ranks
    ]
    assert [spec.name for spec in ranks] == ["worker-0.0", "worker-0.1", "worker-1.0", "worker-1.1"]
    assert [spec.unit for spec in ranks] == ["worker-0", "worker-0", "worker-1", "worker-1"]
    assert [(each.worker_id, each.rank, each.world_size) for each in built] == [
        ("worker-0", 0, 2), ("worker-0", 1, 2), ("worker-1", 0, 2), ("worker-1", 1, 2),
    ]  # fmt: skip
    assert [each.rendezvous for each in built] == [f"ipc:///run/x/worker-{n}.sock" for n in (0, 0, 1, 1)]
    assert [bool(spec.progress_flag) for spec in ranks] == [True, False, True, False]
    assert [spec.environment["CUDA_VISIBLE_DEVICES"] for spec in ranks] == ["4", "5", "6", ""]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    specs = child_specs(config, Model(Path("/models/m"), "m"), [Listen("127.0.0.1:1", "")], Path("/run/x"))
    assert [spec.environment["CUDA_VISIBLE_DEVICES"] for spec in specs if spec.unit] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": 0}, "--tensor-parallel must be from 1 to 64, not 0"),
        ({"tensor_parallel": 2, "device": "cpu"}, "--tensor-parallel is not for device cpu"),
        ({"gateways": -1}, "--gateways must be from 0 to 64, not -1"),
        ({"gateways": 0}, "--gateways 0 needs --scheduler-address"),
        ({"schedulers": 0}, "--schedulers 0 and --scheduler-addresses go together"),
        ({"scheduler_addresses": ("a:1",)}, "--schedulers 0 and --scheduler-addresses go together"),
        ({"schedulers": 2, "scheduler_address": "a:1"}, "--scheduler-address is for one scheduler, not 2"),
        ({"workers": 65}, "--workers must be from 1 to 64, not 65"),
        ({"max_model_len": 0}, "--max-model-len must be at least 1, not 0"),
        ({"kv_cache_memory": 0}, "--kv-cache-memory must be positive, not 0"),
        ({"grace_s": -1.0}, "--grace-s must not be negative"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServeConfig(model="m", **options)


def test_free_addresses_are_consecutive_or_any() -> None:
    (first,) = addresses.take_free("127.0.0.1:0", 1)
    host, port = addresses.split(first)
    assert addresses.take_free(f"{host}:{port}", 1) == [first]
    assert len(set(addresses.take_free("127.0.0.1:0", 3))) == 3


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:x", "host:65536", "127.0.0.1:-1"])
def test_what_is_no_address_is_one_line(address: str) -> None:
    with pytest.raises(CommandError, match="is not an address"):
        addresses.split(address)


def test_ports_must_exist() -> None:
    with pytest.raises(CommandError, match="there is no port 65536"):
        addresses.take_free("127.0.0.1:65535", 2)


def test_the_folder_of_a_killed_run_is_removed_and_a_living_ones_is_not(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(run_folder))
    left = run_folder / "octavo-serve-left"
    left.mkdir()
    os.utime(left, (0, 0))
    with run_directory() as living:
        os.utime(living, (0, 0))
        with run_directory() as second:
            assert sorted(run_folder.iterdir()) == sorted([living, second])
    assert list(run_folder.iterdir()) == []


def test_a_folder_that_is_refused_is_told_with_the_command_that_says_more(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "octavo.services.cli", "serve", str(tmp_path), "--device", "reference"]
    command += ["--grpc-address", "127.0.0.1:0", "--http-address", ""]

    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    assert done.returncode == 1
    assert "is not a model that can be served" in done.stderr
    assert f"`octavo model check {tmp_path} --device reference` says whether this model is served here" in done.stderr
