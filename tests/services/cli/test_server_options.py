"""Where a server is, its key and TLS: what is accepted, and what is said when a server does not answer."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from octavo.inference.v1 import model_pb2
from octavo.services.cli import admin, batch, bench, generate, health
from octavo.services.cli.server_options import AccessConfig, ServerConfig
from octavo.services.client import OctavoError
from octavo.services.common.config import parse
from tests.certificates import Authority


def server(**fields: Any) -> ServerConfig:
    return ServerConfig(**fields)


async def explained(config: ServerConfig) -> str:
    async with config.client() as client:
        with pytest.raises(OctavoError) as failure:
            await client.models()
    return config.explain(failure.value)


async def test_nobody_is_told_apart_from_a_server_that_speaks_otherwise(
    gateway: Any, fake: Any, tmp_path: Path
) -> None:
    mine, others = Authority(tmp_path, "mine"), Authority(tmp_path, "others")
    certificate, key = (path.read_bytes() for path in mine.issue("gateway"))
    elsewhere, its_key = (path.read_bytes() for path in mine.issue("elsewhere", names=("example.org",)))

    assert await explained(server(address="127.0.0.1:1")) == (
        "no server at 127.0.0.1:1: start one with `octavo serve`, or name it with --address"
    )
    assert "speaks no TLS" in await explained(server(address=gateway.address, tls_ca=mine.ca))
    async with fake.serve(grpc.ssl_server_credentials([(key, certificate)])) as locked:
        async with server(address=locked.address, tls_ca=mine.ca).client() as client:
            assert [model.name for model in await client.models()] == ["fake"]
        assert "if it speaks TLS, give --tls-ca" in await explained(server(address=locked.address))
        assert "not of an authority in" in await explained(server(address=locked.address, tls_ca=others.ca))
    async with fake.serve(grpc.ssl_server_credentials([(its_key, elsewhere)])) as wrong:
        assert "made out to another name" in await explained(server(address=wrong.address, tls_ca=mine.ca))
    asking = grpc.ssl_server_credentials([(key, certificate)], others.ca.read_bytes(), True)
    async with fake.serve(asking) as mutual:
        message = await explained(server(address=mutual.address, tls_ca=mine.ca))
        assert "it may want --tls-certificate and --tls-key" in message
        shown, private = others.issue("client")
        config = server(address=mutual.address, tls_ca=mine.ca, tls_certificate=shown, tls_key=private)
        async with config.client() as client:
            assert len(await client.models()) == 1


async def test_who_asks_for_operators_is_told_where_they_are_served(gateway: Any, capsys: Any) -> None:
    for address, problem in (
        (gateway.address, f"what listens at {gateway.address} serves something else: "),
        ("127.0.0.1:1", "no server at 127.0.0.1:1: "),
    ):
        config = parse(admin.AdminConfig, ["list", f"--address={address}"], prog="octavo admin", environ={})
        assert await admin._run(config) == 1
        said = capsys.readouterr().err
        assert said.startswith(
            f"octavo admin: {problem}start `octavo gateway` or `octavo scheduler` with --admin-address"
        )
        assert said.count("\n") == 1


@pytest.mark.parametrize("options", [{"api_key": "k-1"}, {"token_file": "key"}])
async def test_a_key_is_sent_from_the_option_or_a_file(gateway: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    (tmp_path / "key").write_text("k-1\n")
    if "token_file" in options:
        options = {"token_file": tmp_path / "key"}
    async with server(address=gateway.address, **options).client() as client:
        await client.generate("Hi")
    assert gateway.metadata[0]["authorization"] == "Bearer k-1"


def test_a_key_that_is_missing_or_wrong_is_said_so() -> None:
    refused = OctavoError(grpc.StatusCode.UNAUTHENTICATED, "no", reason="UNAUTHENTICATED")
    assert "OCTAVO_API_KEY" in server().explain(refused)
    assert "does not accept this API key" in server(api_key="x").explain(refused)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tls-certificate=x"], "--tls-certificate and --tls-key go together"),
        (["--tls-ca=/nowhere"], "--tls-ca: cannot read /nowhere: No such file"),
        ([f"--tls-ca={__file__}"], "is no PEM file"),
        (["--token-file=/dev/null"], "--token-file: /dev/null is empty"),
        (["--address=http://127.0.0.1:8000"], "--address is HOST:PORT of the gRPC API"),
        (["--address=localhost"], "--address needs a port: localhost:50051"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(options: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        generate.main(["generate", "Hi", *options])
    assert message in capsys.readouterr().err


def test_an_address_without_a_host_is_this_machine() -> None:
    assert server(address=":8170").target == "127.0.0.1:8170"


def test_a_url_is_taken_with_and_without_v1() -> None:
    for url in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert AccessConfig().check_url(url) == "http://h:1"
    assert AccessConfig().check_url("http://h:1/base/v1") == "http://h:1/base"
    with pytest.raises(ValueError, match="must begin with http"):
        AccessConfig().check_url("h:1")


def test_tls_is_not_given_up_silently(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="begins with https://"):
        AccessConfig(tls_ca=Authority(tmp_path).ca).check_url("http://h:1")


def test_health_asks_the_usual_address_unless_it_looks_at_a_file() -> None:
    assert parse(health.HealthConfig, [], prog="p", environ={}).address == "127.0.0.1:50051"
    assert parse(health.HealthConfig, ["--alive-file=x"], prog="p", environ={}).address == ""


def test_options_are_called_as_they_were_typed() -> None:
    config = parse(generate.GenerateConfig, ["Hi"], prog="p", environ={})
    error = OctavoError(
        grpc.StatusCode.INVALID_ARGUMENT, "generation.stop.max_new_tokens: must be at least 1", reason="X"
    )
    assert config.explain(error) == "--max-tokens: must be at least 1 (X)"


def octavo(*arguments: str, stdin: bytes = b"", **variables: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "octavo.services.cli", *arguments]
    environment = {**os.environ, **variables}
    return subprocess.run(command, input=stdin, capture_output=True, env=environment, timeout=120, check=False)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["bench", "--address=127.0.0.1:1"], 1, b"octavo bench: no server at 127.0.0.1:1: "),
        (["bench", "--url=http://127.0.0.1:1/v1"], 1, b"octavo bench: http://127.0.0.1:1 does not answer: "),
        (["top", "--address=127.0.0.1:1", "--once"], 1, b"octavo top: no server at 127.0.0.1:1: "),
        (["health", "--address=127.0.0.1:1"], 1, b"octavo health: no server at 127.0.0.1:1: "),
        (["batch", "rum"], 2, b"octavo batch: unknown command 'rum'; did you mean `run`?"),
        (["generate", "-"], 2, b"octavo generate: the prompt is empty"),
    ],
)
def test_a_command_that_cannot_work_says_why_in_one_line(arguments: list[str], status: int, message: bytes) -> None:
    done = octavo(*arguments)
    assert (done.returncode, done.stdout) == (status, b"")
    assert done.stderr.startswith(message)
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("package", ["rich", "grpc_health", "psutil", "aiohttp"])
def test_a_package_that_is_missing_is_named(package: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from importlib.util import find_spec

    from octavo.services.cli.__main__ import main

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find_spec(name))
    commands = {"rich": ["top"], "grpc_health": ["health"], "psutil": ["bench", "demo"], "aiohttp": ["bench"]}
    assert main(commands[package]) == 1
    shown = capsys.readouterr().err
    name = "grpcio-health-checking" if package == "grpc_health" else package
    assert f"{name} is missing: pip install {name}" in shown


async def test_a_measurement_names_the_model_that_is_not_there(gateway: Any) -> None:
    async def said(*options: str) -> bytes:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "octavo.services.cli", "bench", f"--address={gateway.address}", *options, stderr=-1
        )
        return (await process.communicate())[1]

    assert await said("--served-model=x") == b"octavo bench: there is no model x: the server has fake\n"
    gateway.models = [*gateway.models, model_pb2.Model(name="other")]
    assert await said() == b"octavo bench: say which with --served-model: the server has fake, other\n"


def test_measuring_a_running_server_needs_no_psutil(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert bench.main(["bench", "--url=http://127.0.0.1:1"]) == 1
    assert "does not answer" in capsys.readouterr().err


def test_output_that_cannot_be_written_is_one_line() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "octavo.services.cli", "version"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    assert done.stderr == b"octavo version: cannot write the output: No space left on device\n"


def test_a_custom_id_that_comes_again_is_told_once(tmp_path: Path, capsys: Any) -> None:
    from octavo.services.batch.lines import read_lines

    path = tmp_path / "in.jsonl"
    path.write_text("".join(f'{{"custom_id": "{name}", "prompt": "x"}}\n' for name in "abaab"))
    assert len(list(batch._named_once(read_lines(path, {})))) == 5
    assert capsys.readouterr().err.count("line 3 has the custom_id 'a' of an earlier one") == 1
    assert not io.StringIO(capsys.readouterr().err).read()
