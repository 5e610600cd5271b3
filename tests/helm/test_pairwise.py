"""A sample of the many sets of values that `make chart-values` renders and checks."""

from __future__ import annotations

import pytest
import yaml

from . import pairwise
from .chart import template

SAMPLE = 24


def test_a_set_is_refused_with_what_to_change_or_rendered_into_what_works() -> None:
    told = dict(pairwise.results(0, SAMPLE))
    assert len(told) == SAMPLE
    assert sum(not line for line in told.values()) >= SAMPLE // 4, "too few are rendered to say anything"
    assert all(" " in line for line in told.values() if line)


def test_the_sets_cover_every_pair_of_settings() -> None:
    sets = pairwise.sets()
    assert len(sets) == pairwise.SIZE
    covered = set().union(*map(pairwise.pairs, sets))
    names = list(pairwise.SWITCHES)
    wanted = sum(
        len(pairwise.SWITCHES[a]) * len(pairwise.SWITCHES[b]) for at, a in enumerate(names) for b in names[at + 1 :]
    )
    assert len(covered) == wanted


@pytest.mark.parametrize(
    ("policy", "lost"),
    [
        ({"ingress": [], "egress": [{"ports": [{"port": 53}]}]}, "clients are shut out"),
        ({"ingress": [{"ports": [{"port": 50051}, {"port": 8000}]}], "egress": []}, "finds no names"),
    ],
)
def test_the_check_finds_who_is_shut_out(policy: object, lost: str) -> None:
    done = template([], [], "1.37")
    objects = [each for each in yaml.safe_load_all(done.stdout) if each]
    for each in objects:
        if each["kind"] == "NetworkPolicy" and each["metadata"]["name"] == "demo-gateway":
            each["spec"].update(policy)
    with pytest.raises(AssertionError, match=lost):
        pairwise.check_policies(objects)
