"""A worker that is told to stop: at once, or when its scheduler needs it no more."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.errors import SettingError
from octavo.gpu_worker.lifetime import Lifetime
from octavo.services.cli.__main__ import main


def lifetime(stop: threading.Event, drain_s: float = 0.0, alive_file: str = "") -> Lifetime:
    return Lifetime(WorkerConfig(model="m", drain_s=drain_s, alive_file=alive_file), stop)


def test_without_draining_a_signal_ends_it_at_once() -> None:
    stop = threading.Event()
    it = lifetime(stop)
    assert not it.is_over(is_needed=False)
    stop.set()
    assert it.is_over(is_needed=True)


def test_with_draining_it_ends_when_its_scheduler_is_gone() -> None:
    stop = threading.Event()
    stop.set()
    it = lifetime(stop, drain_s=3600)
    assert not it.is_over(is_needed=True)
    assert it.is_over(is_needed=False)


def test_with_draining_it_ends_when_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("octavo.gpu_worker.lifetime.time.monotonic", lambda: now[0])
    stop = threading.Event()
    it = lifetime(stop, drain_s=30)
    stop.set()
    assert not it.is_over(is_needed=True)
    now[0] += 29
    assert not it.is_over(is_needed=True)
    now[0] += 1
    assert it.is_over(is_needed=True)


def test_a_loop_that_turns_keeps_its_file_young(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("octavo.gpu_worker.lifetime.time.monotonic", lambda: now[0])
    file = tmp_path / "alive"
    probe = ["health", f"--alive-file={file}", "--max-age-s=60s"]
    assert main(probe) == 1  # the model is being loaded
    it = lifetime(threading.Event(), alive_file=str(file))
    assert main(probe) == 0
    os.utime(file, (0, 0))  # the loop stood still for long
    assert main(probe) == 1
    now[0] += 2
    it.is_over(is_needed=True)
    assert main(probe) == 0


def test_the_file_of_the_process_before_does_not_count(tmp_path: Path) -> None:
    file = tmp_path / "alive"
    file.touch()
    command = [sys.executable, "-m", "octavo.services.cli", "worker", f"--model={tmp_path}/none", "--device=cpu"]
    done = subprocess.run([*command, f"--alive-file={file}"], capture_output=True, check=False)
    assert done.returncode == 1
    assert not file.exists()


def test_a_file_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="alive_file"):
        lifetime(threading.Event(), alive_file=str(tmp_path / "no" / "folder"))
