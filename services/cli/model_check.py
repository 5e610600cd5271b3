"""`octavo model check PATH|ID`: whether a model is served here and what it takes, before anything of it is loaded.

It asks the functions that load models. Of a model of the hub only the settings and the heads of the weights' files
are fetched.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.gpu_worker.config import HOST_KV_MEMORY, WorkerConfig
from octavo.gpu_worker.engine import count_blocks
from octavo.gpu_worker.errors import DeviceError, ModelError, one_line
from octavo.gpu_worker.loading import inspection
from octavo.gpu_worker.loading.inspection import Facts, Inspection
from octavo.gpu_worker.loading.loading import context_of, device_of
from octavo.gpu_worker.memory import free_memory_bytes
from octavo.gpu_worker.quantization import QUANTIZATIONS, problem
from octavo.kernels.cpu import build, library
from octavo.services.cli import demo_model, hub_outline, model_source
from octavo.services.cli.errors import CommandError
from octavo.services.common import config as config_loader
from octavo.services.common.config import format_bytes

_BLOCK_TOKENS = 16
_SPEED_CONTEXT = 1024  # tokens that a sequence has when its speed is told
_TASKS = {
    "generate": "writes text",
    "embed": "makes vectors",
    "score": "scores pairs of texts",
    "classify": "labels texts",
}
_DEVICES = ("cpu", "cuda", "reference")


@dataclass(frozen=True)
class CheckConfig:
    """Settings of `octavo model check`."""

    model: str = field(
        metadata={"positional": True, "help": "a folder, a .gguf file, a hub id such as org/name, demo or demo-embed"}
    )
    device: str = field(default="auto", metadata={"help": "what is to compute", "choices": ("auto", *_DEVICES)})
    quantization: str = field(
        default="none", metadata={"help": "in how many bits weights are kept", "choices": QUANTIZATIONS}
    )
    kv_cache_memory: int = field(
        default=0, metadata={"kind": "bytes", "help": "memory for the KV cache; 0: what octavo serve takes by itself"}
    )
    max_model_len: int = field(default=0, metadata={"help": "longest context wanted, in tokens; 0: all"})
    measure: bool = field(
        default=True,
        metadata={"help": "measure how fast memory is read, for the tokens per second; takes half a second"},
    )
    json: bool = field(default=False, metadata={"help": "print one JSON object"})

    def __post_init__(self) -> None:
        WorkerConfig(
            model=self.model, max_model_len=self.max_model_len, kv_cache_memory=self.kv_cache_memory
        )  # has the same limits


def main(argv: Sequence[str]) -> int:
    """Do it; `argv[0]` is the command's name. Return 0 if the model is served here, else 1."""
    config = config_loader.load(
        CheckConfig,
        argv[1:],
        prog="octavo model check",
        description="Says whether a model is served here and what it takes, before anything is loaded. The exit status "
        "is 1 if it is not.",
    )
    report = check(config)
    if config.json:
        print(json.dumps(report, indent=1))
    else:
        for title, text in _lines(report):
            print(f"{title:<11} {text}")
    return 0 if report["served"] else 1


def check(config: CheckConfig) -> dict[str, Any]:
    """Return what is printed with --json: `served`, `problems` if it is not, and all that is known of the model."""
    report: dict[str, Any] = {"model": config.model, "served": False, "problems": []}
    try:
        with _files_of(config.model, report) as path:
            report |= _told(inspection.facts_of(path), report)
            if not path.is_file():
                inspection.check_config(path)
            if hub := report.pop("_hub", None):
                hub_outline.fetch_heads(hub, path)
            found = inspection.inspect(path)
            report |= _about(found)
            _add_needs(config, path, found, report)
    except (CommandError, ModelError, DeviceError, build.BuildError) as error:
        report["problems"].append(one_line(error))
    report.pop("_hub", None)
    report["served"] = not report["problems"]
    return report


@contextlib.contextmanager
def _files_of(text: str, report: dict[str, Any]) -> Iterator[Path]:
    """Give the model's files, or an outline of them; add what the hub says. Raises CommandError."""
    if model := model_source.find_here(text):
        yield model.path
        return
    if demo := demo_model.DEMOS.get(text):
        yield demo_model.fetch(demo_model.cache_dir(), lambda *_: None, demo)
        return
    repo, _, revision = text.partition("@")
    try:
        hub, sizes = hub_outline.look_up(repo, revision)
    except CommandError:
        if (cached := model_source.find_cached(text)) is None:
            raise
        yield cached
        return
    report |= {"revision": hub.revision, "licence": hub.licence, "gated": hub.gated, "download_bytes": hub.total_bytes}
    with tempfile.TemporaryDirectory(prefix="octavo-check-") as folder:
        outline = Path(folder) / repo.rpartition("/")[2]
        outline.mkdir()
        hub_outline.fetch_settings(hub, sizes, outline)
        report["_hub"] = hub
        try:
            yield model_source.checked_folder(outline, text)
        except (ModelError, DeviceError) as error:  # says nothing of a folder that nobody knows
            raise type(error)(str(error).replace(str(outline), repo)) from error


def _told(facts: Facts, report: dict[str, Any]) -> dict[str, Any]:
    """Return what files say that may be served or not."""
    return {
        "architecture": facts.architecture,
        "modalities_left_out": facts.left_out,
        "quantised": facts.quantised,
        "licence": report.get("licence") or facts.licence,
        "gguf_tensors": dict(facts.gguf),
    }


def _about(found: Inspection) -> dict[str, Any]:
    """Return what the model takes wherever it is."""
    weights: dict[str, dict[str, int]] = {}
    for device in _DEVICES:
        for scheme in QUANTIZATIONS:
            if found.fallback is not None and device != "reference":
                continue
            if problem(scheme, device) or (scheme != "none" and found.task != "generate"):
                continue
            with contextlib.suppress(build.BuildError):  # without kernels device cpu is none
                weights.setdefault(device, {})[scheme] = inspection.weight_bytes(found, device, scheme).held
    return {
        "architecture": found.architecture,
        "task": found.task,
        "served_by": "the modules of transformers" if found.fallback else "a native description",
        "notes": found.notes,
        "stored_bytes": dict(found.stored),
        "weights_bytes": weights,
        "kv_bytes_per_token": found.kv_token_bytes,
        "model_context": found.max_context,
    }


def _add_needs(config: CheckConfig, path: Path, found: Inspection, report: dict[str, Any]) -> None:
    """Add what it takes here. Raises ModelError or DeviceError if it cannot run here."""
    device = device_of(config.device, path)
    report |= {"device": device, "quantization": config.quantization}
    inspection.check_runs(path, found, device, config.quantization)
    weights = inspection.weight_bytes(found, device, config.quantization)
    report["computed_from"] = inspection.computed_from(found, device, config.quantization)
    memory = _memory_of(device)
    report["memory_bytes"] = memory
    context = context_of(path, config.max_model_len, found.max_context)
    if memory and weights.held > memory:
        raise ModelError(
            f"the weights take {format_bytes(weights.held)} on {device}, and {format_bytes(memory)} of memory are free "
            "here; use a smaller model, fewer bits (--quantization) or a machine with more memory"
        )
    token_bytes = found.kv_token_bytes
    if token_bytes:
        room = max(memory - weights.held, 0)
        # As the worker counts: block 0 holds no tokens.
        largest = max(room // (_BLOCK_TOKENS * (token_bytes + found.rotary_token_bytes)) - 1, 0) * _BLOCK_TOKENS
        report["largest_context"] = min(context, largest) if memory else None
        cache = config.kv_cache_memory or (HOST_KV_MEMORY if device != "cuda" else room)
        if memory and cache > room:
            raise ModelError(
                f"weights and KV cache take {format_bytes(weights.held + cache)} on {device}, and "
                f"{format_bytes(memory)} of memory are free here; use a smaller --kv-cache-memory"
            )
        if cache:
            block_bytes = _BLOCK_TOKENS * token_bytes
            blocks = count_blocks(cache, block_bytes, 0)
            report["kv_cache_bytes"], report["context"] = cache, min(context, (blocks - 1) * _BLOCK_TOKENS)
    if token_bytes and config.measure and device == "cpu":
        rate = _read_rate()
        report["read_bytes_per_s"] = round(rate) or None
        read = weights.read + token_bytes * min(_SPEED_CONTEXT, context)
        report["tokens_per_s"] = round(rate / read, 1) or None


def _memory_of(device: str) -> int:
    """Return the bytes that a device has free, 0 if that is not known."""
    if device != "cuda":
        return free_memory_bytes()
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0


def _read_rate() -> float:
    from octavo.kernels.cpu.runtime import read_rate

    try:
        return read_rate()
    except (MemoryError, library.KernelError):
        return 0.0


def _lines(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield title and text of each line for people."""
    for problem_found in report["problems"]:
        yield "served", f"no: {problem_found}"
    if report["served"]:
        yield "served", f"yes, on {report['device']}: {report['architecture']} {_TASKS[report['task']]}"
        yield "by", " ".join([report["served_by"], *(f"({note})" for note in report["notes"])])
    elif report.get("architecture"):
        yield "model", report["architecture"]
    if left_out := report.get("modalities_left_out"):
        yield "left out", ", ".join(left_out) + (": text alone is served" if report["served"] else "")
    if quantised := report.get("quantised"):
        yield "quantised", quantised
    if kinds := report.get("gguf_tensors"):
        yield "tensors", ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    yield "licence", report.get("licence") or "not named in the files"
    if "gated" in report:
        yield (
            "hub",
            f"revision {report['revision'][:12]}, {format_bytes(report['download_bytes'])}, "
            + (f"gated ({report['gated']}): its terms are to be accepted first" if report["gated"] else "open to all"),
        )
    if "stored_bytes" not in report:
        return
    yield "stored", ", ".join(f"{format_bytes(size)} {kind}" for kind, size in report["stored_bytes"].items())
    if kinds := report.get("computed_from"):
        yield "computed", "from " + ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    for device, sizes in report["weights_bytes"].items():
        yield f"on {device}", ", ".join(f"{scheme} {format_bytes(size)}" for scheme, size in sizes.items())
    if report["kv_bytes_per_token"]:
        yield "KV cache", f"{report['kv_bytes_per_token']:,} bytes a token"
    yield "context", _context(report)
    if report.get("tokens_per_s"):
        yield (
            "speed",
            (
                f"at most {report['tokens_per_s']:,} tokens/s for one sequence of {_SPEED_CONTEXT:,} tokens, by memory "
                f"that is read with {report['read_bytes_per_s'] / 1e9:.1f} GB/s"
            ),
        )


def _context(report: dict[str, Any]) -> str:
    text = f"{report['model_context']:,} tokens by the model"
    if report.get("context") is not None:
        text += f"; {report['context']:,} with a KV cache of {format_bytes(report['kv_cache_bytes'])}"
    if report.get("largest_context") is not None:
        text += f"; {report['largest_context']:,} fit into the {format_bytes(report['memory_bytes'])} free here"
        if (report.get("context") or 0) < report["largest_context"]:
            need = (report["largest_context"] // _BLOCK_TOKENS + 2) * _BLOCK_TOKENS * report["kv_bytes_per_token"]
            text += f" (--kv-cache-memory {(need >> 20) + 1}MiB)"
    return text
