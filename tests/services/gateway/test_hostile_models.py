"""Odd and hostile model files: each is refused in one line that says where and what, or is served rightly."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octavo.services.gateway.tokenization.model_files import read_model

from .conftest import make_tokenizer, write_model
from .test_tokenizer import gguf_bytes, gguf_of, sentencepiece_metadata

SERVED = ""
Change = Callable[[Path], object]

# What is changed of a model's folder, and what the line says: the file, the field, what was expected.
# A value in place of a function is written into the file: bytes and texts as they are, fields of JSON merged.
FOLDERS: dict[str, tuple[str, Any, str]] = {
    "text_config a list": ("config.json", {"text_config": [1]}, "config.json: text_config must be an object"),
    "vocab_size a text": ("config.json", {"vocab_size": "x"}, "config.json: vocab_size must be a whole number"),
    "vocab_size a list": ("config.json", {"vocab_size": [272]}, "config.json: vocab_size must be a whole number"),
    "vocab_size infinite": ("config.json", '{"vocab_size": 1e400}', "config.json: vocab_size must be a whole number"),
    "vocab_size below 0": ("config.json", {"vocab_size": -1}, "config.json: vocab_size must be a whole number"),
    "vocab_size 10^9": ("config.json", {"vocab_size": 10**9}, "config.json: vocab_size must be a whole number"),
    "vocab_size 272.0": ("config.json", {"vocab_size": 272.0}, SERVED),
    "context an object": (
        "config.json",
        {"max_position_embeddings": {"a": 1}},
        "max_position_embeddings must be a whole",
    ),
    "context of 300 bits": ("config.json", {"max_position_embeddings": 2**300}, "one of 301 bits"),
    "eos a text": ("config.json", {"eos_token_id": "</s>"}, "config.json: eos_token_id must be a token id"),
    "eos of 70 bits": ("config.json", {"eos_token_id": [0, 2**70]}, SERVED),
    "eos -1": ("config.json", {"eos_token_id": -1}, SERVED),
    "architectures an object": (
        "config.json",
        {"architectures": {"a": 1}},
        "config.json: architectures must be a list",
    ),
    "config nested deeply": ("config.json", "[" * 100_000, "config.json is nested too deeply"),
    "a number of 5,000 digits": ("config.json", '{"vocab_size": ' + "9" * 5000 + "}", "config.json is not JSON"),
    "config in UTF-16": ("config.json", '{"vocab_size": 272}'.encode("utf-16"), "config.json must be UTF-8"),
    "config empty": ("config.json", "", "config.json is not JSON"),
    "config a list": ("config.json", "[]", "config.json must hold a JSON object"),
    "config of 17 MB": ("config.json", b" " * (17 << 20), "config.json must have at most"),
    "temperature NaN": ("generation_config.json", {"temperature": float("nan")}, "temperature must be a number"),
    "temperature 10^400": ("generation_config.json", {"temperature": 10**400}, "temperature must be a number"),
    "temperature below 0": ("generation_config.json", {"temperature": -1}, "generation_config.json: temperature"),
    "top_k 10^10": ("generation_config.json", {"top_k": 10**10}, "generation_config.json: top_k"),
    "top_k a list": ("generation_config.json", {"top_k": [1]}, "generation_config.json: top_k must be a number"),
    "top_p 2": ("generation_config.json", {"top_p": 2}, "generation_config.json: top_p"),
    "tokenizer_config nested deeply": ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json is nested"),
    "template not UTF-8": ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja must be UTF-8"),
    "template a number": (
        "tokenizer_config.json",
        {"chat_template": 1},
        "tokenizer_config.json: chat_template must be",
    ),
    "template half a pair": ("tokenizer_config.json", {"chat_template": "\ud800"}, "chat_template must be Unicode"),
    "template names a list": ("tokenizer_config.json", {"chat_template": [{"name": ["a"], "template": "x"}]}, SERVED),
    "template too long": ("chat_template.jinja", "x" * 300_000, "chat_template.jinja: the chat template is longer"),
    "template does not compile": ("chat_template.jinja", "{% for %}", "chat_template.jinja: the chat template cannot"),
    "template of 3,000 ifs": ("chat_template.jinja", "{% if a %}" * 3000 + "{% endif %}" * 3000, "chat_template.jinja"),
    "template of parentheses": ("chat_template.jinja", "{{ " + "(" * 9**5 + "1" + ")" * 9**5 + " }}", "chat_template"),
    "template of a product": ("chat_template.jinja", "{{ 'x' * 3000000000 }}", SERVED),
    "template of a power": ("chat_template.jinja", "{{ 9 ** 99999999 }}", SERVED),
    "template of a filter": ("chat_template.jinja", "{{ 'x' | indent(1500000000, true) }}", SERVED),
    "template of a power, compiled": (
        "chat_template.jinja",
        "{% autoescape 9 ** 999999999 %}{% endautoescape %}",
        "chat_template.jinja: the chat template takes more than",
    ),
    "tokenizer empty": ("tokenizer.json", "", "tokenizer.json is not a tokenizer"),
    "tokenizer of numbers": ("tokenizer.json", "[1, 2]", "tokenizer.json is not a tokenizer"),
    "prompts without the default": (
        "config_sentence_transformers.json",
        {"default_prompt_name": "q"},
        "config_sentence_transformers.json: default_prompt_name must be one of the prompts",
    ),
}


def few_tokens(definition: dict[str, Any]) -> None:
    definition["model"] |= {"unk_token": "<nope>", "vocab": {"<|end|>": 0, "<|start|>": 1, "a": 2}, "merges": []}


def at(place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Return what sets a part of a tokenizer.json: `a.b` is b of a."""

    def change(definition: dict[str, Any]) -> None:
        *path, name = place.split(".")
        for key in path:
            definition = definition[key]
        definition[name] = value

    return change


def added(token_id: int, content: str, count: int = 1) -> Callable[[dict[str, Any]], None]:
    def change(definition: dict[str, Any]) -> None:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        definition["added_tokens"] += [
            {"id": token_id + index, "content": content + "x" * index, **flags, "special": True}
            for index in range(count)
        ]

    return change


SPLIT = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
TEMPLATE_PROCESSING = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1] * 100_000, "tokens": ["<s>"] * 100_000}},
}
FIXED = {"strategy": {"Fixed": 2**60}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
WORD_PIECE = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": {"a": 0}}
TOKENIZERS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "unk_token missing": (few_tokens, "model.unk_token must be in model.vocab"),
    "WordPiece without its unk_token": (
        at("model", {**WORD_PIECE, "max_input_chars_per_word": 100}),
        "tokenizer.json cannot encode",
    ),
    "merges of no tokens": (at("model.merges", [["q", "qq"]]), "tokenizer.json is not a tokenizer"),
    "a broken pattern": (at("pre_tokenizer", SPLIT), "tokenizer.json is not a tokenizer"),
    "a broken map of characters": (
        at("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "tokenizer.json is not a tokenizer",
    ),
    "truncation to 10^18": (
        at("truncation", {"direction": "Right", "max_length": 10**18, "strategy": "LongestFirst", "stride": 0}),
        SERVED,
    ),
    "padding to 2^60": (at("padding", {**FIXED, "pad_type_id": 0, "pad_token": "<unk>"}), SERVED),
    "an id of 2^32 - 2": (added(2**32 - 2, "<big>"), SERVED),
    "an added token of nothing": (added(300, ""), SERVED),
    "an id below 0": (added(-5, "<low>"), "tokenizer.json is not a tokenizer"),
    "100,000 tokens around a text": (at("post_processor", TEMPLATE_PROCESSING), "tokens of a text of 3 characters"),
    "a megabyte before a text": (
        at("normalizer", {"type": "Prepend", "prepend": "x" * 1_000_000}),
        "normalizer makes 1000003 characters of a text of 3",
    ),
}

GGUF = gguf_of(make_tokenizer(), "gpt-2")
SENTENCES = {**sentencepiece_metadata(prefix=True), "general.architecture": "llama", "llama.context_length": 64}
TOKENS = SENTENCES["tokenizer.ggml.tokens"]
GGUFS: dict[str, tuple[bytes | dict[str, Any], str]] = {
    "empty": (b"", "is not a whole GGUF file"),
    "cut off": (gguf_bytes(GGUF)[:-7], "is not a whole GGUF file"),
    "counts of 2^63": (b"GGUF\x03\0\0\0" + b"\xff" * 16, "the file claims"),
    "no tokens": ({**GGUF, "tokenizer.ggml.tokens": []}, "tokenizer.ggml.tokens"),
    "tokens are numbers": ({**GGUF, "tokenizer.ggml.tokens": [1] * 261}, "tokenizer.ggml.tokens must be a list of str"),
    "bos out of range": (
        {**GGUF, "tokenizer.ggml.bos_token_id": 10**6, "tokenizer.ggml.add_bos_token": True},
        "tokenizer.ggml.bos_token_id must be the id of one of the",
    ),
    "bos a text": ({**GGUF, "tokenizer.ggml.bos_token_id": "x"}, "tokenizer.ggml.bos_token_id must be the id"),
    "unknown out of range": (
        {**SENTENCES, "tokenizer.ggml.unknown_token_id": 10**6},
        "unknown_token_id must be the id",
    ),
    "padding out of range": ({**GGUF, "tokenizer.ggml.padding_token_id": 10**6}, SERVED),
    "eos -1": ({**GGUF, "tokenizer.ggml.eos_token_id": [-1]}, "tokenizer.ggml.eos_token_id must be the id"),
    "eos -1 unsigned": ({**GGUF, "tokenizer.ggml.eos_token_id": 0xFFFFFFFF}, SERVED),
    "a merge of one": ({**GGUF, "tokenizer.ggml.merges": ["nospace"]}, "tokenizer.ggml.merges[0] is 'nospace'"),
    "a merge of no tokens": ({**GGUF, "tokenizer.ggml.merges": ["zz yy"]}, "tokenizer.ggml.merges[0] is 'zz yy'"),
    "merges are numbers": ({**GGUF, "tokenizer.ggml.merges": [1]}, "tokenizer.ggml.merges must be a list of strings"),
    "context a text": ({**GGUF, "llama.context_length": "x"}, "llama.context_length must be a whole number"),
    "template a number": ({**GGUF, "tokenizer.chat_template": 5}, "tokenizer.chat_template must be a text"),
    "temperature a text": ({**GGUF, "general.sampling.temp": "x"}, "general.sampling.temp must be a number"),
    "scores a number": ({**SENTENCES, "tokenizer.ggml.scores": 1}, "tokenizer.ggml.scores"),
    "types a number": ({**GGUF, "tokenizer.ggml.token_type": 1}, "tokenizer.ggml.token_type"),
    "scores NaN": ({**SENTENCES, "tokenizer.ggml.scores": [float("nan")] * len(TOKENS)}, SERVED),
    "a token of 400,000 characters": (
        {**SENTENCES, "tokenizer.ggml.tokens": [*TOKENS[:-1], "ab" * 200_000]},
        f"tokenizer.ggml.tokens[{len(TOKENS) - 1}] has 400000 characters",
    ),
    "a token twice": ({**SENTENCES, "tokenizer.ggml.tokens": [*TOKENS[:-1], "a"]}, SERVED),
    "an architecture of numbers": ({**GGUF, "general.architecture": [1]}, "does not say how long its context is"),
}


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def dangling(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/nonexistent")


KINDS = {
    f"{name} {kind.__name__}": (name, kind, f"{name} " + ("is a link to" if kind is dangling else "must be a file"))
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "modules.json")
    for kind in (fifo, folder, dangling)
    if name != "modules.json"
} | {f"notes.json {kind.__name__}": ("notes.json", kind, SERVED) for kind in (fifo, folder, dangling)}


def write(path: Path, value: Any) -> None:
    """Write a file, or merge fields into one."""
    if callable(value):
        value(path)
    elif isinstance(value, bytes):
        path.write_bytes(value)
    elif isinstance(value, str):
        path.write_text(value)
    else:
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**before, **value}))


def cases(root: Path) -> dict[str, tuple[Path, str]]:
    """Write all models; return where each is and what is said of it."""
    made = {}
    for name, (file, value, says) in {**FOLDERS, **KINDS}.items():
        path = write_model(root / f"folder {name.replace('/', ' ')}")
        if file == "config_sentence_transformers.json":
            write(path / "config.json", {"architectures": ["TinyModel"]})
        write(path / file, value)
        made[f"folder: {name}"] = (path, says)
    for name, (change, says) in TOKENIZERS.items():
        path = write_model(root / f"tokenizer {name.replace('/', ' ')}")
        definition = json.loads((path / "tokenizer.json").read_text())
        change(definition)
        (path / "tokenizer.json").write_text(json.dumps(definition))
        made[f"tokenizer: {name}"] = (path, says)
    for name, (content, says) in GGUFS.items():
        path = root / f"{name.replace('/', ' ')}.gguf"
        path.write_bytes(content if isinstance(content, bytes) else gguf_bytes(copy.deepcopy(content)))
        made[f"gguf: {name}"] = (path, says)
    return made


# Runs gateways in forks of one process, which has imported all there is to import. One that is ready ends at once.
DRIVER = """
import json, logging, os, resource, signal, sys
from pathlib import Path
from octavo.services.common import logging as logs
from octavo.services.gateway.__main__ import run
from octavo.services.gateway.config import GatewayConfig

for line in sys.stdin:
    path = Path(json.loads(line))
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(into, 2)
        os.close(out)
        os.close(into)
        signal.alarm(60)
        logs.setup("warning", "gateway")
        config = GatewayConfig(model=path, grpc_address="127.0.0.1:0", scheduler_addresses=("127.0.0.1:1",),
                               admin_address="127.0.0.1:0", constraint_processes=0)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        status = run(config, lambda: os.kill(os.getpid(), signal.SIGTERM))
        logging.shutdown()
        both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        peak = max(resource.getrusage(who).ru_maxrss - before for who in both)
        os.write(2, f"\\nPEAK {peak}".encode())
        os._exit(status)
    os.close(into)
    text = b""
    while piece := os.read(out, 65536):
        text += piece
    os.close(out)
    _, status = os.waitpid(pid, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), text.decode(errors="replace")]), flush=True)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str, int, str]]:
    """What each case is, says, ends with and writes to stderr."""
    models = cases(tmp_path_factory.mktemp("models"))
    paths = "".join(json.dumps(str(path)) + "\n" for path, _ in models.values())
    environment = {**os.environ, "RUST_BACKTRACE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], input=paths, env=environment, capture_output=True, text=True, check=False
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(models), done.stderr
    return {name: (*case, *answer) for (name, case), answer in zip(models.items(), answers, strict=True)}


NAMES = [
    *(f"folder: {name}" for name in (*FOLDERS, *KINDS)),
    *(f"tokenizer: {name}" for name in TOKENIZERS),
    *(f"gguf: {name}" for name in GGUFS),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_served_or_refused_in_one_line(results: dict[str, tuple[Path, str, int, str]], name: str) -> None:
    path, says, status, stderr = results[name]
    text, _, peak = stderr.partition("\nPEAK ")
    size = (
        path.stat().st_size if path.is_file() else sum(each.stat().st_size for each in path.iterdir() if each.is_file())
    )

    assert "Traceback" not in text
    if says:
        *before, line = text.strip().splitlines()
        assert status == 1, text
        assert says in line
        assert str(path) in line
        assert not before or "the library fails with it" in line, text  # which says so by itself
        assert len(line) < 1000
    else:
        assert status == 0, text
    assert int(peak) << 10 < 1.5 * size + (96 << 20)


# -- GGUF's embedding ------------------------------------------------------------------------------


def test_tokens_that_the_embedding_has_no_row_for_are_not_in_the_vocabulary(tmp_path: Path) -> None:
    data = bytearray(gguf_bytes(GGUF))
    data[8:16] = (1).to_bytes(8, "little")
    name, rows = b"token_embd.weight", len(GGUF["tokenizer.ggml.tokens"]) - 1
    data += len(name).to_bytes(8, "little") + name + (2).to_bytes(4, "little")
    data += (32).to_bytes(8, "little") + rows.to_bytes(8, "little") + bytes(12)
    path = tmp_path / "m.gguf"
    path.write_bytes(data)

    assert read_model(path).vocab_size == rows


def test_ids_that_no_output_can_have_end_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes({**GGUF, "tokenizer.ggml.eos_token_id": 0xFFFFFFFF}))
    model = write_model(tmp_path / "m", eos_token_id=[-1, 0, 2**70, 272])

    assert read_model(path).end_of_sequence_ids == []
    assert read_model(model).end_of_sequence_ids == [0]
