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

from tools import house

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("services", "gpu_worker", "kernels", "protos", "src/octavo/ray")

# Importing it says what to install where Ray is missing, which is an error.
WITHOUT_RAY = () if importlib.util.find_spec("ray") else ("octavo.ray",)
FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


def inside_octavo(path: Path) -> Path:
    """Where a source is below the package; its place in the repository, for what is linked there."""
    relative = path.relative_to(ROOT)
    return relative.relative_to("src/octavo") if relative.is_relative_to("src/octavo") else relative


def sources() -> list[Path]:
    return [path for path in house.sources() if path != ROOT / "src/octavo/__init__.py"]


def test_the_counts_imports_and_walls_of_the_house_hold() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "tools/house.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_are_absolute_and_safe(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
    for module in house.imported_names(ast.parse(path.read_text())):
        assert module.split(".")[0] not in ("services", "gpu_worker", "kernels", "protos"), f"{path}: bare {module}"
        assert module.split(".")[0] not in FORBIDDEN_MODULES, f"{path}: {module}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_loads_code_or_objects_from_data(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            assert dotted not in ("torch.load", "np.load", "numpy.load"), f"{path}:{node.lineno}: {dotted}"
            assert node.attr not in ("recv_pyobj", "send_pyobj"), f"{path}:{node.lineno}: {dotted}"
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert ast.unparse(node.value) == "False", f"{path}:{node.lineno}: trust_remote_code"
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
