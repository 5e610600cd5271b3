"""Writes a release's registry and digests into the chart before it is packaged: release.py --registry R --digests D.

D is a folder with a file for each image, named after the Dockerfile's target, that holds the digest it was pushed
under. Whoever installs the packaged chart so gets what was built and scanned with it, whatever happens to tags.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

CHART = Path(__file__).resolve().parent / "octavo"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_IMAGE = re.compile(r"^( *)repository: octavo-(\S+)$", re.MULTILINE)


class ReleaseError(Exception):
    """The chart cannot be made. One line."""


def digest_of(folder: Path, target: str) -> str:
    """Return the digest of an image. Raises ReleaseError."""
    try:
        digest = (folder / target).read_text().strip()
    except OSError as error:
        raise ReleaseError(f"no digest of {target}: {error.strerror}") from None
    if not _DIGEST.fullmatch(digest):
        raise ReleaseError(f"{folder / target} holds {digest!r}, which is no digest")
    return digest


def pinned(text: str, registry: str, digests: Path) -> str:
    """Return a values file with a digest beside each repository, and the registry where it has a line for that."""

    def pin(match: re.Match[str]) -> str:
        return f"{match[0]}\n{match[1]}digest: {digest_of(digests, match[2])}"

    text = re.sub(r"(?m)^( *repository: octavo-\S+)\n( *tag: .*)\n *digest: .*$", r"\1\n\2", text)
    return _IMAGE.sub(pin, text).replace('  registry: ""\n', f"  registry: {registry}\n")


def main() -> None:
    """Rewrite the values files in place. Raises ReleaseError."""
    parser = argparse.ArgumentParser(description="Writes a release's registry and digests into the chart.")
    parser.add_argument("--registry", required=True)
    parser.add_argument("--digests", required=True, type=Path)
    options = parser.parse_args()
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(CHART.glob("values*.yaml"))}
    for path, text in {path: pinned(text, options.registry, options.digests) for path, text in texts.items()}.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except ReleaseError as error:
        sys.exit(f"release: {error}")
