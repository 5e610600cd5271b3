"""A second opinion about the manifests: checkov, with its findings that are meant written down."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from .chart import rendered_text
from .tools import find_checkov

# (check, object's name): why it is as it is.
MEANT = {
    ("CKV_K8S_9", "demo-engine"): "a worker's readiness is its scheduler's business: it would take the pod from nobody",
    ("CKV_K8S_8", "demo-test-stream"): "runs once",
    ("CKV_K8S_9", "demo-test-stream"): "runs once",
}


def test_checkov_finds_nothing_that_is_not_meant(tmp_path: Path) -> None:
    binary = find_checkov()
    if binary is None:
        pytest.skip("checkov is not installed: make chart-tools")
    for name in ("gpu", "multi-node-production"):
        (tmp_path / f"{name}.yaml").write_text(rendered_text(name))
    flags = ["--framework=kubernetes", "--skip-download", "--output=json", "--quiet", "--compact"]
    done = subprocess.run(
        [str(binary), f"--directory={tmp_path}", *flags], capture_output=True, text=True, check=False, timeout=120
    )
    results = json.loads(done.stdout)
    assert results["summary"]["resource_count"] > 10
    assert results["summary"]["parsing_errors"] == 0
    found = {
        (each["check_id"], each["resource"].rpartition(".")[2]): each["check_name"]
        for each in results["results"]["failed_checks"]
    }
    assert {key: what for key, what in found.items() if key not in MEANT} == {}
    assert MEANT.keys() == found.keys()
