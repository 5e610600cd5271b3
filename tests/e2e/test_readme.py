"""What the README says can be done as it stands."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import grpc
import httpx
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from .stack import Stack

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text()
ADDRESS = "127.0.0.1:50051"


def block(language: str, number: int = 0) -> str:
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return found[number].replace("\\\n", " ")


def test_the_python_example_runs(stack: Stack) -> None:
    code = block("python").replace(ADDRESS, stack.address)
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert re.search(r"^\d+ tokens$", done.stdout, re.MULTILINE)


def test_the_openai_example_runs(stack: Stack) -> None:
    code = block("python", 1).replace("http://127.0.0.1:8000", stack.http_url)
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_the_offline_example_runs() -> None:
    code = block("python", 2)
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_the_grpcurl_example_works(stack: Stack) -> None:
    """With grpcurl where it is installed, else with the same calls: reflection, JSON to message, unary call."""
    words = shlex.split(block("sh").replace(ADDRESS, stack.address))
    assert words[:3] == ["grpcurl", "-plaintext", "-d"]
    body, address, method = words[3:]
    if shutil.which("grpcurl"):
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        answer = json.loads(done.stdout)
    else:
        with grpc.insecure_channel(address) as channel:
            pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
            service, name = method.rsplit("/", 1)
            described = pool.FindServiceByName(service).FindMethodByName(name)
            request = json_format.Parse(body, message_factory.GetMessageClass(described.input_type)())
            reply = message_factory.GetMessageClass(described.output_type)
            call = channel.unary_unary(f"/{method}", request_serializer=None, response_deserializer=reply.FromString)
            answer = json_format.MessageToDict(call(request.SerializeToString()))
    assert "Paris" in answer["candidates"][0]["text"]


def test_the_curl_example_works(stack: Stack) -> None:
    words = shlex.split(block("bash").replace("http://127.0.0.1:8000", stack.http_url))
    assert words[:2] == ["curl", f"{stack.http_url}/v1/chat/completions"]
    headers = dict(word.split(": ") for flag, word in itertools.pairwise(words) if flag == "-H")
    reply = httpx.post(words[1], content=words[words.index("-d") + 1], headers=headers)
    assert "Paris" in reply.json()["choices"][0]["message"]["content"]


def test_the_ten_hops_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", text, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 11))
    for _, where in rows:
        for path, name in re.findall(r"`(\S+\.py)` `(\w+)`", where):
            assert re.search(rf"def {name}\b", (ROOT / path).read_text()), f"{path} has no {name}"
