"""`octavo model`: what is sealed is verified, and whatever differs is found before anything reads it."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import huggingface_hub
import pytest

from octavo.services.cli import model
from octavo.services.cli.__main__ import main
from octavo.services.cli.model import EXIT_CORRUPT, MANIFEST

WEIGHTS = "model.safetensors"


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    for name, size in (("config.json", 10), ("tokenizer.json", 20), (WEIGHTS, 3000)):
        (source / name).write_bytes(bytes(index % 251 for index in range(size)))
    folder = tmp_path / "volume" / "model"
    assert main(["model", "fetch", str(folder), f"--source={source}"]) == 0
    return folder


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_what_was_fetched_is_as_sealed(sealed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "verify", str(sealed)]) == 0
    assert "3 files are as sealed" in capsys.readouterr().out


def test_the_numbered_folders_of_a_model_for_vectors_come_along(sealed: Path, tmp_path: Path) -> None:
    (tmp_path / "source" / "1_Pooling").mkdir()
    (tmp_path / "source" / "1_Pooling" / "config.json").write_text("{}")
    folder = tmp_path / "other"
    assert main(["model", "fetch", str(folder), f"--source={tmp_path / 'source'}"]) == 0
    assert main(["model", "verify", str(folder)]) == 0
    (folder / "1_Pooling" / "config.json").unlink()
    assert main(["model", "verify", str(folder)]) == EXIT_CORRUPT
    assert main(["model", "verify", str(sealed)]) == 0


@pytest.mark.parametrize(
    ("damage", "said"), [(flip, "another SHA-256"), (cut, "2999 bytes, not 3000"), (Path.unlink, "is missing")]
)
def test_a_damaged_file_is_found(sealed: Path, damage: object, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(damage)
    damage(sealed / WEIGHTS)
    assert main(["model", "verify", str(sealed)]) == EXIT_CORRUPT
    assert f"{WEIGHTS} " in (error := capsys.readouterr().err)
    assert said in error
    assert main(["model", "verify", str(sealed), "--only=*.json"]) == 0


@pytest.mark.parametrize("text", ["", "[]", '{"files": {"config.json": {}}}'])
def test_a_damaged_manifest_is_found(sealed: Path, text: str) -> None:
    (sealed / MANIFEST).write_text(text)
    assert main(["model", "verify", str(sealed)]) == EXIT_CORRUPT


def test_a_folder_that_was_never_sealed_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "verify", str(tmp_path)]) == 1
    assert "is not sealed" in capsys.readouterr().err


def test_verify_waits_for_a_folder_that_is_being_filled(sealed: Path) -> None:
    manifest = (sealed / MANIFEST).read_text()
    (sealed / MANIFEST).unlink()
    filling = threading.Timer(0.2, (sealed / MANIFEST).write_text, [manifest])
    filling.start()
    try:
        assert main(["model", "verify", str(sealed), "--wait-s=60s"]) == 0
    finally:
        filling.join()


def test_a_sealed_folder_is_not_fetched_again(sealed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(sealed)
    (tmp_path / "source" / WEIGHTS).unlink()
    assert main(["model", "fetch", str(sealed), f"--source={tmp_path / 'source'}"]) == 0
    assert "nothing to fetch" in capsys.readouterr().out
    assert contents(sealed) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A hub of models of one organization: the commit of each name with its revision."""
    commits = {"org/a": "c1", "org/a@v2": "c2", "org/b": "c1"}

    def download(repo: str, revision: str | None, **_: object) -> str:
        commit = commits[f"{repo}@{revision}" if revision else repo]
        folder = tmp_path / "hub" / repo.replace("/", "--") / "snapshots" / commit
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "tokenizer.json", WEIGHTS):
            (folder / name).write_text(f"{repo} {commit}")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return commits


@pytest.mark.parametrize("other", ["org/b", "org/a@v2", "org/b@c1"])
def test_another_model_or_revision_is_not_taken_for_the_one_that_is_there(
    hub: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    folder = tmp_path / "model"
    assert main(["model", "fetch", str(folder), "--source=org/a"]) == 0
    before = contents(folder)
    for action in ("fetch", "verify"):
        assert main(["model", action, str(folder), f"--source={other}"]) == EXIT_CORRUPT
        assert f"is sealed with org/a (c1), not {other}: choose another folder" in capsys.readouterr().err
    assert contents(folder) == before
    assert hub


@pytest.mark.parametrize("same", ["org/a", "org/a@c1"])
def test_the_same_model_is(hub: dict[str, str], tmp_path: Path, same: str) -> None:
    folder = tmp_path / "model"
    assert main(["model", "fetch", str(folder), "--source=org/a"]) == 0
    hub["org/a"] = "c3"
    for action in ("fetch", "verify"):
        assert main(["model", action, str(folder), f"--source={same}"]) == 0
    assert (folder / WEIGHTS).read_text() == "org/a c1"


def test_a_folder_of_unknown_source_is_told_what_it_is(
    sealed: Path, hub: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert hub
    assert main(["model", "seal", str(sealed)]) == 0
    assert main(["model", "fetch", str(sealed), "--source=org/a"]) == EXIT_CORRUPT
    assert f"octavo model seal {sealed} --source=org/a" in capsys.readouterr().err
    assert main(["model", "verify", str(sealed)]) == 0
    assert main(["model", "seal", str(sealed), "--source=org/a"]) == 0
    assert main(["model", "fetch", str(sealed), "--source=org/a"]) == 0


def test_a_folder_with_files_of_another_model_is_not_filled(
    hub: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hub
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model-00001-of-00002.safetensors").touch()
    assert main(["model", "fetch", str(folder), "--source=org/a"]) == EXIT_CORRUPT
    assert "is no file of org/a" in capsys.readouterr().err
    assert not (folder / MANIFEST).exists()


def test_two_fetches_into_a_folder_take_turns(
    hub: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first one copies when the second one comes; the second one finds what the first one sealed."""
    assert hub
    folder, copies, second = tmp_path / "model", 0, threading.Event()
    copyfile = shutil.copyfile

    def fetch() -> None:
        assert main(["model", "fetch", str(folder), "--source=org/a"]) == 0

    def copy(source: Path, target: Path) -> None:
        nonlocal copies
        copies += 1
        if copies == 1:
            other.start()
            assert second.wait(60)
        copyfile(source, target)

    def note(text: str, **_: object) -> None:
        if "is being filled" in text:
            second.set()

    other = threading.Thread(target=fetch)
    monkeypatch.setattr(shutil, "copyfile", copy)
    monkeypatch.setattr(model, "print", note, raising=False)
    fetch()
    other.join()
    assert copies == 3
    assert main(["model", "verify", str(folder)]) == 0


def test_sizes_alone_are_compared_without_a_look_at_what_is_in_the_files(
    sealed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(sealed / WEIGHTS)
    monkeypatch.setattr(model, "sha256_of", None)
    assert main(["model", "verify", str(sealed), "--sizes-only"]) == 0
    cut(sealed / WEIGHTS)
    assert main(["model", "verify", str(sealed), "--sizes-only"]) == EXIT_CORRUPT
    assert "2999 bytes, not 3000" in capsys.readouterr().err


def test_who_waits_for_a_folder_says_so_at_once(
    tmp_path: Path, sealed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, naps = tmp_path / "empty", []
    folder.mkdir()

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            shutil.copytree(sealed, folder, dirs_exist_ok=True)

    monkeypatch.setattr(model.time, "sleep", nap)
    assert main(["model", "verify", str(folder), "--wait-s=9m"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line for line in told if line.startswith("waiting up to 540 s for")] == told[:1]


def test_what_was_downloaded_onto_the_same_disk_takes_its_space_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = tmp_path / "claim" / ".octavo-downloads"
    source = downloads / "snapshot"
    source.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (source / name).write_text("{}")
    (downloads / "blob").write_bytes(b"weights")
    (source / WEIGHTS).symlink_to(downloads / "blob")
    elsewhere = tmp_path / "mine"
    shutil.copytree(source, elsewhere)
    monkeypatch.setenv("HF_HOME", str(downloads))

    for place, same in ((source, True), (elsewhere, False)):
        folder = tmp_path / "claim" / place.name
        assert main(["model", "fetch", str(folder), f"--source={place}"]) == 0
        assert main(["model", "verify", str(folder)]) == 0
        assert (folder / WEIGHTS).samefile(downloads / "blob") == same
        assert not (folder / WEIGHTS).is_symlink()
        assert not (folder / WEIGHTS).samefile(elsewhere / WEIGHTS), "a folder of somebody's is copied"


def test_a_download_that_takes_long_says_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "part").write_bytes(bytes(100))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(model, "_TELL_S", 0.001)
    told = threading.Event()
    monkeypatch.setattr(model, "_size", lambda folder: told.set() or 2_500_000_000)
    with model._progress(tmp_path):
        assert told.wait(10)
    assert "downloading: 2.5 GB" in capsys.readouterr().out
