"""The base image's digest, and the bills of materials: what of them can be tried without an engine of containers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from . import tools
from .test_images import DOCKERFILE, ROOT

DIGEST = "sha256:" + "0123456789abcdef" * 4


def docker_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    stand_in = tmp_path / "bin" / "docker"
    stand_in.parent.mkdir()
    stand_in.write_text(f"#!/bin/sh\n{script}\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:/usr/bin:/bin")


@pytest.fixture
def pinning() -> Any:
    spec = importlib.util.spec_from_file_location("octavo_pin_images", ROOT / "helm" / "pin_images.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def dockerfile(tmp_path: Path) -> Path:
    path = tmp_path / "Dockerfile"
    path.write_text(DOCKERFILE)
    return path


def test_the_base_is_pinned_to_what_its_tag_means_and_pinned_anew(
    pinning: Any, dockerfile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "asked"
    docker_that(tmp_path, monkeypatch, f'echo "$@" > {asked}; cat {tmp_path}/digest')
    (tmp_path / "digest").write_text(DIGEST)
    image = pinning.pin(dockerfile).partition("@")[0]
    once = dockerfile.read_text()
    (tmp_path / "digest").write_text(other := DIGEST[:-1] + "0")
    pinning.pin(dockerfile)

    assert asked.read_text().split()[:4] == ["buildx", "imagetools", "inspect", image]
    assert f"\nARG PYTHON_IMAGE={image}@{DIGEST}\n" in once
    assert dockerfile.read_text() == once.replace(DIGEST, other)
    assert [line for line in once.splitlines() if line not in DOCKERFILE.splitlines()] == [
        f"ARG PYTHON_IMAGE={image}@{DIGEST}"
    ]


@pytest.mark.parametrize("script", ["echo no such host >&2; exit 1", "echo latest", "true"])
def test_without_an_answer_nothing_is_written(
    pinning: Any, dockerfile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    docker_that(tmp_path, monkeypatch, script)
    with pytest.raises(pinning.PinError, match="does not know the digest"):
        pinning.pin(dockerfile)
    assert dockerfile.read_text() == DOCKERFILE


def test_the_bill_of_materials_has_every_package_of_an_environment(tmp_path: Path) -> None:
    (release,) = set(re.findall(r"cyclonedx-bom==(\S+)", DOCKERFILE))
    tool, problem = tools.find_cyclonedx(release)
    if tool is None:
        pytest.skip(problem)
    (line,) = re.findall(r"^RUN (/opt/sbom/bin/cyclonedx-py .*gateway.cdx.json)$", DOCKERFILE, flags=re.M)
    out = tmp_path / "gateway.cdx.json"
    here = {"/opt/sbom/bin/cyclonedx-py": str(tool), "/opt/octavo/bin/python": sys.executable, f"/{out.name}": str(out)}

    subprocess.run([here.get(word, word) for word in shlex.split(line)], check=True, capture_output=True, timeout=120)

    bill = json.loads(out.read_text())
    assert bill["bomFormat"] == "CycloneDX"
    found = {_normal(each["name"]): each["version"] for each in bill["components"]}
    installed = {_normal(each.metadata["Name"]): each.version for each in importlib.metadata.distributions()}
    assert installed.items() <= found.items()
    assert {"octavo", "grpcio", "protobuf"} <= found.keys()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
