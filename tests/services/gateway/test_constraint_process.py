"""The process that tries constraints out, by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from octavo.services.gateway.offload.limited_server import ANSWER, REQUEST


def test_a_trial_has_little_priority() -> None:
    tokens = [chr(byte) for byte in range(256)]
    vocabulary = json.dumps({"tokens": tokens, "special": []}).encode()
    request = json.dumps({"kind": "regex", "value": "a", "continued": ""}).encode()
    # In place of a trial's own work: an answer that says how it runs.
    code = """
import os
from pathlib import Path
from octavo.services.gateway.constraints import process as constraint_process
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
        for frame in (
            len(vocabulary).to_bytes(4, "big") + vocabulary,
            REQUEST.pack(len(request), 1) + request,
        ):
            process.stdin.write(frame)
            process.stdin.flush()
            size, number, outcome = ANSWER.unpack(process.stdout.read(ANSWER.size))
            answers.append((number, outcome, process.stdout.read(size)))
        process.stdin.close()

    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert answers[0] == (0, 0, b"")
    number, outcome, answer = answers[1]
    assert (number, outcome, json.loads(answer)) == (1, 0, {"grammar": f"{min(own + 5, 19)} 5 True"})
