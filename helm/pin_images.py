"""Names the Dockerfile's base image by its digest: python helm/pin_images.py, or `make images-pin`.

Asks the registry, through `docker buildx imagetools`, what the tag means now, and writes the digest of the index (all
platforms) behind it: python:3.12-slim-bookworm@sha256:... The tag stays, for people and for tools that propose updates.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

DOCKERFILE = Path(__file__).resolve().parent.parent / "Dockerfile"
_BASE = re.compile(r"^(ARG PYTHON_IMAGE=)([^@\s]+)(@\S+)?$", re.MULTILINE)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class PinError(Exception):
    """The digest cannot be known. One line."""


def digest_of(image: str) -> str:
    """Return the digest that an image's tag stands for now. Raises PinError."""
    command = ["docker", "buildx", "imagetools", "inspect", image, "--format", "{{.Manifest.Digest}}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise PinError(f"docker cannot be run: {error.strerror}") from None
    found = done.stdout.strip()
    if done.returncode or not _DIGEST.fullmatch(found):
        raise PinError(f"docker does not know the digest of {image}: {(done.stderr or found).strip()}")
    return found


def pin(dockerfile: Path) -> str:
    """Write the digest of the base image into a Dockerfile; return the image with it. Raises PinError."""
    text = dockerfile.read_text(encoding="utf-8")
    found = _BASE.findall(text)
    if len(found) != 1:
        raise PinError(f"{dockerfile} has {len(found)} lines ARG PYTHON_IMAGE=..., not one")
    image: str = found[0][1]
    pinned = f"{image}@{digest_of(image)}"
    dockerfile.write_text(_BASE.sub(rf"\g<1>{pinned}", text), encoding="utf-8")
    return pinned


if __name__ == "__main__":
    try:
        print(pin(DOCKERFILE))
    except PinError as error:
        sys.exit(f"images-pin: {error}")
