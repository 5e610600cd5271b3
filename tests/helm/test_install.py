"""What a release is made of, and the examples for one machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from octavo.services.cli.serve_config import ServeConfig
from octavo.services.common import config as config_loader

from . import tools
from .chart import CHART, containers, helm, pod_specs
from .test_images import ROOT, stages

DEPLOY = ROOT / "deploy"
WORKFLOW = ROOT / ".github" / "workflows" / "release.yaml"
TARGETS = ["gateway", "scheduler", "worker-cpu", "worker-cuda"]


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A copy of the chart, with the script that releases it, and a digest for each image."""
    shutil.copytree(CHART, tmp_path / "helm" / "octavo")
    shutil.copy(CHART.parent / "release.py", tmp_path / "helm")
    (tmp_path / "digests").mkdir()
    for number, target in enumerate(TARGETS):
        (tmp_path / "digests" / target).write_text("sha256:" + f"{number:064d}\n")
    return tmp_path


def run_release(folder: Path) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(folder / "helm" / "release.py"), "--registry=ghcr.io/mine"]
    command = [*script, f"--digests={folder / 'digests'}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("files", [[], ["values-cpu.yaml"], ["values-gpu.yaml"], ["values-production.yaml"]])
def test_a_released_chart_installs_the_images_that_were_built_with_it(release: Path, files: list[str]) -> None:
    assert run_release(release).returncode == 0, "twice is as good as once"
    assert run_release(release).returncode == 0
    chart = release / "helm" / "octavo"
    named = [f"--values={chart / file}" for file in files]
    model = ["--set=model.name=m,model.claim.name=c"] if "values-gpu.yaml" in files else []
    done = helm("template", "demo", str(chart), "--kube-version=1.37.0", *named, *model)
    assert done.returncode == 0, done.stderr
    images = {
        container["image"]
        for _, pod in pod_specs([each for each in yaml.safe_load_all(done.stdout) if each])
        for container in containers(pod)
    }
    worker = "worker-cuda" if "values-gpu.yaml" in files else "worker-cpu"
    assert images == {
        f"ghcr.io/mine/octavo-{name}@sha256:{TARGETS.index(name):064d}" for name in ("gateway", "scheduler", worker)
    }


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_text("latest")])
def test_a_release_without_a_digest_is_none(release: Path, spoil: Any) -> None:
    before = (release / "helm" / "octavo" / "values.yaml").read_text()
    spoil(release / "digests" / "worker-cuda")
    done = run_release(release)
    assert done.returncode == 1
    assert "worker-cuda" in done.stderr
    assert (release / "helm" / "octavo" / "values.yaml").read_text() == before


def test_the_workflow_builds_every_image_and_passes_each_digest_on() -> None:
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    built = {each["target"]: each["platforms"] for each in jobs["image"]["strategy"]["matrix"]["include"]}
    assert built.keys() == {*TARGETS, "demo"} <= stages().keys()
    assert all("linux/arm64" in platforms for target, platforms in built.items() if target != "worker-cuda")
    text = WORKFLOW.read_text()
    for step in ("cosign sign", "trivy-action", "sbom: true", "provenance", "cache-to", "helm/release.py", "helm push"):
        assert step in text
    uses = re.findall(r"uses: (\S+)", text)
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v?[\d.]+", each) for each in uses)


def test_actionlint_finds_nothing() -> None:
    tool, problem = tools.find_actionlint()
    if tool is None:
        pytest.skip(problem)
    done = subprocess.run([str(tool), str(WORKFLOW)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_images_have_a_compiled_standard_library_and_a_torch_that_fits() -> None:
    base, worker = stages()["base"], stages()["worker-cpu"]
    assert "compileall -q /usr/local/lib/python3.12" in base
    assert 'pip install --index-url "${TORCH_INDEX}" "${TORCH}"' in worker
    assert "ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu\n" in worker
    for name, text in stages().items():
        for instruction in re.split(r"\n(?=[A-Z]+ )", text):
            if "pip install" in instruction or "pip wheel" in instruction:
                assert "--mount=type=cache,target=/root/.cache/pip" in instruction, name


def serve_options(words: list[str]) -> ServeConfig:
    return config_loader.parse(ServeConfig, words, prog="octavo serve", environ={})


def test_the_compose_file_starts_what_the_image_has() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    service = compose["services"]["octavo"]
    assert service["build"]["target"] in stages()
    kind, *words = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in service["command"]]
    assert kind == "serve"
    config = serve_options(words)
    assert f"octavo model fetch {Path(config.model).parent} --source=demo" in stages()["demo"]
    grace_s = int(service["stop_grace_period"][:-1])
    assert grace_s >= config.grace_s + 10
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert {volume.split(":")[0] for volume in service["volumes"]} == compose["volumes"].keys()


def test_the_unit_starts_octavo_and_gives_it_time_to_stop() -> None:
    text = (DEPLOY / "octavo.service").read_text()
    (line,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    program, kind, *words = line.replace("${OCTAVO_MODEL}", "demo").split()
    assert (program, kind) == ("/opt/octavo/bin/octavo", "serve")
    config = serve_options([word for word in words if word != "--config" and not word.startswith("/etc/")])
    (stop_s,) = re.findall(r"^TimeoutStopSec=(\d+)s$", text, re.MULTILINE)
    assert int(stop_s) >= config.grace_s + 10


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "octavo.service"
    unit.write_text((DEPLOY / "octavo.service").read_text().replace("/opt/octavo/bin/octavo", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False, timeout=60
    )
    mine = [line for line in done.stderr.splitlines() if "octavo.service" in line]
    assert not mine, done.stderr


def test_the_mirror_copies_every_image_of_the_chart_and_the_chart(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for name in ("crane", "helm", "octavo"):
        stand_in = tmp_path / "bin" / name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text(f'#!/bin/sh\necho "{name} $*" >> {log}\n')
        stand_in.chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}

    def mirror(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["sh", str(DEPLOY / "mirror.sh"), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]
    images = [f"octavo-{target}:{version}" for target in TARGETS]
    listed = mirror("list", "ghcr.io/o").stdout.split()
    assert listed == [*(f"ghcr.io/o/{image}" for image in images), f"ghcr.io/o/charts/octavo:{version}"]
    assert mirror("images", "ghcr.io/o", "registry.test/x").returncode == 0
    lines = log.read_text().splitlines()
    assert lines[:4] == [f"crane copy ghcr.io/o/{image} registry.test/x/{image}" for image in images]
    assert lines[4].startswith(f"helm pull oci://ghcr.io/o/charts/octavo --version {version} --destination ")
    assert lines[5].endswith(f"/octavo-{version}.tgz oci://registry.test/x/charts")
    assert mirror("model", "org/name", "/claim/name").returncode == 0
    assert log.read_text().splitlines()[6] == "octavo model fetch /claim/name --source=org/name"
    assert mirror().returncode == 2
    assert "deploy/mirror.sh images" in mirror().stdout
    assert mirror("images", "ghcr.io/o").returncode != 0, "no registry to copy to"
