"""Each sampling parameter is described once: every hop follows SamplingParams and `Draw`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.common.sampling import SAMPLING_FIELDS
from octavo.common.v1 import common_pb2, rules_pb2
from octavo.gpu_worker.sampling.settings import SamplingSettings, read_sampling_update
from octavo.kernels.draw import COLUMNS, STRUCT, Draw
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.client.request import GenerationOptions
from octavo.services.gateway.http.fields import SAMPLING
from octavo.services.gateway.validation import RequestValidator
from octavo.services.scheduler.core.plan_builder import SAMPLING_UPDATE_FORMS, sampling_values
from octavo.worker.v1 import worker_pb2

ROOT = Path(__file__).resolve().parent.parent
ALL = {
    field.name
    for field in common_pb2.SamplingParams.DESCRIPTOR.fields
    if not field.GetOptions().Extensions[rules_pb2.rules].internal  # type: ignore[index]
}
DRAWN = [name for name in Draw.__match_args__ if name in SAMPLING_FIELDS]
_C_TYPES = {"float": "f4", "double": "f8", "int32_t": "i4", "uint32_t": "u4", "uint64_t": "u8"}


def some_value(name: str) -> Any:
    """A value that is allowed, and not the neutral one."""
    return 0.5 if SAMPLING_FIELDS[name].is_float else 3


def test_clients_and_http_have_every_parameter_by_its_name() -> None:
    assert set(GenerationOptions.__annotations__) >= ALL
    assert set(SAMPLING) >= ALL


@pytest.mark.parametrize("name", SAMPLING_FIELDS)
def test_a_neutral_value_obeys_the_rules_of_its_field(name: str) -> None:
    RequestValidator().check(common_pb2.SamplingParams(**{name: SAMPLING_FIELDS[name].unset}))


@pytest.mark.parametrize("name", SAMPLING_FIELDS)
def test_a_parameter_reaches_the_settings_of_the_slot(name: str) -> None:
    sampling = common_pb2.SamplingParams(**{name: some_value(name)})
    update = worker_pb2.SamplingUpdate(**sampling_values(scheduler_pb2.Submit(sampling=sampling).sampling))
    settings = read_sampling_update(update, vocab_size=10)
    for each, field in SAMPLING_FIELDS.items():
        place = settings.draw if each in DRAWN else settings
        assert getattr(place, each) == (some_value(each) if each == name else field.unset), each


def test_a_slot_whose_update_says_nothing_is_neutral() -> None:
    settings = read_sampling_update(worker_pb2.SamplingUpdate(), vocab_size=10)
    assert not settings.has_penalties
    assert not settings.draw.has_edges
    assert settings.draw == Draw(**{name: SAMPLING_FIELDS[name].unset for name in DRAWN}, candidate_index=0, position=0)


def test_what_is_read_of_an_update_is_all_that_a_slot_has() -> None:
    assert set(SAMPLING_FIELDS) == {*DRAWN, *(name for name in SamplingSettings.__match_args__ if name in ALL)} - {
        name for name in ALL if name not in SAMPLING_FIELDS
    }
    assert ALL - set(SAMPLING_FIELDS) >= SAMPLING_UPDATE_FORMS


def test_the_struct_of_the_cpu_kernels_is_the_draw() -> None:
    header = (ROOT / "kernels/cpu/abi.h").read_text()
    body = re.search(r"struct OctavoDraw \{(.*?)\};", header, re.DOTALL)
    assert body is not None
    members = re.findall(r"^ *(\w+) (\w+);", body[1], re.MULTILINE)
    assert [(name, _C_TYPES[kind]) for kind, name in members] == STRUCT
    packed, aligned = np.dtype(STRUCT), np.dtype(STRUCT, align=True)
    assert packed == aligned, "C puts no gap between members"


def test_the_kernel_that_finds_edges_takes_every_rule() -> None:
    find_edge = pytest.importorskip("octavo.kernels.sampling_kernels").find_edge
    rules = set(COLUMNS) - {"candidate_index"}
    assert {f"{name}_ptr" for name in rules} <= set(find_edge.arg_names)
