"""Checkpoints that are damaged, hostile or odd, as data: what is written, and what a worker must say of it.

Run as a program, it has a worker start with each that it is told to, and writes a JSON line for each.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.gpu_worker.quantised import in_mxfp4

Edit = Callable[[Path], object]
ABSENT = object()
HIDDEN, INNER, VOCAB, HEAD_DIM = 64, 96, 128, 16
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}


@dataclass(frozen=True)
class Case:
    """One checkpoint. `says` is a regular expression for the line that ends the start; "" if the model is served."""

    write: Edit
    says: str


def write_folder(folder: Path) -> None:
    """Write a small checkpoint that is right."""
    rng = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for layer in range(2):
        for name, shape in {
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
            "self_attn.q_proj": (4 * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": (2 * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": (2 * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": (HIDDEN, 4 * HEAD_DIM),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    tensors = {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=rng) * 0.1
        for name, shape in shapes.items()
    }
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))


def config(**values: Any) -> Edit:
    """Change values of config.json; a value of `ABSENT` takes one out."""

    def write(folder: Path) -> None:
        path = folder / "config.json"
        changed = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({key: value for key, value in changed.items() if value is not ABSENT}))

    return write


def text(content: bytes | str, name: str = "config.json") -> Edit:
    """Write a file."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    """Change tensors."""

    def write(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        edit(stored)
        save_file(stored, folder / "model.safetensors")

    return write


def norm_as(dtype: torch.dtype) -> Edit:
    """Store a norm in another type."""
    return tensors(lambda stored: stored.update({"model.norm.weight": torch.ones(HIDDEN).to(dtype)}))


def header(edit: Callable[[dict[str, Any]], object]) -> Edit:
    """Change what a safetensors file says of its tensors, and nothing else."""

    def write(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        head = json.loads(data[8 : 8 + size])
        edit(head)
        changed = json.dumps(head).encode()
        path.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + size :])

    return write


def index(weight_map: object) -> Edit:
    """Write an index of shards."""
    return text(json.dumps({"weight_map": weight_map}), "model.safetensors.index.json")


def made(name: str, *edits: Edit, **settings: Any) -> Edit:
    """Have a checkpoint of another architecture, one of `tiny`, and change it."""

    def write(folder: Path) -> None:
        from tests.gpu_worker.tiny import make_checkpoint

        make_checkpoint(folder, name, **settings)
        for edit in edits:
            edit(folder)

    return write


def latent(*edits: Edit, **values: Any) -> Edit:
    """Have a small DeepSeek-V3, with other values in its config.json."""
    return made("deepseek_v3", *edits, config(**values))


def oss(*edits: Edit, **values: Any) -> Edit:
    """Have a small gpt-oss, with other values in its config.json."""
    return made("gpt_oss", *edits, config(**values))


def oss4(*edits: Edit, **values: Any) -> Edit:
    """Have a small gpt-oss whose experts are in MXFP4."""
    return made("gpt_oss", in_mxfp4, *edits, config(**values), hidden_size=96, intermediate_size=64)


def reshaped(name: str, edit: Callable[[torch.Tensor], torch.Tensor | None], layer: int = 1) -> Edit:
    """Have another tensor in a layer; None: none."""

    def change(stored: dict[str, torch.Tensor]) -> None:
        found = edit(stored.pop(f"model.layers.{layer}.{name}"))
        if found is not None:
            stored[f"model.layers.{layer}.{name}"] = found.contiguous()

    return tensors(change)


def place(name: str, make: Callable[[Path], object]) -> Edit:
    """Put something else where a file is, or none."""

    def write(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return write


def cut_off(folder: Path) -> None:
    """Take the last bytes of the weights away."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def two_shards(folder: Path) -> None:
    """Split the weights, with an index, and one tensor of an old kind that is ignored."""
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    first = {name: tensor for name, tensor in stored.items() if "layers.0" in name}
    first["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(first, folder / "a.safetensors")
    save_file({name: tensor for name, tensor in stored.items() if name not in first}, folder / "b.safetensors")
    index({"model.norm.weight": "b.safetensors", "x": "a.safetensors"})(folder)


def copied_shard(folder: Path) -> None:
    """Have two shards with the same tensors."""
    shutil.copy(folder / "model.safetensors", folder / "b.safetensors")
    index({"a": "model.safetensors", "b": "b.safetensors"})(folder)


def overlap(head: dict[str, Any]) -> None:
    """Have two tensors at one place."""
    head["lm_head.weight"]["data_offsets"] = head["model.embed_tokens.weight"]["data_offsets"]


GGUF: dict[str, tuple[str, Any]] = {
    "general.architecture": ("str", "llama"),
    "llama.attention.head_count": ("u32", 4),
    "llama.attention.head_count_kv": ("u32", 2),
    "llama.embedding_length": ("u32", HIDDEN),
    "llama.block_count": ("u32", 1),
    "llama.feed_forward_length": ("u32", INNER),
    "llama.context_length": ("u32", 64),
    "llama.attention.layer_norm_rms_epsilon": ("f32", 1e-5),
}
GGUF_TENSORS: dict[str, tuple[int, ...]] = {
    "token_embd.weight": (VOCAB, HIDDEN),
    "output_norm.weight": (HIDDEN,),
    "output.weight": (VOCAB, HIDDEN),
    "blk.0.attn_norm.weight": (HIDDEN,),
    "blk.0.ffn_norm.weight": (HIDDEN,),
    "blk.0.attn_q.weight": (4 * HEAD_DIM, HIDDEN),
    "blk.0.attn_k.weight": (2 * HEAD_DIM, HIDDEN),
    "blk.0.attn_v.weight": (2 * HEAD_DIM, HIDDEN),
    "blk.0.attn_output.weight": (HIDDEN, 4 * HEAD_DIM),
    "blk.0.ffn_gate.weight": (INNER, HIDDEN),
    "blk.0.ffn_up.weight": (INNER, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, INNER),
}
GGUF_EXPERTS: dict[str, tuple[str, Any]] = {"llama.expert_count": ("u32", 2), "llama.expert_used_count": ("u32", 1)}
GGUF_MIXTURE: dict[str, tuple[int, ...] | None] = {
    **{f"blk.0.ffn_{name}.weight": None for name in ("gate", "up", "down")},
    "blk.0.ffn_gate_inp.weight": (2, HIDDEN),
    "blk.0.ffn_gate_exps.weight": (2, INNER, HIDDEN),
    "blk.0.ffn_up_exps.weight": (2, INNER, HIDDEN),
    "blk.0.ffn_down_exps.weight": (2, HIDDEN, INNER),
}
_KINDS = {"u32": (4, "<I"), "i32": (5, "<i"), "f32": (6, "<f"), "u64": (10, "<Q")}


def gguf(
    metadata: Mapping[str, tuple[str, Any]] | None = None,
    shapes: Mapping[str, tuple[int, ...] | None] | None = None,
    *,
    counts: tuple[int, int] | None = None,
    kind: int = 0,
    cut: int = 0,
    offset: int | None = None,
) -> Edit:
    """Have a .gguf file in place of the folder's files.

    metadata, shapes  in place of those of GGUF and GGUF_TENSORS; None: there is no such tensor
    counts            of tensors and values, as the header says
    kind, offset      of output.weight
    cut               bytes that are missing at the end
    """

    def string(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def value(name: str, content: Any) -> bytes:
        if name == "str":
            return struct.pack("<I", 8) + string(content)
        if name == "raw":
            return bytes(content)
        if name.startswith("list of "):
            number, code = _KINDS[name.removeprefix("list of ")]
            return struct.pack("<IIQ", 9, number, len(content)) + b"".join(struct.pack(code, each) for each in content)
        number, code = _KINDS[name]
        return struct.pack("<I", number) + struct.pack(code, content)

    def write(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        values = {**GGUF, **(metadata or {})}
        wanted = {name: shape for name, shape in {**GGUF_TENSORS, **(shapes or {})}.items() if shape is not None}
        rng, infos, data = np.random.default_rng(0), b"", b""
        for name, shape in wanted.items():
            at = offset if name == "output.weight" and offset is not None else len(data)
            number = kind if name == "output.weight" else 0
            sizes = b"".join(struct.pack("<Q", size) for size in reversed(shape))
            infos += string(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", number, at)
            small = shape if np.prod(shape, dtype=object) < 1e6 else (1,)
            data += np.abs(rng.standard_normal(small) * 0.1).astype("<f4").tobytes()
            data += bytes(-len(data) % 32)
        num_tensors, num_values = counts or (len(wanted), len(values))
        head = b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_values)
        head += b"".join(string(key) + value(*each) for key, each in values.items()) + infos
        file = head + bytes(-len(head) % 32) + data
        (folder / "model.gguf").write_bytes(file[: len(file) - cut])

    return write


def rope(kind: str, **values: Any) -> Edit:
    """Scale the rotary embedding."""
    return config(rope_scaling={"rope_type": kind, "factor": 4, **values})


def modules(path: str) -> Edit:
    """Have a second module in another folder."""
    parts = [{"type": "a.Transformer", "path": ""}, {"type": "x.Pooling", "path": path}]
    return text(json.dumps(parts), "modules.json")


MIXTURE = {"architectures": ["MixtralForCausalLM"], "num_experts_per_tok": 2}
WINDOWS = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 4}
FINITE = "expected a finite number"
WHOLE = "expected an integer of 32 bits"
JSON_ERROR = r"config\.json: cannot be read as JSON"
DAMAGED_GGUF = "the header is cut off or damaged"
NO_TENSORS = "not a whole safetensors file"

CASES: dict[str, Case] = {
    # Served as if nothing were odd.
    "plain": Case(lambda _: None, ""),
    "two shards": Case(two_shards, ""),
    "keys that nobody knows": Case(config(auto_map={"AutoModel": "evil.Evil"}, x=[[[1]]], torch_dtype="complex64"), ""),
    "null for a flag": Case(config(tie_word_embeddings=None, rope_scaling=None, hidden_act="swish"), ""),
    "a folder called x.json": Case(place("x.json", Path.mkdir), ""),
    "a link x.json to nowhere": Case(place("x.json", lambda path: path.symlink_to("/nowhere")), ""),
    "a pipe x.json": Case(place("x.json", os.mkfifo), ""),
    "a pipe x.safetensors": Case(place("x.safetensors", os.mkfifo), ""),
    "another file that is no checkpoint": Case(text(b"no", "x.safetensors"), ""),
    "float64 in a norm": Case(norm_as(torch.float64), ""),
    "many positions": Case(config(max_position_embeddings=1 << 24), ""),
    # config.json
    "no config": Case(place("config.json", lambda _: None), r"config\.json: no such file"),
    "a pipe as config": Case(place("config.json", os.mkfifo), r"config\.json: is no file"),
    "a folder as config": Case(place("config.json", Path.mkdir), r"config\.json: is no file"),
    "empty config": Case(text(""), JSON_ERROR),
    "a list as config": Case(text("[1]"), "expected a JSON object"),
    "UTF-16": Case(text('{"a": 1}'.encode("utf-16")), JSON_ERROR),
    "lists nested deep": Case(text("[" * 100_000), "nested too deep"),
    "objects nested deep": Case(text('{"a":' * 100_000), "nested too deep"),
    "a number of 5,000 digits": Case(text('{"vocab_size": ' + "9" * 5000 + "}"), JSON_ERROR),
    "a config of 5 MB": Case(text(json.dumps(CONFIG) + " " * (5 << 20)), "at most 4194304 are read"),
    "architectures an object": Case(config(architectures={"a": 1}), r"architectures is \{'a': 1\}, expected a list"),
    "architectures a text": Case(config(architectures="LlamaForCausalLM"), "architectures is .* expected a list"),
    "architectures nested": Case(config(architectures=[["x"]]), "architectures is .* expected a list"),
    "line ends in a name": Case(config(architectures=["a\nb\x1b[2J" + "x" * 9000]), "architecture .a"),
    "eps 10^400": Case(config(rms_norm_eps=10**400), f"rms_norm_eps .* {FINITE}"),
    "eps NaN": Case(config(rms_norm_eps=float("nan")), f"rms_norm_eps is nan, {FINITE}"),
    "eps -1": Case(config(rms_norm_eps=-1), "rms_norm_eps of -1, expected from 0 to 1"),
    "hidden_size 10^400": Case(config(hidden_size=10**400), f"hidden_size is .* {WHOLE}"),
    "hidden_size 64.0": Case(config(hidden_size=64.0), f"hidden_size is 64.0, {WHOLE}"),
    "a window of 2^32": Case(config(**{**WINDOWS, "sliding_window": 1 << 32}), f"sliding_window is .* {WHOLE}"),
    "no heads": Case(config(num_attention_heads=0), "0 attention heads"),
    "heads of 15": Case(config(head_dim=15), "15"),
    "heads of 24 dimensions": Case(
        lambda folder: (
            config(head_dim=24)(folder),
            tensors(
                lambda stored: stored.update(
                    {
                        name: torch.zeros(
                            {"q": (96, 64), "k": (48, 64), "v": (48, 64), "o": (64, 96)}[name.split(".")[-2][0]]
                        )
                        for name in list(stored)
                        if "self_attn" in name
                    }
                )
            )(folder),
        ),
        "heads of 24 dimensions are no multiple of 16",
    ),
    "layers without end": Case(config(num_hidden_layers=10**6), "1000000 layers"),
    "4,096 layers of 4,096 experts": Case(
        config(**MIXTURE, num_hidden_layers=4096, num_local_experts=4096), "are missing"
    ),
    "dense layers 10^5 times": Case(
        config(architectures=["Qwen2MoeForCausalLM"], num_hidden_layers=4096, mlp_only_layers=[7] * 10**5),
        "are missing",
    ),
    "dense layers that are no numbers": Case(config(**MIXTURE, mlp_only_layers=[[1]]), "mlp_only_layers a list"),
    "layer_types a number": Case(config(**WINDOWS, layer_types=7), "layer_types is 7, expected a list of names"),
    "layer_types nested": Case(config(**WINDOWS, layer_types=[["a"], ["b"]]), "expected a list of names"),
    "theta 0": Case(config(rope_theta=0), "rope_theta is 0, expected above 0"),
    "theta -1": Case(config(rope_theta=-1), "rope_theta is -1, expected above 0"),
    "theta 10^400": Case(config(rope_theta=10**400), f"rope_theta is .* {FINITE}"),
    "theta 10^-300": Case(config(rope_theta=1e-300), "frequencies that are not finite"),
    "part of the dimensions NaN": Case(
        config(partial_rotary_factor=float("nan")), f"partial_rotary_factor .* {FINITE}"
    ),
    "part of the dimensions infinite": Case(config(partial_rotary_factor=float("inf")), FINITE),
    "rope_scaling a list": Case(config(rope_scaling=[1]), "the rotary settings are"),
    "rope_type a list": Case(config(rope_scaling={"rope_type": ["a"]}), r"rope_type \['a'\] is not supported"),
    "linear by 0": Case(rope("linear", factor=0), "factor is 0, expected above 0"),
    "yarn by 0": Case(rope("yarn", factor=0), "factor is 0, expected above 0"),
    "yarn from 0": Case(rope("yarn", original_max_position_embeddings=0), "original_max_position_embeddings is 0"),
    "yarn, no turns": Case(rope("yarn", beta_fast=0), "beta_fast is 0"),
    "yarn, theta 1": Case(config(rope_theta=1, rope_scaling={"rope_type": "yarn", "factor": 4}), "rope_theta - 1 is 0"),
    "yarn, mscale": Case(rope("yarn", mscale=1, mscale_all_dim=-7.2134752), "must be from 0"),
    "llama3, low 0": Case(rope("llama3", low_freq_factor=0, high_freq_factor=4), "low_freq_factor is 0"),
    "llama3, no ramp": Case(
        rope("llama3", low_freq_factor=4, high_freq_factor=4), "high_freq_factor - low_freq_factor"
    ),
    # Weights
    "cut off": Case(cut_off, NO_TENSORS),
    "a head of 2^63 bytes": Case(text((2**63).to_bytes(8, "little") + b"{}", "model.safetensors"), NO_TENSORS),
    "a head of 90 MB in a file of 10": Case(
        text((90 << 20).to_bytes(8, "little") + b"{}", "model.safetensors"), NO_TENSORS
    ),
    "a head that is a list": Case(text(b"\x03" + bytes(7) + b"[1]", "model.safetensors"), NO_TENSORS),
    "tensors overlap": Case(header(overlap), NO_TENSORS),
    "weights of whole numbers": Case(norm_as(torch.int32), r"model\.norm\.weight is of type I32"),
    "weights of 8 bits": Case(norm_as(torch.float8_e4m3fn), r"model\.norm\.weight is of type F8_E4M3"),
    "pickled weights": Case(
        place("model.safetensors", lambda path: path.with_name("model.bin").write_bytes(b"x")), "refused"
    ),
    "a pipe as weights": Case(place("model.safetensors", os.mkfifo), "neither model.safetensors nor"),
    "a device as weights": Case(place("model.safetensors", lambda path: path.symlink_to("/dev/zero")), "neither"),
    "an index that is a list": Case(text("[1]", "model.safetensors.index.json"), "expected a JSON object"),
    "an index to the folder above": Case(index({"a": "../x.safetensors"}), "names a file outside its folder"),
    "an index of ..": Case(index({"a": ".."}), "files that are not there"),
    "an index with NUL": Case(index({"a": "a\0b"}), "no name of a file"),
    "an index of a long name": Case(index({"a": "a" * 5000}), "no name of a file"),
    "an index nested deep": Case(text("[" * 100_000, "model.safetensors.index.json"), "nested too deep"),
    "shards with the same tensors": Case(copied_shard, "is also in"),
    # Models for vectors
    "modules of numbers": Case(text("[1]", "modules.json"), "expected a list of JSON objects"),
    "modules above": Case(modules(".."), "is not that of a folder inside"),
    "modules with NUL": Case(modules("a\0"), "cannot be read as JSON"),
    "modules nested deep": Case(text("[" * 100_000, "modules.json"), "nested too deep"),
    "modules that are not there": Case(modules("1_Pooling"), "no such file"),
    "BERT, eps NaN": Case(
        config(architectures=["BertModel"], layer_norm_eps=float("nan")), f"layer_norm_eps is nan, {FINITE}"
    ),
    "BERT, layers without end": Case(
        config(architectures=["BertModel"], num_hidden_layers=10**6), "at most 4096 layers"
    ),
    "BERT, labels a number": Case(
        config(architectures=["BertForSequenceClassification"], id2label=5),
        "tensors of BertForSequenceClassification are missing",
    ),
    # GGUF
    "gguf": Case(gguf(), ""),
    "gguf, empty": Case(lambda folder: (gguf()(folder), text("", "model.gguf")(folder)), "cannot be read"),
    "gguf, cut off": Case(gguf(cut=100), "the file is cut off inside"),
    "gguf, counts of 2^63": Case(gguf(counts=(2**63, 2**63)), "the file is damaged"),
    "gguf, fewer values than it says": Case(gguf(counts=(12, 1000)), DAMAGED_GGUF),
    "gguf, architecture a list": Case(
        gguf({"general.architecture": ("list of i32", [1])}), "GGUF architecture .* is not supported"
    ),
    "gguf, split.count a text": Case(gguf({"split.count": ("str", "2")}), f"split.count is '2', {WHOLE}"),
    "gguf, alignment 0": Case(gguf({"general.alignment": ("u32", 0)}), "general.alignment is 0"),
    "gguf, context a text": Case(gguf({"llama.context_length": ("str", "x")}), f"context_length is 'x', {WHOLE}"),
    "gguf, kv heads that differ": Case(
        gguf({"llama.attention.head_count_kv": ("list of i32", [1, 2])}), f"head_count_kv is .* {WHOLE}"
    ),
    "gguf, no kv heads": Case(gguf({"llama.attention.head_count_kv": ("u32", 0)}), "a size below 1"),
    "gguf, eps NaN": Case(gguf({"llama.attention.layer_norm_rms_epsilon": ("f32", float("nan"))}), FINITE),
    "gguf, base 0": Case(gguf({"llama.rope.freq_base": ("f32", 0.0)}), "rope_theta is 0, expected above 0"),
    "gguf, a window of 2^32 - 1": Case(gguf({"llama.attention.sliding_window": ("u32", 2**32 - 1)}), WHOLE),
    "gguf, a softcap": Case(
        gguf({"llama.final_logit_softcapping": ("f32", float("nan"))}), "final_logit_softcapping is nan, which is not"
    ),
    "gguf, a softcap a list": Case(
        gguf({"llama.logit_scale": ("list of i32", [0])}), "logit_scale is .*, which is not"
    ),
    "gguf, a pattern of -1": Case(
        gguf({"llama.attention.sliding_window_pattern": ("i32", -1)}), "sliding_window_pattern is -1, expected"
    ),
    "gguf, a pattern for 9 layers": Case(
        gguf({"llama.attention.sliding_window_pattern": ("list of i32", [1] * 9)}), "sliding_window_pattern names 9"
    ),
    "gguf, values of another size": Case(
        gguf({"llama.attention.value_length": ("u32", 8)}), "keys and values of different sizes"
    ),
    "gguf, 2^31 experts": Case(gguf({**GGUF_EXPERTS, "llama.expert_count": ("u32", 2**31)}), WHOLE),
    "gguf, 4,097 experts": Case(gguf({**GGUF_EXPERTS, "llama.expert_count": ("u32", 4097)}), "at most 4096 experts"),
    "gguf, experts in no layer": Case(gguf(GGUF_EXPERTS), ""),  # which layers have them, the tensors say
    "gguf, a stack of other experts": Case(
        gguf(GGUF_EXPERTS, {**GGUF_MIXTURE, "blk.0.ffn_up_exps.weight": (3, INNER, HIDDEN)}), "asks for 2 experts"
    ),
    "gguf, a stack of other shapes": Case(
        gguf(GGUF_EXPERTS, {**GGUF_MIXTURE, "blk.0.ffn_up_exps.weight": (2, HIDDEN, INNER)}), "has shape"
    ),
    "gguf, a stack that is flat": Case(
        gguf(GGUF_EXPERTS, {**GGUF_MIXTURE, "blk.0.ffn_up_exps.weight": (2 * INNER, HIDDEN)}), "asks for 2 experts"
    ),
    "gguf, a stack without a count": Case(gguf(shapes=GGUF_MIXTURE), "asks for 0 experts"),
    "gguf, joined queries of other rows": Case(
        gguf(
            shapes={
                **{f"blk.0.attn_{name}.weight": None for name in "qkv"},
                "blk.0.attn_qkv.weight": (127, HIDDEN),
            }
        ),
        r"blk\.0\.attn_qkv\.weight has shape",
    ),
    "gguf, queries alone and joined": Case(
        gguf(shapes={"blk.0.attn_qkv.weight": (8 * HEAD_DIM, HIDDEN)}), "is there twice"
    ),
    "gguf, 3 factors": Case(gguf(shapes={"rope_freqs.weight": (3,)}), r"rope_freqs\.weight has shape \[3\]"),
    "gguf, factors in two dimensions": Case(gguf(shapes={"rope_freqs.weight": (8, 1)}), r"has shape \[8, 1\]"),
    "gguf, a tensor in five dimensions": Case(gguf(shapes={"output.weight": (1,) * 5}), "has 5 dimensions"),
    "gguf, a giant tensor": Case(gguf(shapes={"output.weight": (2**62, 2**62)}), "cut off inside output.weight"),
    "gguf, an empty tensor": Case(gguf(shapes={"output.weight": (0, HIDDEN)}), "a shape that its quantisation cannot"),
    "gguf, a tensor at 2^64 - 64": Case(gguf(offset=2**64 - 64), "cut off inside output.weight"),
    "gguf, a kind that nobody knows": Case(gguf(kind=9999), "unknown quantisation"),
    "gguf, whole numbers": Case(gguf(kind=26), "quantised as I32, which cannot be read"),
    "gguf, no layer": Case(gguf({"llama.block_count": ("u32", 0)}), "0 layers"),
    "gguf, 4,096 layers": Case(gguf({"llama.block_count": ("u32", 4096)}), "tensors missing"),
    "gguf, lists in lists": Case(
        gguf({"x": ("raw", struct.pack("<IIQIQI", 9, 9, 1, 4, 1, 1))}),
        "metadata of unknown type 9; the file is damaged",
    ),
    "gguf, a list of 2^60": Case(gguf({"x": ("raw", struct.pack("<IIQ", 9, 0, 2**60))}), "the file claims a list of"),
    "gguf, a list of 16 MB": Case(gguf({"x": ("raw", struct.pack("<IIQ", 9, 0, 16 << 20) + bytes(16 << 20))}), ""),
}

EXPERTS = "mlp.experts"
ROUTED = "of 8 experts"
CASES |= {
    # Latent attention, and layers with experts behind dense ones
    "deepseek_v3": Case(latent(), ""),
    "deepseek_v3, no latent": Case(latent(kv_lora_rank=0), "kv_lora_rank is 0, expected 1 to 65536"),
    "deepseek_v3, a latent below none": Case(latent(kv_lora_rank=-1), "kv_lora_rank is -1, expected 1 to"),
    "deepseek_v3, a latent beyond all": Case(latent(kv_lora_rank=1 << 30), "kv_lora_rank is 1073741824, expected 1 to"),
    "deepseek_v3, a latent of 2^40": Case(latent(kv_lora_rank=1 << 40), f"kv_lora_rank is .*, {WHOLE}"),
    "deepseek_v3, a latent of another size": Case(latent(kv_lora_rank=65536), "the config asks for"),
    "deepseek_v3, a latent that is not said": Case(latent(kv_lora_rank=ABSENT), r"the config asks for \[528, 64\]"),
    "deepseek_v3, queries' rank not said": Case(latent(q_lora_rank=ABSENT), r"the config asks for \[1536, 64\]"),
    "deepseek_v3, queries' rank null": Case(latent(q_lora_rank=None), r"q_proj\.weight"),
    "deepseek_v3, queries' rank below none": Case(latent(q_lora_rank=-1), "q_lora_rank is -1, expected 0 to 65536"),
    "deepseek_v3, an odd number of rotated dimensions": Case(latent(qk_rope_head_dim=15), "15 rotary dimensions"),
    "deepseek_v3, nothing rotated": Case(latent(qk_rope_head_dim=0), "qk_rope_head_dim is 0, expected 1 to 65536"),
    "deepseek_v3, no values": Case(latent(v_head_dim=0), "v_head_dim is 0, expected 1 to 65536"),
    "deepseek_v3, all dimensions at their most": Case(
        latent(num_attention_heads=1 << 30, v_head_dim=1 << 16, qk_nope_head_dim=1 << 16), "the config asks for"
    ),
    "deepseek_v3, scores by infinity": Case(
        latent(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 1e300, "mscale_all_dim": 1e300}),
        "mscale_all_dim must be from 0 to",
    ),
    "deepseek_v3, -1 dense layers": Case(
        latent(first_k_dense_replace=-1), "first_k_dense_replace is -1, expected 0 to"
    ),
    "deepseek_v3, more dense layers than layers": Case(
        latent(first_k_dense_replace=99), "first_k_dense_replace is 99, expected 0 to 3"
    ),
    "deepseek_v3, dense layers a text": Case(latent(first_k_dense_replace="1"), f"replace is '1', {WHOLE}"),
    "deepseek_v3, more experts taken than there are": Case(latent(num_experts_per_tok=9), f"takes 9 {ROUTED}"),
    "deepseek_v3, no expert taken": Case(latent(num_experts_per_tok=0), f"takes 0 {ROUTED}"),
    "deepseek_v3, no experts": Case(latent(n_routed_experts=0), "of 0 experts"),
    "deepseek_v3, 2^31 - 1 experts": Case(latent(n_routed_experts=2**31 - 1), "at most 4096 experts"),
    "deepseek_v3, shared experts below none": Case(latent(n_shared_experts=-1), "an expert of a size below 1"),
    "deepseek_v3, no groups": Case(latent(n_group=0), "groups must be as large as each other"),
    "deepseek_v3, more groups taken than there are": Case(latent(topk_group=99), "groups must be as large"),
    "deepseek_v3, scaled by NaN": Case(latent(routed_scaling_factor=float("nan")), f"scaling_factor is nan, {FINITE}"),
    "deepseek_v3, scaled by -1": Case(latent(routed_scaling_factor=-1), "routed_scaling_factor is -1, expected"),
    "deepseek_v3, pairs by a text": Case(latent(rope_interleave="x"), "rope_interleave is 'x', expected true or false"),
    "deepseek_v3, 10^9 layers that predict": Case(latent(num_nextn_predict_layers=10**9), "num_nextn_predict_layers"),
    "deepseek_v3, a choice without its bias": Case(
        made("deepseek_v3", reshaped("mlp.gate.e_score_correction_bias", lambda _: None)), "e_score_correction_bias"
    ),
    "deepseek_v3, a latent that is transposed": Case(
        made("deepseek_v3", reshaped("self_attn.kv_b_proj.weight", lambda tensor: tensor.T)),
        r"kv_b_proj\.weight has shape",
    ),
    # Stacks of experts, sinks, and stacks in MXFP4
    "gpt_oss": Case(oss(), ""),
    "gpt_oss, fewer experts in a stack": Case(
        oss(reshaped(f"{EXPERTS}.gate_up_proj", lambda tensor: tensor[:-1])), r"experts\.5\.gate_proj"
    ),
    "gpt_oss, more experts in a stack": Case(
        oss(reshaped(f"{EXPERTS}.down_proj", lambda tensor: torch.cat([tensor, tensor]))), r"experts\.6\.down_proj"
    ),
    "gpt_oss, a stack that is flat": Case(
        oss(reshaped(f"{EXPERTS}.gate_up_proj", lambda tensor: tensor.flatten(0, 1))),
        r"gate_up_proj has shape \[384, 192\], expected 3",
    ),
    "gpt_oss, a stack with rows for columns": Case(
        oss(reshaped(f"{EXPERTS}.gate_up_proj", lambda tensor: tensor.transpose(1, 2))), "has shape"
    ),
    "gpt_oss, an odd number of outputs": Case(
        oss(reshaped(f"{EXPERTS}.gate_up_proj", lambda tensor: tensor[:, :, :-1])), "a multiple of 2"
    ),
    "gpt_oss, one output more": Case(
        oss(reshaped(f"{EXPERTS}.gate_up_proj", lambda tensor: torch.cat([tensor, tensor[:, :, :1]], 2))),
        "a multiple of 2",
    ),
    "gpt_oss, a stack of nothing": Case(
        oss(reshaped(f"{EXPERTS}.down_proj", lambda tensor: tensor[:0])), r"experts\.0\.down_proj"
    ),
    "gpt_oss, a million experts of two bytes": Case(
        oss(tensors(lambda stored: stored.update({"x.experts.gate_up_proj_scales": torch.zeros(10**6, 2, 1)}))),
        r"x\.experts\.gate_up_proj_scales has shape .* at most 4096 experts",
    ),
    "gpt_oss, a bias of other experts": Case(
        oss(reshaped(f"{EXPERTS}.gate_up_proj_bias", lambda tensor: tensor[:-1])), "gate_proj_bias has shape"
    ),
    "gpt_oss, no bias of experts": Case(oss(reshaped(f"{EXPERTS}.down_proj_bias", lambda _: None)), "down_proj_bias"),
    "gpt_oss, no sinks": Case(oss(reshaped("self_attn.sinks", lambda _: None)), r"missing.*self_attn\.sinks"),
    "gpt_oss, sinks of other heads": Case(
        oss(reshaped("self_attn.sinks", lambda tensor: tensor[:-1])), "sinks has shape"
    ),
    "gpt_oss, a sink for all": Case(oss(reshaped("self_attn.sinks", lambda tensor: tensor[0])), "sinks has shape"),
    "gpt_oss, sinks of whole numbers": Case(
        oss(reshaped("self_attn.sinks", lambda tensor: tensor.int())), "sinks is of type I32"
    ),
    "gpt_oss, no bias of the router": Case(oss(reshaped("mlp.router.bias", lambda _: None)), r"mlp\.router\.bias"),
    "gpt_oss, other gates": Case(oss(swiglu_limit=3.0), "swiglu_limit is 3, supported is 7"),
    "gpt_oss, gates of NaN": Case(oss(swiglu_limit=float("nan")), f"swiglu_limit is nan, {FINITE}"),
    "gpt_oss, more experts taken than there are": Case(oss(num_experts_per_tok=7), "takes 7 of 6 experts"),
    "gpt_oss, 4,096 experts": Case(oss(num_local_experts=4096), "the config asks for|missing"),
    "gpt_oss, a window of 0": Case(oss(sliding_window=0), "sliding_window is 0, expected at least 1"),
    "mxfp4": Case(oss4(), ""),
    "mxfp4, scales of fewer groups": Case(
        oss4(reshaped(f"{EXPERTS}.down_proj_scales", lambda tensor: tensor[:, :, :-1])), "scale"
    ),
    "mxfp4, scales of fewer experts": Case(
        oss4(reshaped(f"{EXPERTS}.gate_up_proj_scales", lambda tensor: tensor[:-1])), r"experts\.5\."
    ),
    "mxfp4, scales of fewer outputs": Case(
        oss4(reshaped(f"{EXPERTS}.gate_up_proj_scales", lambda tensor: tensor[:, :-2])), "scale"
    ),
    "mxfp4, scales that are floats": Case(
        oss4(reshaped(f"{EXPERTS}.gate_up_proj_scales", lambda tensor: tensor.float())), "scale"
    ),
    "mxfp4, no scales": Case(oss4(reshaped(f"{EXPERTS}.gate_up_proj_scales", lambda _: None)), "scale|gate_proj"),
    "mxfp4, no blocks": Case(oss4(reshaped(f"{EXPERTS}.gate_up_proj_blocks", lambda _: None)), "packed|gate_proj"),
    "mxfp4, blocks of 15 bytes": Case(
        oss4(reshaped(f"{EXPERTS}.gate_up_proj_blocks", lambda tensor: tensor[..., :-1])), "experts"
    ),
    "mxfp4, blocks of words": Case(
        oss4(reshaped(f"{EXPERTS}.gate_up_proj_blocks", lambda tensor: tensor.int())), r"experts\.0\.gate_proj"
    ),
    "mxfp4, blocks in two dimensions": Case(
        oss4(reshaped(f"{EXPERTS}.gate_up_proj_blocks", lambda tensor: tensor.flatten(1))),
        r"gate_up_proj_blocks has shape \[6, 6144\], expected 3",
    ),
    "mxfp4, not said": Case(oss4(quantization_config=ABSENT), "experts"),
    "mxfp4, a method of another kind": Case(oss4(quantization_config={"quant_method": ["x"]}), r"quantised as \['x'\]"),
    "mxfp4, settings a list": Case(oss4(quantization_config=[1]), "quantization_config"),
}


def start_worker(model: Path, cache: Path) -> dict[str, Any]:
    """Have a worker start, up to where it would join a scheduler; return its exit status and what it logged."""
    from octavo.gpu_worker import __main__ as worker
    from octavo.gpu_worker.config import WorkerConfig

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    logging.getLogger().handlers = [handler]
    logits: list[float] = []

    def work(config: WorkerConfig, loaded: Any, *_: object) -> int:
        from octavo.gpu_worker.devices.cpu.device import CpuDevice
        from tests.gpu_worker.paged import MAX_BLOCKS, Paged

        del config
        paged = Paged(CpuDevice(loaded.model, 64, 4, MAX_BLOCKS))
        logits.extend(paged.compute(paged.new([5, 6, 7]), 8)[-1].tolist())
        return 0

    worker._work = work  # type: ignore[assignment]
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    config = WorkerConfig(
        str(model), "cpu", packed_cache_dir=str(cache), kv_cache_memory=16 << 20, num_threads=1, log_level="warning"
    )
    status = worker.run(config)
    for thread in threading.enumerate():
        if thread.name == "store packed weights":
            thread.join()
    return {
        "status": status,
        "errors": [line for line in lines if not line.startswith(("INFO", "DEBUG"))],
        "bytes": _memory("VmHWM") - before,
        "logits": logits,
    }


def inspect(model: Path) -> str:
    """Return why `octavo model check` says that a model is not served, empty if it is."""
    from octavo.gpu_worker.errors import DeviceError, ModelError, one_line
    from octavo.gpu_worker.loading import inspection

    try:
        inspection.check_runs(model, inspection.inspect(model), "cpu", "none")
    except (DeviceError, ModelError) as error:
        return one_line(error)
    return ""


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(name)


def main(folder: Path, names: list[str]) -> None:
    """Start a worker with each case, in a folder of its own."""
    for index_, name in enumerate(names):
        model = folder / f"model{index_}"
        model.mkdir()
        write_folder(model)
        CASES[name].write(model)
        size = sum(path.stat().st_size for path in model.iterdir() if path.is_file() and not path.is_symlink())
        file = next(iter(model.glob("*.gguf")), model)
        found = start_worker(file, folder / "cache")
        print(json.dumps({"name": name, "size": size, "inspected": inspect(file), **found}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(CASES))
