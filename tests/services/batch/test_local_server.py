"""A server of one's own: what its lines say."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from octavo.services.cli.serve import _how_to_check
from octavo.services.cli.serve_config import ServeConfig
from octavo.services.offline.local_server import LocalServer, LocalServerError


def saying(monkeypatch: pytest.MonkeyPatch, *lines: str) -> LocalServer:
    """A server whose process says these lines and waits until it is stopped, or ends if it is not ready."""
    server = LocalServer("model")
    script = f"import sys, time\nfor line in {lines!r}: print(line, flush=True)\n"
    script += "if any(line.startswith('ready') for line in sys.argv[1:]): time.sleep(1000)"
    monkeypatch.setattr(server, "_command", [sys.executable, "-c", script, *lines])
    return server


@pytest.mark.parametrize("name", ["m", "a,b", "a, b (c)", "x, grpc 9.9.9.9:9, http 9.9.9.9:8 (Ctrl-C stops)"])
def test_a_server_is_ready_whatever_its_model_is_called(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    ready = f"ready in 1.0 s: {name} on cpu, grpc 127.0.0.1:1, http 127.0.0.1:2, metrics a:3 a:4 (Ctrl-C stops)"

    with saying(monkeypatch, "worker-0 loads it", ready, "    a page") as server:
        assert (server.address, server.url) == ("127.0.0.1:1", "http://127.0.0.1:2")
        assert server.metrics == ["a:3", "a:4"]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (("octavo serve: there is no m",), "there is no m"),
        (("octavo serve: m is an adapter", f"octavo serve: {_how_to_check(ServeConfig('m'))}"), "m is an adapter"),
        (
            (
                "worker-0  | 2026-02-01 14:03:07.123 error: cannot load the model: no GPU",
                "scheduler | 2026-02-01 14:03:07.124 warning: lost worker",
                "octavo serve: worker-0 failed while starting (exit status 1): giving up",
                f"octavo serve: {_how_to_check(ServeConfig('m', device='cpu'))}",
            ),
            "cannot load the model: no GPU",
        ),
        ((), "it said nothing"),
    ],
)
def test_what_kept_a_server_from_starting_is_told_without_decoration(
    monkeypatch: pytest.MonkeyPatch, lines: Any, reason: str
) -> None:
    with pytest.raises(LocalServerError) as error, saying(monkeypatch, *lines):
        pass

    assert str(error.value) == f"the server did not start: {reason}"
