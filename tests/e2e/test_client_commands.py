"""Every command that talks to a server, with a server that has keys and TLS and asks clients for certificates."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from octavo.services.cli.__main__ import COMMANDS
from tests.certificates import Authority

from .stack import Stack

OCTAVO = [sys.executable, "-m", "octavo.services.cli"]


@dataclass
class Locked:
    """A server with everything switched on, and the options that open it."""

    stack: Stack
    ca: list[str]
    certificate: list[str]
    key: str
    requests: Path

    def run(self, *arguments: str, key: bool = True, stdin: str = "") -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OCTAVO_API_KEY": self.key} if key else dict(os.environ)
        return subprocess.run(
            [*OCTAVO, *arguments], input=stdin, capture_output=True, text=True, env=environment, timeout=240,
            check=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def locked(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    folder = tmp_path_factory.mktemp("locked")
    servers, clients = Authority(folder, "servers"), Authority(folder, "clients")
    certificate, private = servers.issue("gateway")
    mine, my_key = clients.issue("client")
    keys = folder / "keys.yaml"
    add = [*OCTAVO, "keys", "add", f"--file={keys}", "--tenant=acme"]
    key = subprocess.run(add, capture_output=True, text=True, check=True).stdout.strip()
    requests = folder / "requests.jsonl"
    requests.write_text('{"custom_id": "a", "prompt": "One"}\n{"custom_id": "a", "prompt": "Two"}\n')
    running = Stack(
        smollm2, "--device=cpu", "--kv-cache-memory=256MiB", f"--api-keys={keys}", f"--tls-certificate={certificate}",
        f"--tls-key={private}", f"--tls-client-ca={clients.ca}",
    )  # fmt: skip
    yield Locked(
        running, [f"--tls-ca={servers.ca}"], [f"--tls-certificate={mine}", f"--tls-key={my_key}"], key, requests
    )
    assert running.stop() == 0
    strangers = [line for line in running.lines if "Handshake failed" in line]
    assert not strangers  # each try without TLS would be one


@dataclass
class Case:
    """A command line, what its last options are, and what has to be on the screen."""

    arguments: list[str]
    over_http: bool = False
    options: list[str] = field(default_factory=list)
    stdin: str = ""
    shows: str = ""


BENCH = ["--case=c1", "--requests=1", "--max-tokens=4", "--repeats=1"]
CASES = [
    Case(["chat"], options=["--max-tokens=4"], stdin="Hello\n"),
    Case(["generate", "Hello"], options=["--max-tokens=4"]),
    Case(["top"], options=["--once", "--interval-s=0.1"], shows="out tok/s"),
    Case(["health"], options=["--generate=2", "--reflection", "--timeout-s=60"], shows="2 tokens from"),
    Case(["bench"], options=BENCH, shows="| c1 "),
    Case(["bench"], over_http=True, options=BENCH, shows="| c1 "),
    Case(["batch", "run"], over_http=True, options=["--max-tokens=4"], shows="2 results, 0 of them failures"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.arguments[0]}{'-http' * case.over_http}")
def test_a_command_works_with_keys_and_tls(locked: Locked, tmp_path: Path, case: Case) -> None:
    url = f"https://127.0.0.1:{locked.stack.http_port}/v1"
    where = f"--url={url}" if case.over_http else f"--address={locked.stack.address}"
    files = [f"--in={locked.requests}", f"--out={tmp_path / 'out.jsonl'}"] if case.arguments[0] == "batch" else []
    command = [*case.arguments, where, *files, *case.options]

    done = locked.run(*command, *locked.ca, *locked.certificate, stdin=case.stdin)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert case.shows in done.stdout
    if files:
        assert "line 2 has the custom_id 'a' of an earlier one" in done.stderr

    no_key = locked.run(*command, *locked.ca, *locked.certificate, key=False, stdin=case.stdin)
    assert no_key.returncode == 1
    assert "the server needs an API key: put it into the environment as OCTAVO_API_KEY" in no_key.stderr

    plain = [argument.replace("https://", "http://") for argument in command]
    no_tls = locked.run(*plain, stdin=case.stdin)
    assert no_tls.returncode == 1
    assert "if it speaks TLS" in no_tls.stderr
    assert no_tls.stderr.count("\n") == 1, no_tls.stderr


def test_a_certificate_that_is_missing_is_named(locked: Locked) -> None:
    done = locked.run("generate", "Hello", f"--address={locked.stack.address}", *locked.ca)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "--tls-certificate and --tls-key" in done.stderr


def test_no_command_that_takes_an_address_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    talking = set()
    for name, (module, _) in COMMANDS.items():
        with contextlib.suppress(SystemExit):
            importlib.import_module(module).main([name, *(["run"] if name == "batch" else []), "--help"])
        if "server:" in capsys.readouterr().out:
            talking.add(name)
    operators = {"admin"}  # speaks to the address of operators, as its own tests do
    assert talking == {case.arguments[0] for case in CASES} | operators
