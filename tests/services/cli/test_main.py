from __future__ import annotations

import subprocess
import sys

import pytest

from octavo.services.cli.__main__ import COMMANDS, main


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0

    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "usage: octavo COMMAND"),
        (["serv"], "octavo: unknown command 'serv'; did you mean `octavo serve`?"),
        (["qqq"], "octavo: unknown command 'qqq'; `octavo --help` lists the commands"),
    ],
)
def test_what_is_no_command_exits_with_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("octavo ")
    assert main(["version", "x"]) == 2


@pytest.mark.parametrize("command", ["serve", "chat", "generate", "gateway", "scheduler", "worker"])
def test_the_help_of_a_command_needs_neither_torch_nor_grpc(command: str) -> None:
    code = f"""
import sys
from octavo.services.cli.__main__ import main
try:
    main([{command!r}, "--help"])
except SystemExit as end:
    assert end.code == 0
print([name for name in ("torch", "numpy", "grpc", "rich", "huggingface_hub") if name in sys.modules], file=sys.stderr)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert f"usage: octavo {command} [options]" in run.stdout, run.stderr
    assert run.stderr == "[]\n"
