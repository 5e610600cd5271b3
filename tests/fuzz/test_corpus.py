"""What fuzzing has found stays harmless: the whole corpus, and each input of it broken in a few ways."""

from __future__ import annotations

import random

import pytest

from .seeds import CORPUS, seeds
from .targets import TARGETS

NUM_BROKEN = 3  # ways for each input


def broken(data: bytes, rng: random.Random) -> bytes:
    """Return an input with some of its bytes changed, removed or repeated."""
    changed = bytearray(data or b"\0")
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(changed))
        end = min(len(changed), at + rng.randrange(1, 9))
        changed[at:end] = rng.choice([b"", rng.randbytes(end - at), changed[at:end] * 2])
        changed = changed or bytearray(b"\0")
    return bytes(changed)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_breaks_nothing(target: str) -> None:
    inputs = [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]
    assert set(seeds(target)) <= set(inputs), "run python -m tests.fuzz.seeds"
    rng = random.Random(0)
    for data in inputs:
        TARGETS[target](data)
        for _ in range(NUM_BROKEN):
            TARGETS[target](broken(data, rng))
