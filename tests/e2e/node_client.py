"""OpenAI's Node client and a driver for browsers, installed once into the user's cache, and checks with them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from octavo.services.cli import demo_model
from tests.locks import exclusive

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FOLDER = Path(__file__).parent / "node"


def _names(script: str) -> list[str]:
    return re.findall(r'^  async "(.+)"\(', (FOLDER / script).read_text(), re.MULTILINE)


NAMES = _names("checks.mjs")
PAGE_NAMES = _names("page_checks.mjs")


def install() -> Path:
    """Return a folder in which the checks can run; skip the test if there is no Node, or npm is out of reach."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("Node.js is not installed: apt-get install nodejs npm")
    folder = demo_model.cache_dir() / "node-openai"
    with exclusive(folder.with_suffix(".lock")):
        _install(folder)
    return folder


def _install(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    package = (FOLDER / "package.json").read_text()
    installed = folder / "package.json"
    if not (installed.exists() and installed.read_text() == package and (folder / "node_modules").exists()):
        installed.write_text(package)
        command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
        if done.returncode:
            installed.unlink()
            if re.search(r"ENOTFOUND|ECONNREFUSED|ECONNRESET|ETIMEDOUT|EAI_AGAIN|network", done.stderr):
                pytest.skip("the npm registry cannot be reached, and the client is not in the cache")
            raise AssertionError(f"npm install failed:\n{done.stderr}")
    for script in FOLDER.glob("*.mjs"):
        shutil.copy(script, folder)


def run_checks(base_url: str, model: str) -> dict[str, str | None]:
    """Run all checks against a server; return what went wrong in each, None for nothing."""
    folder = install()
    return _results(["node", "checks.mjs", base_url, model], folder)


def check_page(files: Path, headers: Mapping[str, str]) -> dict[str, str | None]:
    """Run the checks of the chat page against a server that answers as they say; return what went wrong in each."""
    browser = _browser()
    return _results(["node", "page_checks.mjs", browser, str(files), json.dumps(headers)], install())


def _results(command: list[str], folder: Path) -> dict[str, str | None]:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    return {result["name"]: result["error"] for result in results}


def _browser() -> str:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"there is no browser: none of {', '.join(BROWSERS)}; apt-get install chromium")
    return browser


def use_page(url: str) -> dict[str, Any]:
    """Use the chat page of a server in Chromium; return what was seen. Skips the test if there is no browser."""
    command = ["node", "page.mjs", _browser(), url]
    done = subprocess.run(command, cwd=install(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen
