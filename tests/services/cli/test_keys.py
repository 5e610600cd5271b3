"""`octavo keys`: the file of API keys as it is changed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from octavo.services.cli import keys
from octavo.services.common.api_keys import parse_keys
from octavo.services.common.folders import locked


def octavo_keys(*arguments: str) -> int:
    return keys.main(["keys", *arguments])


def test_keys_that_are_added_at_the_same_time_are_all_in_the_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "octavo.services.cli", "keys", "add", f"--file={tmp_path}/keys.yaml"]

    with ThreadPoolExecutor(6) as pool:
        runs = list(
            pool.map(lambda n: subprocess.run([*command, f"--tenant=t{n}"], capture_output=True, text=True), range(6))
        )

    assert [run.returncode for run in runs] == [0] * 6, [run.stderr for run in runs]
    stored = parse_keys((tmp_path / "keys.yaml").read_bytes())
    assert set(stored) == {run.stdout.split("_")[1] for run in runs}


def test_a_change_waits_for_another_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.yaml"
    octavo_keys("add", f"--file={file}", "--tenant=a")
    with locked(tmp_path):
        before = file.read_bytes()
        second = threading.Thread(target=octavo_keys, args=("add", f"--file={file}", "--tenant=b"))
        second.start()
        second.join(0.2)
        assert file.read_bytes() == before
    second.join(30)
    assert len(parse_keys(file.read_bytes())) == 2


def test_whoever_may_read_the_file_still_may_after_a_change(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    octavo_keys("add", f"--file={file}", "--tenant=a")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600  # a new one is private
    file.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(file, 1234, 4321)
    owner = file.stat().st_uid, file.stat().st_gid

    octavo_keys("add", f"--file={file}", "--tenant=b")

    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert (file.stat().st_uid, file.stat().st_gid) == owner


def test_an_owner_that_cannot_be_kept_is_one_line_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    file = tmp_path / "keys.yaml"
    octavo_keys("add", f"--file={file}", "--tenant=a")
    before = file.read_bytes()
    monkeypatch.setattr(os, "chown", refuse)

    assert octavo_keys("add", f"--file={file}", "--tenant=b") == 1

    assert "change it as that user" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["keys.yaml"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "here.yaml").symlink_to(tmp_path / "there" / "keys.yaml")

    for tenant in "ab":
        octavo_keys("add", f"--file={tmp_path}/here.yaml", f"--tenant={tenant}")

    assert (tmp_path / "here.yaml").is_symlink()
    assert len(parse_keys((tmp_path / "there" / "keys.yaml").read_bytes())) == 2


@pytest.mark.parametrize(("action", "missing"), [("add", "--tenant is missing"), ("remove", "--id is missing")])
def test_what_is_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], action: str, missing: str
) -> None:
    assert octavo_keys(action, f"--file={tmp_path}/keys.yaml") == 1
    assert missing in capsys.readouterr().err
