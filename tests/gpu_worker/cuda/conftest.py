"""Tests under `interpreted/` run in a process of their own: see `test_interpreted.py`."""

from __future__ import annotations

import os

# Triton reads the variable when it is imported, and must not run interpreted in any other test.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
