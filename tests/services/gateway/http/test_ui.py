"""The page: its files for everybody, its gauges for those who may call."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from octavo.services.gateway.config import GatewayConfig

SCRIPTS = ("app.js", "api.js", "gauges.js", "markdown.js", "store.js")
FILES = {
    "/ui": "text/html",
    **{f"/ui/{name}": "text/javascript" for name in SCRIPTS},
    "/ui/style.css": "text/css",
    "/ui/icon.svg": "image/svg+xml",
}


@pytest.fixture
def config(config: GatewayConfig) -> GatewayConfig:
    return dataclasses.replace(config, ui=True)


async def test_the_files_load_nothing_from_elsewhere(http: httpx.AsyncClient) -> None:
    for path, kind in FILES.items():
        response = await http.get(path)

        assert response.status_code == 200
        assert response.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert not re.search(r"https?://", response.text.replace("http://www.w3.org/2000/svg", ""))
    page = (await http.get("/ui")).text
    linked = {f"/{path}" for path in re.findall(r'(?:src|href)="([^"]+)"', page)}
    scripts = [(await http.get(f"/ui/{name}")).text for name in SCRIPTS]
    imported = {f"/ui/{name}" for name in re.findall(r'from "\./([^"]+)"', "".join(scripts))}
    assert linked | imported == set(FILES) - {"/ui"}
    assert not any("innerHTML" in script for script in scripts)
    assert " onclick" not in page
    assert "<script>" not in page


async def test_a_browser_that_opens_the_server_gets_the_page(http: httpx.AsyncClient) -> None:
    browser = await http.get("/", headers={"accept": "text/html,*/*;q=0.8"})

    assert (browser.status_code, browser.headers["location"]) == (307, "/ui")
    assert (await http.get("/")).json()["name"] == "Octavo"


async def test_the_gauges_are_what_the_schedulers_say(harness: Any, http: httpx.AsyncClient, tools: Any) -> None:
    worker = {"worker_id": "w", "running": 2, "tokens_per_s": 7.5}
    harness.scheduler.say_load(running=2, waiting=3, kv_blocks_free=40, workers=[worker])
    await tools.until(lambda: harness.gateway.schedulers.peers[0].load.running == 2)
    status = (await http.get("/ui/status")).json()

    assert (status["ready"], status["models"]) == (True, ["tiny"])
    (scheduler,) = status["schedulers"]
    assert {name: scheduler[name] for name in ("running", "waiting", "kv_blocks_free", "kv_blocks_total")} == {
        "running": 2, "waiting": 3, "kv_blocks_free": 40, "kv_blocks_total": 100,
    }  # fmt: skip
    assert scheduler["tokens_per_s"] == 7.5


async def test_every_gauge_of_the_page_has_a_value(http: httpx.AsyncClient) -> None:
    page, script = (await http.get("/ui")).text, (await http.get("/ui/gauges.js")).text
    values = re.search(r"const values = \{(.*?)\};", script, re.DOTALL)
    assert values is not None

    assert set(re.findall(r'data-value="(\w+)"', page)) == set(re.findall(r"^\s+(\w+):", values[1], re.MULTILINE))


class TestWithKeys:
    @pytest.fixture
    def config(self, config: GatewayConfig, tmp_path: Path) -> GatewayConfig:
        keys = tmp_path / "keys"
        keys.write_text("[]\n")
        return dataclasses.replace(config, api_keys=keys)

    async def test_the_gauges_need_a_key_and_the_files_do_not(self, http: httpx.AsyncClient) -> None:
        assert (await http.get("/ui")).status_code == 200
        assert (await http.get("/ui/status")).status_code == 401


class TestSwitchedOff:
    @pytest.fixture
    def config(self, config: GatewayConfig) -> GatewayConfig:
        return dataclasses.replace(config, ui=False)

    async def test_there_is_no_page(self, http: httpx.AsyncClient) -> None:
        assert [(await http.get(path)).status_code for path in (*FILES, "/ui/status")] == [404] * (len(FILES) + 1)
