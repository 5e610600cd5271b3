"""Builds the source distribution and the wheel from it, and uses both in clean environments of each Python.

    python -m tests.packaging [--python 3.11 --python 3.13 ...]

Each extra is installed alone, and what it is for is imported. A gateway with a scheduler serves its list of models
without torch. The wheel and the source distribution serve the demo, away from the sources. torch is installed once, for
the Python that runs this; the others read the weights that it packed. A Python that is not there is skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import runpy
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from octavo.kernels.cpu import build, library
from octavo.services.cli import demo_model

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.11", "3.12", "3.13")
OWN_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
TORCH_EXTRAS = ("worker", "serve")
# What an extra is for: packages of which every module is imported, and a command whose help is shown.
EXTRAS = {
    "client": ("octavo.services.client", "generate"),
    "gateway": ("octavo.services.gateway", "gateway"),
    "scheduler": ("octavo.services.scheduler", "scheduler"),
    "worker": ("octavo.gpu_worker", "worker"),
    "batch": ("octavo.services.batch octavo.services.offline", "batch"),
    "bench": ("octavo.services.bench", "bench"),
}
IMPORT_ALL = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    assert "site-packages" in package.__file__, package.__file__
    for info in pkgutil.walk_packages(package.__path__, name + "."):
        if not info.name.endswith("__main__"):
            try:
                importlib.import_module(info.name)
            except ModuleNotFoundError as error:
                if error.name.split(".")[0] not in ("triton", "numpy", "rich"):  # of the extras cuda and serve
                    raise
"""
READY_KERNELS = """
from octavo.kernels.cpu import build, library
path = build.library_path(library.runnable_variants()[0])
assert path.parent == build.READY_FOLDER, path
library.load()
"""
START_TIMEOUT_S = 180
STOP_TIMEOUT_S = 60


@dataclass
class Workshop:
    """A folder away from the sources, with uv and what was built."""

    folder: Path
    uv: Path
    sdist: Path
    wheel: Path

    def environment(self, name: str, python: Path, requirement: str, *, torch: bool) -> Path:
        """Return the Python of a new environment that has `requirement`. Without `torch` nothing brings it."""
        home = self.folder / name
        run(self.uv, "venv", "--quiet", "--python", python, home)
        if torch:
            self._install_torch(home)
        no_torch = self.folder / "no-torch.txt"
        no_torch.write_text("torch; sys_platform == 'none'\n")
        self.install(home, requirement, *([] if torch else ["--override", no_torch]))
        return home / "bin" / "python"

    @property
    def cache(self) -> Path:
        """What servers keep, but the models, which are the user's."""
        return self.folder / "cache"

    def has_packed_weights(self) -> bool:
        """Whether a server with torch has kept packed weights."""
        return any(self.cache.glob("octavo/packed/*.packed"))

    def install(self, home: Path, *arguments: str | Path) -> None:
        run(self.uv, "pip", "install", "--quiet", "--python", home / "bin" / "python", *arguments)

    def _install_torch(self, home: Path) -> None:
        index = ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
        release = runpy.run_path(str(ROOT / "deploy" / "install_torch.py"))["RELEASE"]
        ways = [[f"torch=={release}+cpu"], [f"torch=={release}+cpu", *index], [f"torch=={release}"]]
        for way in ways[:-1]:
            with contextlib.suppress(subprocess.CalledProcessError):
                return self.install(home, *way)
        return self.install(home, *ways[-1])


def main() -> None:
    """Run everything; ends with an error at the first thing that does not work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", help="a version, such as 3.12; default: all that are supported")
    wanted = parser.parse_args().python or list(PYTHONS)
    found = {version: find_python(version) for version in sorted(wanted, key=lambda version: version != OWN_PYTHON)}
    with tempfile.TemporaryDirectory(prefix="octavo-packages-") as folder, timed("everything"):
        workshop = set_up(Path(folder))
        for version, python in found.items():
            if python is None:
                print(f"Python {version}: skipped, there is none on this machine", flush=True)
            else:
                check(workshop, version, python)


def set_up(folder: Path) -> Workshop:
    """Install the tools, build, and look into what was built."""
    with timed("uv and build"):
        run(sys.executable, "-m", "venv", folder / "tools")
        run(folder / "tools" / "bin" / "pip", "install", "--quiet", "uv", "build")
    with timed("source distribution, and the wheel from it"):
        tools = {"PATH": f"{folder / 'tools' / 'bin'}:{os.environ['PATH']}", "CXX": str(quick_compiler(folder))}
        python = folder / "tools" / "bin" / "python"
        run(python, "-m", "build", "--installer=uv", "--outdir", folder / "dist", ROOT, environ=tools)
    ((sdist,), (wheel,)) = ((folder / "dist").glob(pattern) for pattern in ("*.tar.gz", "*.whl"))
    with tarfile.open(sdist) as tar, zipfile.ZipFile(wheel) as archive:
        packed = [*(name.split("/", 1)[-1] for name in tar.getnames()), *archive.namelist()]
    strays = [name for name in packed if name.startswith(("tests", "benchmarks", "build")) or "/test_" in name]
    assert not strays, f"what nobody imports is packed: {strays}"
    workshop = Workshop(folder, folder / "tools" / "bin" / "uv", sdist, wheel)
    kept = workshop.cache / "octavo"
    kept.mkdir(parents=True)
    shutil.copy(build.library_path(library.runnable_variants()[0]), kept)
    demo_model.cache_dir().mkdir(parents=True, exist_ok=True)
    (kept / "models").symlink_to(demo_model.cache_dir())
    return workshop


def quick_compiler(folder: Path) -> Path:
    """Return a command that links the kernels of this CPU from the cache, and empty ones for other CPUs."""
    variant = library.runnable_variants()[0]
    own = build.library_path(variant)
    compiler = folder / "quick-c++"
    compiler.write_text(f"""#!{sys.executable}
import os, shutil, sys
arguments = ["/dev/null" if each.endswith(".cpp") else each for each in sys.argv[1:]]
ours = {set(build.variants()[variant])!r} == {{each for each in arguments if each.startswith("-m")}}
if ours and "-c" not in arguments and "-o" in arguments:
    shutil.copy({str(own)!r}, arguments[arguments.index("-o") + 1])
else:
    os.execvp("c++", ["c++", "-x", "c++", *arguments] if "/dev/null" in arguments else ["c++", *arguments])
""")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    return compiler


def check(workshop: Workshop, version: str, python: Path) -> None:
    """Try everything with one Python."""
    has_torch = version == OWN_PYTHON
    for extra, (packages, command) in EXTRAS.items():
        with timed(f"Python {version}: {extra}"):
            torch = has_torch and extra in TORCH_EXTRAS
            installed = workshop.environment(f"{version}-{extra}", python, f"{workshop.wheel}[{extra}]", torch=torch)
            if torch or extra not in TORCH_EXTRAS:
                run(installed, "-P", "-c", IMPORT_ALL, *packages.split(), cwd=workshop.folder)
            run(installed.parent / "octavo", command, *(["run"] if command == "batch" else []), "--help")
            shutil.rmtree(installed.parents[1])
    with timed(f"Python {version}: serve, from the source distribution"):
        requirement = f"{workshop.sdist}[serve]"
        os.environ["OCTAVO_NO_NATIVE_BUILD"] = "1"  # the kernels are compiled at first use, or lie in the cache
        installed = workshop.environment(f"{version}-serve", python, requirement, torch=has_torch)
        del os.environ["OCTAVO_NO_NATIVE_BUILD"]
        if not has_torch and not workshop.has_packed_weights():
            print(f"Python {version}: the demo is skipped: torch packs its weights, and Python {OWN_PYTHON} has that")
            return
        serve_demo(installed, workshop)
    with timed(f"Python {version}: serve, from the wheel"):
        workshop.install(installed.parents[1], "--reinstall-package", "octavo", "--no-deps", str(workshop.wheel))
        run(installed, "-P", "-c", READY_KERNELS, cwd=workshop.folder)
        serve_demo(installed, workshop)
        shutil.rmtree(installed.parents[1])
    with timed(f"Python {version}: gateway and scheduler without torch"):
        requirement = f"{workshop.wheel}[gateway,scheduler]"
        installed = workshop.environment(f"{version}-light", python, requirement, torch=False)
        list_models(installed, workshop)
        shutil.rmtree(installed.parents[1])


def serve_demo(python: Path, workshop: Workshop) -> None:
    """Have the demo answer a request, keep its packed weights, and stop."""
    port = free_port()
    listening = ["--grpc-address=127.0.0.1:0", f"--http-address=127.0.0.1:{port}"]
    flags = ["--device=cpu", "--kv-cache-memory=64MiB", "--max-model-len=1024"]
    with running(workshop, python.parent / "octavo", "serve", "demo", *listening, *flags) as server:
        (model,) = server.ask(port, "models")["data"]
        body = {"model": model["id"], "prompt": "The capital of France is", "max_tokens": 6, "temperature": 0}
        answer = server.ask(port, "completions", body)
        assert "Paris" in answer["choices"][0]["text"], answer
        server.wait_until(workshop.has_packed_weights)


def list_models(python: Path, workshop: Workshop) -> None:
    """Have a gateway without workers name its model."""
    model = demo_model.fetch(demo_model.cache_dir(), lambda *_: None)
    missing = "import importlib.util; assert importlib.util.find_spec('torch') is None"
    run(python, "-P", "-c", missing, cwd=workshop.folder)
    http, grpc, scheduler, workers = (free_port() for _ in range(4))
    octavo = python.parent / "octavo"
    peers = [f"--scheduler-address=127.0.0.1:{scheduler}", f"--worker-endpoint=tcp://127.0.0.1:{workers}"]
    own = [f"--http-address=127.0.0.1:{http}", f"--grpc-address=127.0.0.1:{grpc}"]
    with (
        running(workshop, octavo, "scheduler", *peers),
        running(workshop, octavo, "gateway", model, *own, f"--scheduler-addresses=127.0.0.1:{scheduler}") as gateway,
    ):
        assert gateway.ask(http, "models")["data"][0]["id"] == demo_model.SMOLLM2.name


class Server:
    """A process of an environment, which must not end by itself."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def wait_until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not condition():
            assert self._process.poll() is None, f"it ended with status {self._process.returncode}"
            assert time.monotonic() < deadline, f"nothing came of it in {START_TIMEOUT_S} s"
            time.sleep(0.1)

    def ask(self, port: int, path: str, body: object = None) -> dict[str, list[dict[str, str]]]:
        """Return what /v1/PATH answers, asked again while the server starts."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/{path}", data, {"content-type": "application/json"}
        )
        answers: list[dict[str, list[dict[str, str]]]] = []

        def is_answered() -> bool:
            try:
                with urllib.request.urlopen(request, timeout=START_TIMEOUT_S) as response:
                    answers.append(json.load(response))
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise AssertionError(error.read()) from None
            except OSError:
                pass  # it does not listen yet
            return bool(answers)

        self.wait_until(is_answered)
        return answers[0]


@contextlib.contextmanager
def running(workshop: Workshop, *command: str | Path) -> Iterator[Server]:
    """Run a server away from the sources; it must end in peace when it is told to."""
    environ = clean_environ() | {"XDG_CACHE_HOME": str(workshop.cache)}
    log = workshop.folder / "server.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            list(map(str, command)), cwd=workshop.folder, env=environ, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield Server(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_TIMEOUT_S) == 0, f"it ended with status {process.returncode}"
    except BaseException:
        print(f"servers said until {' '.join(map(str, command))}:\n{log.read_text(errors='replace')}", file=sys.stderr)
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def find_python(version: str) -> Path | None:
    """Return a Python of that version: this one, one of pyenv, or one on PATH."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    on_path = shutil.which(f"python{version}")
    own = [Path(sys.executable)] if version == OWN_PYTHON else []
    for python in [*own, *sorted(pyenv.glob(f"{version}.*/bin/python{version}")), *map(Path, filter(None, [on_path]))]:
        says = subprocess.run([python, "-c", "import venv"], check=False, capture_output=True)
        if says.returncode == 0:  # a shim of pyenv may lead nowhere
            return python
    return None


def clean_environ() -> dict[str, str]:
    """Return the variables without those that lead to the sources, and with pip's local folders for uv."""
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    links = environ.get("PIP_FIND_LINKS", "")
    return environ | ({"UV_FIND_LINKS": ",".join(links.split())} if links else {})


def run(*command: str | Path, cwd: Path | None = None, environ: dict[str, str] | None = None) -> None:
    """Run a command; what it says is shown if it fails."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=clean_environ() | (environ or {}), check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
    )  # fmt: skip
    if done.returncode != 0:
        print(done.stdout[-6000:], file=sys.stderr)
    done.check_returncode()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
