"""Finds processes of the cluster by their titles."""

from __future__ import annotations

import contextlib

import psutil


def titled(title: str, below: psutil.Process) -> list[psutil.Process]:
    """Return the descendants whose command lines begin with `title`."""
    found = []
    for process in below.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
    return found


def kill_tree(root: psutil.Process) -> None:
    """Kill a process and all below it, which have no time for a word."""
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
