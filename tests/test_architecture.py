"""What holds the shape of the project: imports point one way, names stay ours, nothing unsafe comes in."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("services", "gpu_worker", "kernels", "protos", "src/octavo/ray")

# Which parts of octavo each part may import, besides itself. A proto package is "protos".
ALLOWED = {
    "protos": set(),
    "kernels": set(),
    "gpu_worker": {"protos", "kernels", "services.telemetry"},
    "services.telemetry": set(),
    "services.common": {"protos"},
    "services.gateway": {"protos", "services.batch", "services.common", "services.telemetry"},
    "services.scheduler": {"protos", "services.common", "services.telemetry"},
    "services.client": {"protos", "services.common"},
    "services.bench": {"services.client"},
    "services.batch": set(),
    "services.offline": {"services.batch", "services.client"},
    "services.cli": {
        "protos", "services.batch", "services.bench", "services.client", "services.common", "services.gateway",
        "services.offline", "services.scheduler", "services.telemetry", "gpu_worker",
    },
    "ray": {"protos", "services.client", "services.offline"},
}  # fmt: skip
PROTO_AREAS = {"admin", "common", "inference", "scheduler", "worker"}
# Importing it says what to install where Ray is missing, which is an error.
WITHOUT_RAY = () if importlib.util.find_spec("ray") else ("octavo.ray",)
FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


def sources() -> list[Path]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return sorted(path for path in files if "_pb2" not in path.name)


def inside_octavo(path: Path) -> Path:
    """Where a source is below the package; its place in the repository, for what is linked there."""
    relative = path.relative_to(ROOT)
    return relative.relative_to("src/octavo") if relative.is_relative_to("src/octavo") else relative


def part_of(module: str) -> str | None:
    """The part that a module belongs to: `octavo.services.gateway.server` -> `services.gateway`."""
    words = module.split(".")
    if words[0] != "octavo" or len(words) == 1 or words[1].startswith("__"):
        return None
    if words[1] in PROTO_AREAS:
        return "protos"
    if words[1] == "services" and len(words) > 2 and not words[2].startswith("__"):
        return ".".join(words[1:3])
    return words[1]


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            modules.add(node.module)
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path: Path) -> None:
    own = part_of("octavo." + ".".join(inside_octavo(path).with_suffix("").parts))
    if path.is_relative_to(ROOT / "protos"):
        own = "protos"
    if own == "services":
        return  # services/__init__.py holds nothing
    assert own in ALLOWED, f"{path} belongs to no part of the table"
    for module in imported_modules(path):
        assert module.split(".")[0] not in ("services", "gpu_worker", "kernels", "protos"), f"{path}: bare {module}"
        assert module.split(".")[0] not in FORBIDDEN_MODULES, f"{path}: {module}"
        part = part_of(module)
        if part is not None and part != own and part != "services":
            assert part in ALLOWED[own], f"{path} imports {module}: {own} may not import {part}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_loads_code_or_objects_from_data(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            assert dotted not in ("torch.load", "np.load", "numpy.load"), f"{path}:{node.lineno}: {dotted}"
            assert node.attr not in ("recv_pyobj", "send_pyobj"), f"{path}:{node.lineno}: {dotted}"
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            raise AssertionError(f"{path}:{node.lineno}: trust_remote_code")
        if isinstance(node, ast.Name):
            assert node.id not in ("eval", "exec"), f"{path}:{node.lineno}: {node.id}"


def test_every_folder_with_code_is_a_package() -> None:
    for path in sources():
        if path.name != "generate.py":
            assert (path.parent / "__init__.py").exists(), f"{path.parent} would be missing from the wheel"


IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked here")
sys.meta_path.insert(0, Blocker())
import octavo
count = 0
def walk(prefix, path):
    global count
    for info in pkgutil.iter_modules(path, prefix):
        if info.name.startswith({skipped!r}) or info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        count += 1
        if info.ispkg:
            walk(info.name + ".", module.__path__)
walk("octavo.", octavo.__path__)
print(count, *sorted({{name.split(".")[0] for name in sys.modules}}))
"""


def import_everything(blocked: set[str], skipped: tuple[str, ...]) -> list[str]:
    code = IMPORT_EVERYTHING.format(blocked=blocked, skipped=skipped)
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, *modules = done.stdout.split()
    assert int(count) > 20
    return modules


def test_services_import_without_torch() -> None:
    blocked = {"torch", "triton", "transformers", "safetensors"}
    modules = import_everything(blocked, ("octavo.gpu_worker", "octavo.kernels", *WITHOUT_RAY))
    assert not blocked & set(modules)


def test_no_bare_package_of_ours_is_ever_imported() -> None:
    modules = import_everything(set(), ("octavo.nothing", *WITHOUT_RAY))
    assert not {"services", "gpu_worker", "kernels", "protos"} & set(modules)


def test_generated_code_is_current() -> None:
    subprocess.run([sys.executable, str(ROOT / "protos/generate.py"), "--check"], check=True)


def buf(*arguments: str) -> subprocess.CompletedProcess[str]:
    tool = Path(sys.executable).with_name("buf")
    return subprocess.run([str(tool), *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_protos_pass_the_linter_and_are_formatted() -> None:
    done = buf("lint")
    assert done.returncode == 0, done.stdout
    assert buf("format", "--exit-code").returncode == 0


def test_protos_break_nothing_that_was_released() -> None:
    done = buf("breaking", "--against", "protos/released.binpb")
    assert done.returncode == 0, done.stdout


def test_the_breaking_check_finds_a_renumbered_field(tmp_path: Path) -> None:
    changed = tmp_path / "protos"
    subprocess.run(["cp", "-r", str(ROOT / "protos"), str(changed)], check=True)
    proto = changed / "octavo/inference/v1/generation.proto"
    proto.write_text(proto.read_text().replace("uint32 token_offset = 2;", "uint32 token_offset = 20;"))
    done = buf("breaking", str(changed), "--against", "protos/released.binpb")
    assert done.returncode != 0
    assert "token_offset" in done.stdout


def test_the_wheel_holds_every_module_and_no_other_top_level_name(tmp_path: Path) -> None:
    tree = tmp_path / "tree"  # a build leaves files behind, which must not be in the next one
    tree.mkdir()
    for name in (*PACKAGES[:4], "src", "pyproject.toml", "README.md", "LICENSE", "setup.py"):
        if (ROOT / name).exists():
            subprocess.run(["cp", "-r", str(ROOT / name), str(tree)], check=True)
    environment = {**os.environ, "OCTAVO_NO_NATIVE_BUILD": "1"}
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(tmp_path), str(tree)], check=True, capture_output=True, env=environment)
    (wheel,) = tmp_path.glob("octavo-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"octavo"}
    for path in sources():
        relative = inside_octavo(path)
        if relative.parts[0] == "protos":
            if relative.name == "generate.py":
                continue
            relative = Path(*relative.parts[2:])
        assert f"octavo/{relative}" in names
    assert "octavo/inference/v1/generation_pb2.py" in names
    assert "octavo/inference/v1/generation.proto" in names
    assert any(name.startswith("octavo/kernels/cpu/") and name.endswith(".cpp") for name in names)
