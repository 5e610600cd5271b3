"""Send a gateway the heaviest requests that it takes, or refuses, and see how long others wait meanwhile.

    python benchmarks/gateway_stalls.py [--repeats 3] [--refusals 10000] [--only WORD]

A gateway alone, without a scheduler: what it does before it submits a request is what is looked at. While one client
sends a request of each kind, another process asks for the list of models every two milliseconds. Printed is for each
kind the longest time that such a call took, and how much of it at most the gateway spent on the processor with one
thread: what is beyond that, a busy machine had other things to do. Both are medians over the repetitions. The first
line is with no heavy request. What must hold:

- no kind of request has a thread compute for more than 50 ms while another call waits
- the memory of the gateway after so many refusals of each kind is at most 5 % above that after the first tenth

Exits with 1 if anything did not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import psutil
from fault_stack import free_port
from google.protobuf.message import Message
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from octavo.inference.v1 import embedding_pb2, generation_pb2, model_pb2, tokenizer_pb2

MAX_STOP_S = 0.05
MAX_GROWTH = 1.05
CONTEXT = 131_072
MIB = 1 << 20
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
OPTIONS = [("grpc.max_send_message_length", 64 * MIB), ("grpc.max_receive_message_length", 64 * MIB)]
Send = Callable[[], str]
"""Sends a request and returns how it was answered."""


def write_model(folder: Path, context: int = CONTEXT, **config: Any) -> Path:
    """Write the files of a model with a byte-level BPE tokenizer of 4,000 tokens."""
    rng = random.Random(1)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(4000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|start|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words)] * 3, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 4000, "max_position_embeddings": context, **config}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0]}))
    return folder


class Gateway:
    """A gateway process, and the clients of it."""

    def __init__(self, model: Path) -> None:
        self.name = model.name
        self.address = f"127.0.0.1:{free_port()}"
        self.http = free_port()
        command = [sys.executable, "-m", "octavo.services.gateway", str(model), f"--grpc-address={self.address}"]
        command += [f"--http-address=127.0.0.1:{self.http}", f"--scheduler-addresses=127.0.0.1:{free_port()}"]
        self._process = subprocess.Popen([*command, "--no-access-log"], stderr=subprocess.DEVNULL)
        self._channel = grpc.insecure_channel(self.address, OPTIONS)
        grpc.channel_ready_future(self._channel).result(60)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def close(self) -> None:
        """End it."""
        self._channel.close()
        self._process.kill()
        self._process.wait()

    @property
    def rss(self) -> int:
        """Its memory, in bytes, that of its child process left out."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def grpc(self, method: str, request: Message) -> Send:
        """Return what makes a call of a method; the request is serialized now."""
        data = request.SerializeToString()
        call = self._channel.unary_unary(f"/octavo.inference.v1.{method}")

        def send() -> str:
            try:
                call(data, timeout=120)
            except grpc.RpcError as error:
                return f"{error.code().name}"
            return "OK"

        return send

    def post(self, path: str, body: bytes | dict[str, Any]) -> Send:
        """Return what posts a body."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()

        def send() -> str:
            connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=120)
            try:
                connection.request("POST", path, data, {"content-type": "application/json"})
                response = connection.getresponse()
                response.read()
                return str(response.status)
            except (BrokenPipeError, ConnectionResetError):
                return "closed"
            finally:
                connection.close()

        return send


def generate(model: str, **fields: Any) -> generation_pb2.GenerateRequest:
    """Return a call of Generate."""
    return generation_pb2.GenerateRequest(generation=generation_pb2.Generation(model=model, **fields))


def chat(model: str, num_messages: int, num_parts: int, text: str = "hi", **fields: Any) -> Message:
    """Return a call of Generate with a long conversation."""
    message = generation_pb2.Message(role="user", parts=[{"text": text}] * num_parts)
    return generate(model, chat=generation_pb2.Chat(messages=[message] * num_messages, **fields))


def heavy(gateway: Gateway) -> Iterator[tuple[str, Send]]:
    """Yield the heaviest requests for a model that generates, at their limits and beyond."""
    name = gateway.name
    words = "hello world and so on " * (8 * MIB // 22)
    ids = [2 + index % 3000 for index in range(MIB)]
    call = gateway.grpc

    def tokenize(*texts: str, **fields: Any) -> Send:
        request = tokenizer_pb2.TokenizeRequest(model=name, texts=texts, **fields)
        return call("TokenizerService/Tokenize", request)

    yield "Tokenize 2 x 1 MiB of words, with offsets", tokenize(words[:MIB], words[:MIB], byte_offsets=True)
    yield "Tokenize 2 x 1 MiB of control characters", tokenize("\x01" * MIB, "\x01" * MIB)
    yield "Tokenize 8 x 256 KiB, with offsets", tokenize(*[words[: MIB // 4]] * 8, byte_offsets=True)
    yield "Tokenize 256 KiB of one word, with offsets", tokenize("ab" * (MIB // 8), byte_offsets=True)
    yield "Tokenize 3 x 4 MiB of words", tokenize(words[: 4 * MIB], words[: 4 * MIB], words[: 4 * MIB])

    def detokenize(*sequences: list[int]) -> Send:
        request = tokenizer_pb2.DetokenizeRequest(model=name, sequences=[{"ids": each} for each in sequences])
        return call("TokenizerService/Detokenize", request)

    yield "Detokenize 1 x 524,288", detokenize(ids[: MIB // 2])
    yield "Detokenize 1,024 x 512", detokenize(*(ids[:512] for _ in range(1024)))
    yield "Detokenize 4 x 1,048,576", detokenize(ids, ids, ids, ids)
    send = partial(call, "GenerationService/Generate")
    yield "Generate, 8 MiB of words", send(generate(name, text=words))
    yield "Generate, 8 MiB of one letter", send(generate(name, text="a" * (8 * MIB)))
    yield "Generate, 8 MiB of control characters", send(generate(name, text="\x01" * (8 * MIB)))
    yield "Generate, prompt of 131,000 tokens", send(generate(name, token_ids={"ids": ids[:131_000]}))
    yield "Generate, 1,048,576 tokens", send(generate(name, token_ids={"ids": ids}))
    stops = [("a" * 200) + letter for letter in string.ascii_lowercase[:8]]
    continued: dict[str, Any] = {"token_ids": {"ids": ids[:64]}, "continue_output": {"ids": ids[:130_000]}}
    yield "Generate, continue_output of 130,000", send(generate(name, **continued))
    yield "the same with stop strings", send(generate(name, **continued, stop={"stop_sequences": stops}))
    yield "the same with a window to resume", send(generate(name, **continued, scheduling={"resume_window_ms": 60_000}))
    yield "the same with a regex", send(generate(name, **continued, constraint={"regex": "(?s:.*)"}))
    yield "chat, 4,096 messages of 64 parts", send(chat(name, 4096, 64))
    yield "chat, 4,096 messages of 1 part", send(chat(name, 4096, 1))
    yield "chat, 100,000 messages", send(chat(name, 100_000, 1))
    tool = json.dumps({"type": "function", "function": {"name": "f", "parameters": {"enum": [[]] * 1_900}}})
    yield "chat, 128 tools of 7 KB of []", send(chat(name, 1, 1, tools_json=[tool] * 128))
    arguments = '{"a":[' + "[]," * 174_000 + "[]]}"
    called = generation_pb2.Message(role="assistant", parts=[{"tool_call": {"name": "f", "arguments_json": arguments}}])
    yield "chat, a tool call of 520 KB of []", send(generate(name, chat={"messages": [called]}))
    calls = [called] * 20
    yield "chat, 20 such tool calls", send(generate(name, chat={"messages": calls}))
    messages = [{"role": "user", "parts": [{"text": text}]} for text in ("a " * 40_000, " b" + " a" * 20_000 + " ")]
    final = generation_pb2.Chat(messages=messages, continue_final_message=True)
    yield "chat, a last message that repeats itself", send(generate(name, chat=final))
    bias = dict.fromkeys(range(300000), 1.0)
    yield "Generate, logit_bias of 300,000", send(generate(name, text="hi", sampling={"logit_bias": bias}))
    wide = {f"p{index}": {"type": "string", "pattern": f"^.{{{index}}}x.*$"} for index in range(1500)}
    for number in range(4):
        schema = {"type": "object", "properties": wide, "title": f"{number} {time.time_ns()}"}
        text = json.dumps(schema)
        yield "Generate, a schema of 64 KB", send(generate(name, text="hi", constraint={"json_schema": text[:65_000]}))
        yield (
            "Generate, a regex that explodes",
            send(generate(name, text="hi", constraint={"regex": f"(a|b)*a(a|b){{{900 + number}}}"})),
        )
        break
    yield from heavy_bodies(gateway)


def heavy_bodies(gateway: Gateway) -> Iterator[tuple[str, Send]]:
    """Yield the heaviest bodies of HTTP requests."""
    head = b'{"model":"%s",' % gateway.name.encode()
    conversation = head + b'"messages":['
    chat_path, complete = "/v1/chat/completions", "/v1/completions"
    post = gateway.post
    yield "HTTP 30 MB of []", post(chat_path, conversation + b"[]," * 10_000_000 + b"[]]}")
    yield "HTTP 15 MB of []", post(chat_path, conversation + b"[]," * 5_000_000 + b"[]]}")
    yield "HTTP 780 KB of []", post(chat_path, conversation + b"[]," * 260_000 + b"[]]}")
    yield "HTTP 400 KB of []", post(chat_path, conversation + b"[]," * 130_000 + b"[]]}")
    yield "HTTP 1.3 MB of {}, as messages", post(chat_path, conversation + b'{"role":"user"},' * 80_000 + b"{}]}")
    yield "HTTP 15 MB of escapes", post(chat_path, head + b'"messages":"' + b"\\n" * 7_500_000 + b'"}')
    names = b",".join(b'"%d":1' % index for index in range(300_000))
    yield "HTTP 300,000 unknown fields", post(chat_path, head + names + b"}")
    yield "HTTP logit_bias of 300,000", post(complete, head + b'"prompt":"a","logit_bias":{' + names + b"}}")
    yield "HTTP 500,000 stop strings", post(complete, head + b'"prompt":"a","stop":[' + b'"x",' * 500_000 + b'"x"]}')
    yield "HTTP prompt of 131,000 tokens", post(complete, head + b'"prompt":[' + b"1234," * 131_000 + b"1]}")
    yield "HTTP prompt of 1,000,000 tokens", post(complete, head + b'"prompt":[' + b"1234," * 1_000_000 + b"1]}")
    texts = b",".join(b'"' + b"ab " * 1000 + b'"' for _ in range(256))
    yield "HTTP 256 prompts", post(complete, head + b'"prompt":[' + texts + b"]}")
    text = "hello world and so on " * (MIB // 22)
    yield (
        "HTTP /tokenize 1 MiB, with texts",
        post("/tokenize", {"model": gateway.name, "prompt": text, "return_token_strs": True}),
    )
    yield (
        "HTTP /tokenize 1 MiB of control characters",
        post("/tokenize", {"model": gateway.name, "prompt": "\x01" * MIB}),
    )
    yield "HTTP /detokenize 500,000", post("/detokenize", {"model": gateway.name, "tokens": [1234] * 500_000})


def heavy_vectors(gateway: Gateway) -> Iterator[tuple[str, Send]]:
    """Yield the heaviest requests for a model for embeddings."""
    words = "hello world and so on " * (4 * MIB // 22)

    def embed(*texts: str) -> Send:
        request = embedding_pb2.EmbedRequest(model=gateway.name, inputs=[{"text": text} for text in texts])
        return gateway.grpc("EmbeddingService/Embed", request)

    def rerank(query: str, *documents: str) -> Send:
        request = embedding_pb2.RerankRequest(model=gateway.name, query=query, documents=documents)
        return gateway.grpc("EmbeddingService/Rerank", request)

    yield "Embed 2,048 x 8 KiB", embed(*(words[:8192] for _ in range(2048)))
    yield "Embed 1 x 1 MiB", embed(words[:MIB])
    yield "Embed 16 x 1 MiB of control characters", embed(*("\x01" * MIB for _ in range(16)))
    ids = [{"token_ids": {"ids": [5] * 512}}] * 2048
    yield (
        "Embed 2,048 x 512 tokens",
        gateway.grpc("EmbeddingService/Embed", embedding_pb2.EmbedRequest(model=gateway.name, inputs=ids)),
    )
    yield "Rerank 2,048 x 8 KiB", rerank("query", *(words[:8192] for _ in range(2048)))
    yield "Rerank 1 x 1 MiB", rerank(words[:MIB], words[:MIB])
    body = {"model": gateway.name, "input": [[5] * 512] * 2048}
    yield "HTTP embeddings of 2,048 x 512 tokens", gateway.post("/v1/embeddings", body)


def refusals(gateway: Gateway) -> Iterator[tuple[str, Send]]:
    """Yield requests that are refused, each for a reason of its own, with a prompt that would be missed."""
    name = gateway.name
    send = partial(gateway.grpc, "GenerationService/Generate")
    ids = {"ids": [40] * 20_000}
    yield "a regex that is none", send(generate(name, token_ids=ids, constraint={"regex": "("}))
    yield "a token that is not in the vocabulary", send(generate(name, token_ids={"ids": [*ids["ids"], 4001]}))
    yield "a model that is not there", send(generate("other", token_ids=ids))
    yield "no scheduler", send(generate(name, token_ids=ids))
    yield "a text beyond the context", send(generate(name, text="\x01" * (CONTEXT + 1)))
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}
    message = {"role": "user", "content": "x" * 20_000}
    body = {"model": name, "messages": [message], "response_format": schema}
    yield "HTTP, a schema that is none", gateway.post("/v1/chat/completions", body)
    yield "HTTP, broken JSON", gateway.post("/v1/chat/completions", b'{"messages": [' + b"{}," * 5000)


def thread_times(pid: int) -> dict[str, float]:
    """Return the seconds of processor time of each thread of a process."""
    times = {}
    for path in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            times[path.name] = int((path / "schedstat").read_text().split()[0]) / 1e9
    return times


def ping(address: str, pid: int, pipe: Connection) -> None:
    """Ask for the list of models every two milliseconds; answer each message with the longest times since the last.

    These are how long a call took, and how long one thread of the gateway computed during a call.
    """
    data = model_pb2.ListModelsRequest().SerializeToString()
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/octavo.inference.v1.ModelService/ListModels")
        longest = computed = 0.0
        while True:
            before, began = thread_times(pid), time.perf_counter()
            call(data, timeout=300, wait_for_ready=True)
            took, after = time.perf_counter() - began, thread_times(pid)
            longest = max(longest, took)
            computed = max(computed, min(took, max(after[thread] - before.get(thread, 0.0) for thread in after)))
            if pipe.poll():
                if not pipe.recv():
                    return
                pipe.send((longest, computed))
                longest = computed = 0.0
            time.sleep(0.002)


def measure(gateway: Gateway, kinds: Iterator[tuple[str, Send]], repeats: int, only: str, idle_s: float) -> float:
    """Print the stops of each kind; return the longest median of what a thread computed."""
    pipe, others = multiprocessing.Pipe()
    pinger = multiprocessing.get_context("spawn").Process(
        target=ping, args=(gateway.address, gateway.pid, others), daemon=True
    )
    pinger.start()

    def longest() -> tuple[float, float]:
        pipe.send(True)
        found: tuple[float, float] = pipe.recv()
        return found

    def idle() -> str:
        time.sleep(idle_s)
        return ""

    longest()
    worst = 0.0
    for name, send in (("nothing else", idle), *kinds):
        if only and only not in name and name != "nothing else":
            continue
        stops, answers = [], set()
        began = time.perf_counter()
        for _ in range(repeats):
            longest()
            answers.add(send())
            stops.append(longest())
        took = (time.perf_counter() - began) / repeats
        waited, computed = (statistics.median(each) for each in zip(*stops, strict=True))
        print(
            f"{name:44} {1000 * waited:6.0f} ms, computed {1000 * computed:6.0f} ms;"
            f" took {took:6.2f} s  {' '.join(sorted(answers))}",
            flush=True,
        )
        worst = max(worst, computed)
    pipe.send(False)
    pinger.join(10)
    return worst


def grow(gateway: Gateway, count: int, only: str) -> float:
    """Print the memory over many refusals of each kind; return by which factor it grew at most."""
    worst = 0.0
    with ThreadPoolExecutor(4) as pool:
        for name, send in refusals(gateway):
            if only and only not in name:
                continue
            first = max(count // 10, 1)
            answers = set(pool.map(lambda _, send=send: send(), range(first)))
            before = gateway.rss
            answers |= set(pool.map(lambda _, send=send: send(), range(count - first)))
            after = gateway.rss
            print(
                f"{name:44} {before / MIB:6.0f} MiB -> {after / MIB:6.0f} MiB after {count}  {' '.join(answers)}",
                flush=True,
            )
            worst = max(worst, after / before)
    return worst


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="of each kind")
    parser.add_argument("--refusals", type=int, default=10_000, help="of each kind")
    parser.add_argument("--only", default="", help="only kinds with this in their names")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        text = Gateway(write_model(Path(folder) / "tiny"))
        stack.callback(text.close)
        worst = measure(text, heavy(text), args.repeats, args.only, 1.0)
        vectors = Gateway(write_model(Path(folder) / "vectors", 32_768, architectures=["BertModel"]))
        stack.callback(vectors.close)
        worst = max(worst, measure(vectors, heavy_vectors(vectors), args.repeats, args.only, 1.0))
        growth = grow(text, args.refusals, args.only) if args.refusals else 1.0
    print(f"longest stop {1000 * worst:.0f} ms (at most {1000 * MAX_STOP_S:.0f}), memory grew by {growth:.3f} at most")
    return int(worst > MAX_STOP_S or growth > MAX_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
