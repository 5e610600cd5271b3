"""`octavo batch run` and octavo.LLM, with the real model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

import octavo
from octavo.services.client import OctavoError
from octavo.services.offline.local_server import LocalServerError

from .stack import Stack

COMMAND = (sys.executable, "-m", "octavo.services.cli", "batch", "run")


def write_requests(path: Path, count: int) -> None:
    with path.open("w") as file:
        for number in range(count):
            body = {"prompt": f"Number {number} is", "max_tokens": 24, "seed": number}
            file.write(json.dumps({"custom_id": f"n{number}", "url": "/v1/completions", "body": body}) + "\n")


def texts(path: Path) -> dict[str, str]:
    results = [json.loads(line) for line in path.read_text().splitlines()]
    found = {result["custom_id"]: result["response"]["body"]["choices"][0]["text"] for result in results}
    assert len(found) == len(results), "a request has two results"
    return found


def test_a_killed_run_is_resumed(stack: Stack, tmp_path: Path) -> None:
    """kill -9 in the middle; the same command does the rest, and only that."""
    requests, out, whole = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    write_requests(requests, 80)
    command = [*COMMAND, "--in", str(requests), "--url", stack.http_url, "--window", "16"]
    with subprocess.Popen([*command, "--out", str(out)]) as first:
        while not out.exists() or out.read_bytes().count(b"\n") < 20:
            assert first.poll() is None, "it ended too early"
        first.kill()
    kept = out.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert kept.count(b"\n") < 80
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=True)
    assert out.read_bytes().startswith(kept)
    rest = 80 - kept.count(b"\n")
    assert f"80 results, 0 of them failures; {rest} of this run" in done.stdout
    assert len(texts(out)) == 80
    subprocess.run([*command, "--ordered", "--out", str(whole)], check=True)
    assert texts(whole) == texts(out)
    assert list(texts(whole)) == [f"n{number}" for number in range(80)]


def test_failures_are_results(stack: Stack, tmp_path: Path) -> None:
    requests, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text('"Good"\n{"prompt": "x", "temperature": -1}\nnonsense\n')
    command = [*COMMAND, "--in", str(requests), "--out", str(out), "--url", stack.http_url, "--max-tokens", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    found = {result["custom_id"]: result for result in map(json.loads, out.read_text().splitlines())}
    assert found["line-1"]["response"]["body"]["usage"]["completion_tokens"] == 3
    assert found["line-2"]["response"]["body"]["error"]["param"] == "temperature"
    assert found["line-3"]["error"]["code"] == "invalid_line"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--in is missing"),
        (["--in", "/nowhere", "--out", "x"], "there is no file /nowhere"),
        (["--in", __file__, "--out", "/proc/x", "--url", "http://127.0.0.1:9"], "cannot write /proc/x"),
        (["--in", __file__, "--out", "{tmp}/x", "--url", "http://127.0.0.1:9"], "http://127.0.0.1:9 does not answer"),
        (["/nowhere", "--in", __file__, "--out", "{tmp}/x"], "the server did not start: there is no /nowhere"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, arguments: list[str], message: str) -> None:
    command = [*COMMAND, *(argument.format(tmp=tmp_path) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_llm(smollm2: Path) -> None:
    with octavo.LLM(str(smollm2), device="cpu", kv_cache_memory="256MiB") as llm:
        one = llm.generate("The capital of France is", max_new_tokens=8, temperature=0)
        assert "Paris" in one[0].text
        several = llm.generate(["The capital of France is", [1, 2, 3]], max_new_tokens=8, temperature=0)
        assert several[0].text == one[0].text
        assert [result.usage.output_tokens for result in several] == [8, 8]
        chats = [[{"role": "user", "content": text}] for text in ("Hello", "Count to three.")]
        answers = llm.chat(chats, max_new_tokens=8, temperature=0)
        assert llm.chat(chats[1], max_new_tokens=8, temperature=0)[0].text == answers[1].text
        with pytest.raises(OctavoError) as failure:
            llm.generate(["good", "bad"], temperature=-1.0)
        assert failure.value.violations
        each = list(llm.generate_each((f"{number}" for number in range(40)), max_new_tokens=4))
        assert sorted(result.index for result in each) == list(range(40))
        process = psutil.Process(llm.server_pid)
    assert not process.is_running()
    llm.close()


def test_llm_says_why_it_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(LocalServerError, match="is not a model that can be served"):
        octavo.LLM(str(tmp_path))
    with pytest.raises(LocalServerError, match="unknown option --kv-cash-memory"):
        octavo.LLM("demo", kv_cash_memory="1GiB")


def test_the_server_ends_with_its_program(smollm2: Path) -> None:
    """A program that is killed leaves no server behind."""
    code = f"""
        import sys, octavo, psutil
        llm = octavo.LLM({str(smollm2)!r}, device="cpu", kv_cache_memory="256MiB")
        print(*(process.pid for process in psutil.Process().children(recursive=True)), flush=True)
        sys.stdin.read()
    """
    program = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    servers = [psutil.Process(int(pid)) for pid in program.stdout.readline().split()]
    assert len(servers) >= 4
    os.kill(program.pid, signal.SIGKILL)
    program.wait(10)
    for server in servers:
        with contextlib.suppress(psutil.NoSuchProcess):
            server.wait(60)
