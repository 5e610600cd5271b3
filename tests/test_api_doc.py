"""docs/api.md is what docs/generate.py writes, and has every call that a client can make."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from octavo.admin.v1 import admin_pb2
from octavo.inference.v1 import embedding_pb2, generation_pb2, load_pb2, model_pb2, tokenizer_pb2

DOCS = Path(__file__).resolve().parent.parent / "docs"
FILES = (admin_pb2, embedding_pb2, generation_pb2, load_pb2, model_pb2, tokenizer_pb2)


def test_the_reference_is_current() -> None:
    run = subprocess.run([sys.executable, DOCS / "generate.py", "--check"], capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stderr


def test_the_reference_has_every_call_with_words_about_it() -> None:
    lines = (DOCS / "api.md").read_text().splitlines()
    calls = [
        method.name
        for file in FILES
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]

    assert len(calls) > 10
    for call in calls:
        assert any(line.startswith(f"| `{call}` (") and len(line.split("|")[2].strip()) > 10 for line in lines), call
