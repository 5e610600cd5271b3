"""The process that tries constraints out, by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys


def test_a_trial_has_little_priority() -> None:
    tokens = [chr(byte) for byte in range(256)]
    frames = [{"tokens": tokens, "special": []}, {"id": 1, "kind": "regex", "value": "a", "continued": ""}]
    # In place of a trial's own work: an answer that says how it runs.
    code = """
import os
from pathlib import Path
from octavo.services.gateway import constraint_process
try_out = constraint_process.try_out
parent = os.getpid()
def niceness(*arguments):
    if os.getpid() == parent:
        return try_out(*arguments)
    session = Path("/proc/self/autogroup")
    weight = session.read_text().split()[-1] if os.access(session, os.W_OK) else "5"
    return f"{os.getpriority(os.PRIO_PROCESS, 0)} {weight} {os.getsid(0) == parent}"
constraint_process.try_out = niceness
constraint_process.main()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    answers = []
    with process:
        for frame in frames:
            text = json.dumps(frame).encode()
            process.stdin.write(len(text).to_bytes(4, "big") + text)
            process.stdin.flush()
            answers.append(json.loads(process.stdout.read(int.from_bytes(process.stdout.read(4), "big"))))
        process.stdin.close()

    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert answers == [{"ready": True}, {"id": 1, "grammar": f"{min(own + 5, 19)} 5 True"}]
