"""Agents and load generators that nobody here wrote, against a gateway with keys and TLS.

What they send is theirs, and long; the scheduler is a fake one, so that what a model makes of it does not matter.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from octavo.common.v1 import common_pb2
from octavo.services.common.api_keys import make_key
from octavo.services.gateway.app import Gateway
from octavo.services.gateway.config import GatewayConfig
from tests.certificates import Authority

ROOT = Path(__file__).resolve().parents[4]
GUIDELLM = ROOT / "build" / "third-party" / "guidellm" / "bin" / "guidellm"
INSTRUCTOR = ROOT / "build" / "third-party" / "instructor" / "bin" / "python"
PYTHON = ROOT / "build" / "third-party" / "bin" / "python"
NODE_PROGRAMS = ROOT / "build" / "third-party" / "node_modules" / ".bin"
ANSWER = "hello from the fake"
CALL = '{"name": "Person", "arguments": {"name": "Ada", "age": 36}}'
TIMEOUT_S = 120
INSTALL = "rm -rf build/third-party/node_modules build/third-party/.installed && make third-party"


def installed(program: Path) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not program.exists(), reason="the clients are not installed: make third-party")


@dataclasses.dataclass
class Site:
    """A gateway that needs a key and speaks TLS, and what it was asked."""

    url: str
    key: str
    ca: Path
    folder: Path
    temporary: Path
    """Of a short path: clients have sockets in it."""
    prompts: list[int] = dataclasses.field(default_factory=list)
    """The length of each prompt."""

    async def run(self, *command: str | Path, **environment: str) -> tuple[int, str]:
        """Run a client in an empty folder; return its exit status and what it printed.

        One that this machine cannot execute skips the test.
        """
        home = Path(tempfile.mkdtemp(dir=self.folder))
        own: Mapping[str, str] = {
            "HOME": str(home),
            "TMPDIR": str(self.temporary),
            "OCTAVO_API_KEY": self.key,
            "SSL_CERT_FILE": str(self.ca),
            "NODE_EXTRA_CA_CERTS": str(self.ca),
            "HF_HUB_OFFLINE": "1",
            "DO_NOT_TRACK": "1",
            **environment,
        }
        try:
            process = await asyncio.create_subprocess_exec(
                *map(str, command),
                cwd=home,
                env={"PATH": os.environ["PATH"], **own},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
        except OSError as error:
            pytest.skip(f"{command[0]} cannot be executed ({error}): {INSTALL}")
        try:
            async with asyncio.timeout(TIMEOUT_S):
                printed, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        return process.returncode, printed.decode(errors="replace")

    async def needs(self, program: Path) -> None:
        """Skip the test if a launcher does not find the program of this machine."""
        status, printed = await self.run(program, "--version")
        if status:
            pytest.skip(f"{program} does not run here ({' '.join(printed.split())[-300:]}): {INSTALL}")


@pytest.fixture
def context() -> int:
    return 1_000_000


@pytest.fixture
async def site(config: GatewayConfig, scheduler: Any, tools: Any, tmp_path: Path) -> AsyncIterator[Site]:
    authority = Authority(tmp_path, "servers")
    certificate, key_file = authority.issue("gateway")
    key, entry = make_key("acme")
    (tmp_path / "keys.yaml").write_text(json.dumps([entry]))
    gateway = Gateway(
        dataclasses.replace(
            config,
            admin_address="",
            http_address="127.0.0.1:0",
            api_keys=tmp_path / "keys.yaml",
            tls_certificate=certificate,
            tls_key=key_file,
            constraint_processes=1,
        )
    )
    await gateway.start()
    temporary = Path(tempfile.mkdtemp())
    site = Site(f"https://127.0.0.1:{gateway.http_port}", key, authority.ca, tmp_path, temporary)
    tokenizer = tools.make_tokenizer()

    async def answer() -> None:
        while True:
            message = await scheduler.received.get()
            if message.WhichOneof("kind") == "submit":
                site.prompts.append(len(message.submit.prompt_token_ids))
                scheduler.admit(message.submit.handle)
                text = CALL if message.submit.constraint.grammar else ANSWER
                token_ids = tokenizer.encode(text, add_special_tokens=False).ids
                count = min(len(token_ids), message.submit.stop.max_new_tokens)
                for token_id in token_ids[: count - 1]:
                    scheduler.tokens(message.submit.handle, [token_id])
                end = common_pb2.FINISH_REASON_END_OF_SEQUENCE
                scheduler.tokens(message.submit.handle, token_ids[count - 1 : count], finish=end)

    answering = asyncio.create_task(answer())
    yield site
    answering.cancel()
    await gateway.stop(0)
    shutil.rmtree(temporary, ignore_errors=True)


@installed(NODE_PROGRAMS / "codex")
async def test_codex_answers_a_question(site: Site) -> None:
    settings = {
        "model": '"tiny"',
        "model_provider": '"octavo"',
        "model_providers.octavo.name": '"Octavo"',
        "model_providers.octavo.base_url": f'"{site.url}/v1"',
        "model_providers.octavo.env_key": '"OCTAVO_API_KEY"',
        "model_providers.octavo.wire_api": '"responses"',
        "model_providers.octavo.request_max_retries": "0",
        "model_providers.octavo.stream_max_retries": "0",
    }
    await site.needs(NODE_PROGRAMS / "codex")
    options = [each for name, value in settings.items() for each in ("-c", f"{name}={value}")]
    command = [NODE_PROGRAMS / "codex", "exec", "--skip-git-repo-check", "-s", "read-only", *options, "Say hello"]
    status, printed = await site.run(*command, CODEX_CA_CERTIFICATE=str(site.ca))

    assert status == 0, printed
    assert ANSWER in printed
    assert site.prompts


@installed(NODE_PROGRAMS / "opencode")
async def test_opencode_answers_a_question(site: Site) -> None:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "Octavo",
        "options": {"baseURL": f"{site.url}/v1", "apiKey": site.key},
        "models": {"tiny": {"name": "tiny", "limit": {"context": 100_000, "output": 64}}},
    }
    await site.needs(NODE_PROGRAMS / "opencode")
    settings = {"provider": {"octavo": provider}, "autoupdate": False, "share": "disabled"}
    status, printed = await site.run(
        NODE_PROGRAMS / "opencode", "run", "--model", "octavo/tiny", "Say hello",
        OPENCODE_CONFIG_CONTENT=json.dumps(settings), OPENCODE_DISABLE_MODELS_FETCH="1",
    )  # fmt: skip

    assert status == 0, printed
    assert ANSWER in printed
    assert site.prompts


@installed(GUIDELLM)
async def test_guidellm_has_no_errors(site: Site) -> None:
    data = site.folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {number}"}) + "\n" for number in range(6)))
    report = site.folder / "report.json"
    backend = {"kind": "openai_http", "target": site.url, "model": "tiny", "api_key": site.key, "verify": False}
    status, printed = await site.run(
        GUIDELLM, "run", "--backend", json.dumps(backend), "--profile", "kind=synchronous",
        "--constraint", "kind=max_requests,count=6", "--data", f"kind=json_file,path={data}",
        "--output", f"kind=json,path={report}", "--disable-console",
    )  # fmt: skip

    assert status == 0, printed
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (6, 0)


@installed(INSTRUCTOR)
async def test_instructor_demands_a_call_of_responses(site: Site) -> None:
    program = ROOT / "tests" / "e2e" / "third_party" / "use_instructor.py"
    status, printed = await site.run(INSTRUCTOR, program, f"{site.url}/v1", "tiny")

    assert status == 0, printed
    assert json.loads(printed.splitlines()[-1]) == {"name": "Ada", "age": 36}


@installed(PYTHON)
async def test_anthropic_s_client_gets_messages_calls_counts_and_its_own_errors(site: Site) -> None:
    program = ROOT / "tests" / "e2e" / "third_party" / "use_anthropic.py"
    status, printed = await site.run(PYTHON, program, site.url, "tiny")

    assert status == 0, printed
    got = json.loads(printed.splitlines()[-1])
    assert got["whole"] == got["streamed"] == got["final"] == ANSWER
    assert got["counted"] == site.prompts[0]
    assert got["call"] == got["streamed_call"] == ["tool_use", "Person", {"name": "Ada", "age": 36}]
    refused = got["refusals"]
    assert [kind for kind, _ in refused.values()] == ["BadRequestError", "NotFoundError", "AuthenticationError"]
    assert "stop_sequences" in refused["field"][1]


@pytest.mark.parametrize(("text", "why"), [("echo", "cannot be executed"), ("#!/bin/sh\necho lost; exit 1", "lost")])
async def test_a_client_that_cannot_run_is_skipped(site: Site, text: str, why: str) -> None:
    program = site.folder / "program"
    program.write_text(text)
    program.chmod(0o755)

    with pytest.raises(pytest.skip.Exception, match=f"{why}.*make third-party"):
        await site.needs(program)
