"""Every kernel and configuration compiles for every target; and the check would notice if not."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from octavo.kernels import configs
from octavo.kernels.aot_spec import AotSpec
from tools.kernels import aot
from tools.kernels.aot import KeptRows, Row, check, compile_all, compile_in_child, fitting_blocks, table

from .releases import IMAGE, OLDEST, find_triton

ROOT = Path(__file__).parents[3]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs triton (pip install triton), and no TRITON_INTERPRET",
)
# One of each compiler and of each kind of product of matrices that most GPUs have; the others are for make gpu-gates.
TRIED = ("cuda:80", "cuda:86", "cuda:90", "hip:gfx942")
OTHERS = tuple(target for target in configs.TARGETS if target not in TRIED)
SPEC = AotSpec("kernel", "", {}, {}, num_warps=4, require={"mma": 1})
GOOD = Row("kernel", "cuda:90", registers=40, spills=0, shared=1024, blocks=8, counts={"mma": 2})


def run_aot(*arguments: str, triton: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command, with the release of Triton in a folder if one is given."""
    command = [sys.executable, "-m", "tools.kernels.aot", *arguments]
    folders = [str(triton), *sys.path] if triton else sys.path
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
@pytest.mark.timeout(900)  # minutes on a busy machine
@needs_triton
@pytest.mark.parametrize("targets", [TRIED, pytest.param(OTHERS, marks=pytest.mark.gates)], ids=["tried", "others"])
def test_every_kernel_compiles_for_every_target_without_spills_and_with_its_instructions(
    targets: tuple[str, ...],
) -> None:
    done = run_aot("--timeout", "300", *(f"--target={target}" for target in targets))
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed" in done.stdout
    assert all(f"  {target}  " in done.stdout for target in targets)


@pytest.mark.slow
@pytest.mark.timeout(900)  # minutes on a busy machine
@needs_triton
@pytest.mark.parametrize("release", [OLDEST, pytest.param(IMAGE, marks=pytest.mark.gates)])
def test_every_kernel_compiles_with_the_oldest_triton_that_is_admitted_and_with_that_of_the_image(release: str) -> None:
    """Of one target: what differs between releases is the language and its compiler."""
    folder, problem = find_triton(release)
    if folder is None:
        pytest.skip(problem)
    done = run_aot("--target", "cuda:90", "--timeout", "300", triton=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Triton {release}: " in done.stdout
    assert " 0 failed" in done.stdout


def test_the_releases_that_are_tried_are_those_that_users_get() -> None:
    """The oldest of the range, the newest, and the pair of the image is within."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (admitted,) = (Requirement(text) for text in project["cuda"] if text.startswith("triton"))
    (developed,) = (Requirement(text) for text in project["dev"] if text.startswith("triton"))
    lowest = {str(bound.version) for bound in admitted.specifier if bound.operator == ">="}
    assert Version(OLDEST) == Version(lowest.pop())
    highest = {(bound.operator, bound.version) for bound in admitted.specifier if bound.operator == "<"}
    assert highest == {(bound.operator, bound.version) for bound in developed.specifier if bound.operator == "<"}
    arguments = re.findall(r"^ARG (TORCH|TRITON)=(\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert ("TRITON", f"triton=={IMAGE}") in arguments
    assert admitted.specifier.contains(IMAGE)
    assert len({value for name, value in arguments if name == "TORCH"}) == 1


def test_no_kernel_has_a_literal_below_the_normal_numbers_of_float32() -> None:
    """Older releases of Triton make it float64, and what it is used with does not compile."""
    files = list((ROOT / "kernels").glob("*.py"))
    literals = [
        (file.name, node.lineno, node.value)
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, float) and 0 < node.value < 2.0**-126
    ]
    assert len(files) > 20
    assert literals == []


@needs_triton
def test_what_was_compiled_is_kept_until_the_kernel_or_its_configuration_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from octavo.kernels import gated

    started: list[str] = []
    start = aot._Compilation.__init__

    def counted(self: Any, module: Any, spec: AotSpec, *arguments: Any) -> None:
        started.append(spec.name)
        start(self, module, spec, *arguments)

    monkeypatch.setattr(aot._Compilation, "__init__", counted)

    spec = next(spec for spec in gated.AOT_SPECS if spec.targets == ("cuda:80",))

    def rows(**changes: Any) -> list[Row]:
        monkeypatch.setattr(gated, "AOT_SPECS", [replace(spec, targets=("cuda:80", "cuda:86"), **changes)])
        return compile_all(modules=("gated",), kept=KeptRows(tmp_path))

    first = rows()
    assert (len(started), [row.target for row in first]) == (1, ["cuda:80", "cuda:86"])
    assert rows() == first
    assert "mma 0 < 1" in rows(require={"mma": 1})[0].problems, "rules are those of today"
    assert len(started) == 1
    rows(num_warps=8)
    assert len(started) == 2
    for file in tmp_path.iterdir():
        file.write_text("cut off")
    assert rows() == first
    assert len(started) == 3
    KeptRows(tmp_path, max_age_s=-1).forget_old()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        ((7, 5), None),
        ((8, 0), "cuda:80"),
        ((8, 6), "cuda:86"),
        ((8, 7), "cuda:86"),
        ((8, 9), "cuda:89"),
        ((9, 0), "cuda:90"),
        ((10, 0), "cuda:100"),
        ((10, 3), "cuda:100"),
        ((12, 0), "cuda:120"),
        ((12, 1), "cuda:120"),
    ],
)
def test_a_gpu_gets_the_configurations_that_fit_it(capability: tuple[int, int], target: str | None) -> None:
    assert configs.cuda_target(*capability) == target
    assert target is None or target in configs.TARGETS


@pytest.mark.parametrize(
    ("row", "spec"),
    [
        (replace(GOOD, spills=8), SPEC),
        (replace(GOOD, spills=None), SPEC),
        (replace(GOOD, shared=232449), SPEC),
        (replace(GOOD, shared=None), SPEC),
        (replace(GOOD, blocks=1), SPEC),
        (replace(GOOD, blocks=None), SPEC),
        (replace(GOOD, counts={}), SPEC),
        (replace(GOOD, inexact=1), replace(SPEC, enable_fp_fusion=False)),
    ],
    ids=[
        "spills",
        "unknown spills",
        "shared memory",
        "unknown shared memory",
        "blocks",
        "unknown blocks",
        "instruction",
        "fused",
    ],
)
def test_a_row_that_breaks_a_rule_has_a_problem(row: Row, spec: AotSpec) -> None:
    assert check(GOOD, spec) == []
    assert len(check(row, spec)) == 1


@pytest.mark.parametrize(
    ("target", "registers", "shared", "num_warps", "blocks"),
    [
        ("cuda:90", 128, 0, 4, 4),  # 65536 registers / (128 * 128)
        ("cuda:90", 129, 0, 8, 1),  # rounded up to 136: 15 warps
        ("cuda:90", 32, 113000, 4, 2),
        ("cuda:90", 32, 116000, 4, 1),
        ("hip:gfx942", 257, 0, 4, 1),
        ("hip:gfx942", 0, 0, 4, 64),
        ("hip:gfx942", 64, 32768, 4, 2),
    ],
)
def test_registers_and_shared_memory_limit_the_blocks_of_a_multiprocessor(
    target: str, registers: int, shared: int, num_warps: int, blocks: int
) -> None:
    assert fitting_blocks(target, registers, shared, num_warps) == blocks


def compile_gated(timeout: float = 60, **changes: Any) -> Row:
    from octavo.kernels import gated

    spec = next(spec for spec in gated.AOT_SPECS if spec.targets == ("cuda:90",))
    return compile_in_child(gated, replace(spec, **changes), "cuda:90", timeout)


@needs_triton
def test_a_kernel_that_does_not_compile_is_a_failed_row() -> None:
    assert compile_gated().problems == []
    assert "power of" in compile_gated(constexprs={"COLS": 8, "ACTIVATION": 0, "BLOCK": 1000}).problems[0]


@needs_triton
def test_a_compiler_that_hangs_or_dies_costs_one_row() -> None:
    assert compile_gated(timeout=0).problems == ["still compiling after 0 s"]

    class Deadly:
        def __getattr__(self, name: str) -> Any:
            os._exit(3)

    row = compile_in_child(Deadly(), SPEC, "cuda:90", 60)
    assert row.problems == ["the compiler died with exit status 3"]


@needs_triton
def test_rows_come_in_the_order_of_the_kernels_however_many_are_compiled_at_once() -> None:
    rows = compile_all(["cuda:90"], only="silu", modules=("gated",), jobs=2)
    assert [row.kernel for row in rows] == ["gated silu 1536", "gated silu 14336"]
    assert [row.problems for row in rows] == [[], []]
    late = compile_all(["cuda:90"], only="silu", modules=("gated",), timeout=0, jobs=2)
    assert [row.problems for row in late] == [["still compiling after 0 s"]] * 2


@needs_triton
def test_a_kernel_that_lacks_a_required_instruction_is_a_failed_row() -> None:
    assert compile_gated(require={"mma": 1}).problems == ["mma 0 < 1"]


@needs_triton
def test_kernels_that_are_specified_to_the_bit_would_be_caught_if_they_fused() -> None:
    from octavo.kernels import sampling_kernels

    def draws(specs: Sequence[AotSpec]) -> AotSpec:
        return next(spec for spec in specs if spec.function == "draw_piece" and spec.targets == ("cuda:90",))

    spec = draws(sampling_kernels.AOT_SPECS)
    assert not spec.enable_fp_fusion
    fused = compile_in_child(sampling_kernels, replace(spec, enable_fp_fusion=True), "cuda:90", 60)
    assert fused.inexact > 0


@pytest.mark.parametrize("target", configs.TARGETS)
@pytest.mark.parametrize("head_dim", [1, 64, 80, 128, 192, 256])
def test_there_is_a_configuration_for_every_shape(target: str, head_dim: int) -> None:
    for step in ("decode", "mixed"):
        for is_float32 in (False, True):
            config = configs.attention_config(target, step, head_dim, is_float32=is_float32)
            assert config.split_keys % config.block_n == 0
            assert config.block_m >= 16


@pytest.mark.parametrize("target", configs.TARGETS)
def test_tiles_of_a_layer_follow_the_number_of_tokens_only_where_sums_are_exact(target: str) -> None:
    for kind in configs.LINEAR_KINDS[target]:
        for out_features in (576, 4096, 28672):
            tiles = {configs.linear_config(target, kind, out_features, tokens) for tokens in (1, 17, 64, 65, 8192)}
            assert len(tiles) == (3 if kind == "int8_int8" else 1)


def test_the_table_shows_what_is_not_known_and_what_is_wrong() -> None:
    text = table([GOOD, Row("other", "hip:gfx942", problems=["it broke"])])
    assert "kernel" in text
    assert "it broke" in text.splitlines()[-1]
    assert " -" in text.splitlines()[-1]
