"""What a person runs: good starts, and starts that cannot succeed."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ports import free_port

from .stack import Stack


def octavo(*arguments: str, stdin: str | None = None, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "octavo.services.cli", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False)


def serve(model: Path | str, *flags: str) -> subprocess.CompletedProcess[str]:
    address = f"127.0.0.1:{free_port()}"
    return octavo("serve", str(model), "--grpc-address", address, "--http-address=", "--device", "cpu", *flags)


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    output = done.stdout + done.stderr
    assert done.returncode not in (0, None), output
    assert "Traceback" not in output, output
    for word in words:
        assert word in output, output


def test_generate_streams_a_sensible_answer(stack: Stack) -> None:
    done = octavo("generate", "What is the capital of France?", "--address", stack.address, "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_chat_answers_what_is_piped_into_it(stack: Stack) -> None:
    done = octavo("chat", "--address", stack.address, "--temperature", "0", stdin="What is the capital of France?\n")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_a_client_without_a_server_gets_one_clear_line() -> None:
    done = octavo("generate", "hi", "--address", f"127.0.0.1:{free_port()}")
    assert_refused(done)
    assert len(done.stderr.strip().splitlines()) <= 2


def test_processes_have_names_a_person_can_find(stack: Stack) -> None:
    assert {name: len(stack.children(name)) for name in ("gateway", "scheduler", "worker")} == {
        "gateway": 1,
        "scheduler": 1,
        "worker": 1,
    }


def test_a_truncated_gguf_file_is_refused(smollm2: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    with smollm2.open("rb") as source:
        cut.write_bytes(source.read(40_000_000))
    assert_refused(serve(cut), "cut.gguf")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    fake = tmp_path / "fake.gguf"
    fake.write_bytes(b"this is no model" * 1000)
    assert_refused(serve(fake), "fake.gguf")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    assert_refused(serve(tmp_path), "config.json")


def test_a_corrupt_safetensors_file_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert_refused(serve(broken), "model.safetensors")


def test_an_unknown_architecture_is_refused_and_nothing_of_the_folder_runs(tiny_llama: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(tiny_llama, odd)
    config = json.loads((odd / "config.json").read_text())
    config |= {"architectures": ["OddForCausalLM"], "model_type": "odd", "auto_map": {"AutoModel": "modeling_odd.Odd"}}
    (odd / "config.json").write_text(json.dumps(config))
    (odd / "modeling_odd.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w').close()")
    assert_refused(serve(odd), "OddForCausalLM")
    assert not (tmp_path / "marker").exists()


def test_a_busy_port_is_refused_before_anything_starts(smollm2: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = octavo("serve", str(smollm2), "--grpc-address", address, "--device", "cpu")
    assert_refused(done, address.split(":")[1])


def test_too_little_memory_for_the_cache_is_refused(smollm2: Path) -> None:
    assert_refused(serve(smollm2, "--kv-cache-memory", "400KiB"), "kv")


def test_a_tiny_checkpoint_of_the_hub_layout_is_served(tiny_llama: Path) -> None:
    stack = Stack(tiny_llama, "--device", "cpu", "--kv-cache-memory", "16MiB")
    try:
        done = octavo("generate", "--raw", "Hello", "--address", stack.address, "--max-tokens", "5")
        assert done.returncode == 0, done.stderr
    finally:
        assert stack.stop() == 0


@pytest.mark.parametrize("command", ["serve", "gateway", "scheduler", "worker", "chat", "generate"])
def test_help_explains_every_flag(command: str) -> None:
    done = octavo(command, "--help")
    assert done.returncode == 0
    assert "--log-level" in done.stdout or "--address" in done.stdout
