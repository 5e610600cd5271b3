"""The examples in other languages, built and run as their README says, against a real server."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .stack import Stack

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples" / "clients"
TOOLS = {
    "node": ("node", "npm"),
    "go": ("go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc"),
    "cpp": ("c++", "protoc", "grpc_cpp_plugin", "pkg-config"),
    "ruby": ("ruby", "protoc", "grpc_ruby_plugin"),
    "java": ("javac", "java", "protoc", "grpc_java_plugin"),
}


@pytest.mark.slow
@pytest.mark.parametrize("language", TOOLS)
def test_a_client_streams_an_answer(stack: Stack, language: str, tmp_path: Path) -> None:
    if missing := [tool for tool in TOOLS[language] if shutil.which(tool) is None]:
        pytest.skip(f"{', '.join(missing)} missing; examples/clients/debian.sh installs what the examples need")
    command = ["make", "-s", "-C", str(EXAMPLES), language, f"ADDRESS={stack.address}", f"BUILD={tmp_path}"]
    # Whoever runs the tests by make hands no jobs or flags of that down.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "The capital of France is Paris." in done.stdout
    assert "8 tokens" in done.stdout
