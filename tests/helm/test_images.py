"""The Dockerfile: linted, and it makes the images that the chart names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

from .chart import CHART

ROOT = CHART.parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def stages() -> dict[str, str]:
    """Each stage's instructions, by name."""
    parts = re.split(r"^FROM \S+ AS (\S+)\n", DOCKERFILE, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_hadolint_finds_nothing() -> None:
    tool = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [str(tool), "--config", str(ROOT / ".hadolint.yaml"), "-"],
        input=DOCKERFILE, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_images_of_the_values_are_targets_that_do_not_run_as_root() -> None:
    named = set()
    for file in CHART.glob("values*.yaml"):
        images = yaml.safe_load(file.read_text()).get("images", {})
        named |= {each["repository"] for each in images.values() if isinstance(each, dict) and "repository" in each}
    assert named == {f"octavo-{name}" for name in ("gateway", "scheduler", "worker-cpu", "worker-cuda")}
    user = yaml.safe_load((CHART / "values.yaml").read_text())["securityContext"]
    for name in named:
        text = stages()[name.removeprefix("octavo-")]
        assert f"USER {user['runAsUser']}:{user['runAsGroup']}\n" in text


def test_only_workers_have_torch() -> None:
    with_torch = {name for name, text in stages().items() if re.search(r"ARG TORCH|\[worker", text)}
    assert with_torch == {"worker-cpu", "worker-cuda"}
    assert re.search(r"^FROM worker-cpu AS demo$", DOCKERFILE, flags=re.M)


def test_what_the_build_copies_is_not_ignored() -> None:
    kept = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), flags=re.M))
    copied = {word for line in re.findall(r"^COPY (?!--)(.*) \S+$", DOCKERFILE, flags=re.M) for word in line.split()}
    assert copied == kept
    assert all((ROOT / name).exists() for name in kept)
