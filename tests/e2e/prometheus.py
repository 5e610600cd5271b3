"""A real Prometheus, for as long as a test takes."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.ports import free_port


class Prometheus:
    """Scrapes targets twice a second, and evaluates rules as often."""

    def __init__(self, folder: Path, targets: Sequence[str], rules: dict[str, Any], **labels: str) -> None:
        """`labels`: what it adds to each series, as an operator's monitors do."""
        self.url = f"http://127.0.0.1:{free_port()}"
        (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
        config = {
            "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
            "rule_files": [str(folder / "rules.yaml")],
            "scrape_configs": [
                {"job_name": "octavo", "static_configs": [{"targets": list(targets), "labels": labels}]}
            ],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        command = ["prometheus", f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
        command += [f"--web.listen-address={self.url.removeprefix('http://')}", "--log.level=error"]
        self.process = subprocess.Popen(command)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def query(self, query: str) -> list[dict[str, Any]]:
        """Return the samples of a query that are numbers; none while Prometheus starts."""
        try:
            response = httpx.get(f"{self.url}/api/v1/query", params={"query": query}, timeout=10)
        except httpx.TransportError:
            return []
        if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:  # it listens before it is ready
            return []
        answer = response.json()
        assert answer["status"] == "success", (query, answer)
        return [sample for sample in answer["data"]["result"] if not math.isnan(float(sample["value"][1]))]

    def wait_for(self, what: str, ready: Callable[[], bool], timeout_s: float) -> None:
        """Return once something is so; fail after the timeout."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            assert time.monotonic() < deadline, what
            assert self.process.poll() is None, "prometheus ended"
            time.sleep(0.1)
