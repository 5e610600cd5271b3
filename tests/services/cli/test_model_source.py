from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from octavo.services.cli import demo_model, model_source
from octavo.services.cli.errors import CommandError


def ignore(what: str, done: int, total: int) -> None:
    pass


def make_folder(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return folder


def test_a_folder_is_served_by_its_name(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "my-model", "config.json", "tokenizer.json", "model-00001-of-00001.safetensors")

    assert model_source.find(str(folder), ignore) == model_source.Model(folder, "my-model")


def test_a_gguf_file_is_served_by_its_name_without_the_ending(tmp_path: Path) -> None:
    (tmp_path / "my-model.gguf").write_bytes(b"GGUF....")

    assert model_source.find(str(tmp_path / "my-model.gguf"), ignore).name == "my-model"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "it has no config.json, no tokenizer.json, no *.safetensors"),
        (("config.json", "tokenizer.json", "pytorch_model.bin"), "weights in .bin files are never loaded"),
        (("a.gguf",), "to serve a GGUF file, name it: "),
        (("config.json", "model.safetensors"), "it has no tokenizer.json"),
    ],
)
def test_a_folder_that_is_no_model_is_one_line(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    folder = make_folder(tmp_path / "model", *names)

    with pytest.raises(CommandError) as caught:
        model_source.find(str(folder), ignore)

    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["nothing", "./nothing/here", "/no/such/model.gguf", "a/b.gguf", "a/b/c"])
def test_what_is_not_there_is_one_line(text: str) -> None:
    with pytest.raises(CommandError, match=f"there is no {text}: MODEL is a folder"):
        model_source.find(text, ignore)


def test_a_file_that_is_no_gguf_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"what?")

    with pytest.raises(CommandError, match="is not a GGUF file"):
        model_source.find(str(tmp_path / "model.gguf"), ignore)


@pytest.mark.parametrize(("text", "name"), [("demo", "smollm2-135m-instruct"), ("demo-embed", "all-minilm-l6-v2")])
def test_a_demo_is_a_demo_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, name: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo_model, "fetch", lambda cache, report, model: cache / model.name)

    assert model_source.find(text, ignore) == model_source.Model(tmp_path / "octavo/models" / name, name)


def test_of_the_hub_only_tensors_and_texts_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "snapshot", "config.json", "tokenizer.json", "model.safetensors")
    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    assert model_source.find("org/name@v1", ignore) == model_source.Model(folder, "org/name")
    assert (asked["repo"], asked["revision"]) == ("org/name", "v1")
    assert {"*.bin", "*.py"} <= set(asked["ignore_patterns"])
    assert "*.safetensors" in asked["allow_patterns"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("x"), "org/name is not in the cache, and the hub cannot be reached"),
        (OSError(28, "No space left on device"), "cannot download org/name: No space left on device"),
        (RuntimeError("strange\nthings"), "cannot download org/name: strange things"),
    ],
)
def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def download(repo: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    with pytest.raises(CommandError) as caught:
        model_source.find("org/name", ignore)

    assert str(caught.value) == message
