"""`octavo model`: what is sealed is verified, and whatever differs is found before anything reads it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

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


def test_a_sealed_folder_is_not_fetched_again(sealed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "fetch", str(sealed), "--source=/there/is/no/such/model"]) == 0
    assert "nothing to fetch" in capsys.readouterr().out
