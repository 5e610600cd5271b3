"""The gateway as a process: how it starts, and how it stops."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from octavo.services.gateway.__main__ import run
from octavo.services.gateway.app import BindError, Gateway
from octavo.services.gateway.config import GatewayConfig

COMMAND = [sys.executable, "-m", "octavo.services.gateway"]


async def test_a_busy_port_is_an_error_and_not_shared(harness: Any, config: GatewayConfig) -> None:
    busy = dataclasses.replace(config, grpc_address=f"127.0.0.1:{harness.gateway.port}", admin_address="")

    with pytest.raises(BindError, match="in use"):
        Gateway(busy)
    gc.collect()  # its servers go while their event loop is there, or gRPC may crash the next test


def test_a_model_that_cannot_be_served_is_one_line_and_exit_status_1(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, str(tmp_path / "none"), "--grpc-address", "127.0.0.1:0"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "does not exist" in done.stderr


def test_a_wrong_setting_is_one_line_that_names_it() -> None:
    done = subprocess.run([*COMMAND, "m", "--grpc-address", "nonsense"], capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "--grpc-address must be host:port" in done.stderr


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_requests", 0),
        ("max_model_len", -1),
        ("grace_s", -1.0),
        ("scheduler_addresses", ("x",)),
        ("grpc_address", ""),
        ("http_max_body_bytes", 0),
        ("http_max_connections", 0),
        ("http_keep_alive_s", 0),
    ],
)
def test_a_setting_out_of_range_names_its_flag(field: str, value: object) -> None:
    with pytest.raises(ValueError, match="--" + field.replace("_", "-")):
        GatewayConfig(model=Path("m"), **{field: value})  # type: ignore[arg-type]


def test_the_served_name_is_the_folder_s_unless_given() -> None:
    assert GatewayConfig(model=Path("/models/Tiny-1B")).served_name == "Tiny-1B"
    assert GatewayConfig(model=Path("/models/tiny.gguf")).served_name == "tiny"
    assert GatewayConfig(model=Path("/models/tiny"), model_name="x").served_name == "x"


@pytest.mark.parametrize("http_address", ["", "127.0.0.1:0"])
def test_sigterm_ends_an_idle_gateway_with_status_0(model_path: Path, http_address: str) -> None:
    config = GatewayConfig(
        model=model_path, grpc_address="127.0.0.1:0", http_address=http_address, scheduler_addresses=("127.0.0.1:1",)
    )

    status = run(config, on_ready=lambda: os.kill(os.getpid(), signal.SIGTERM))

    assert status == 0


def test_the_tokenizer_s_library_starts_no_more_threads_than_asked_for(model_path: Path) -> None:
    """In a process of its own: the library starts them once."""
    program = f"""
import os, signal
from pathlib import Path
from octavo.services.gateway.__main__ import run
from octavo.services.gateway.config import GatewayConfig
from tokenizers import Tokenizer

def on_ready():
    tokenizer = Tokenizer.from_file("{model_path}/tokenizer.json")
    before = len(os.listdir("/proc/self/task"))
    tokenizer.encode_batch(["hello"] * 100)
    print(len(os.listdir("/proc/self/task")) - before)
    os.kill(os.getpid(), signal.SIGTERM)

run(GatewayConfig(model=Path("{model_path}"), grpc_address="127.0.0.1:0", scheduler_addresses=("127.0.0.1:1",),
                  tokenizer_threads=5), on_ready)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)

    assert done.stdout.split() == ["5"], done.stderr
