"""Sampling parameters as `SamplingParams` declares them: names, types, bounds and neutral values, for every hop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from octavo.common.v1 import common_pb2, rules_pb2


@dataclass(frozen=True, slots=True)
class SamplingField:
    """A parameter of SamplingParams that is one number.

    neutral        changes nothing; what the field means where it is 0 but must not be
    minimum        the smallest value, -inf if there is none
    needs_history  applying it takes the tokens so far
    """

    name: str
    is_float: bool
    neutral: float
    minimum: float
    needs_history: bool

    def value(self, params: Any) -> Any:
        """Return the value in a message that has a field of this name; an unset one is neutral, or 0."""
        return getattr(params, self.name) or self.unset

    @property
    def unset(self) -> float | int:
        """The neutral value, in the field's type."""
        return self.neutral if self.is_float else int(self.neutral)


def _rules(field: Any) -> rules_pb2.FieldRules:
    rules: rules_pb2.FieldRules = field.GetOptions().Extensions[rules_pb2.rules]
    return rules


def _fields() -> list[SamplingField]:
    found = []
    for field in common_pb2.SamplingParams.DESCRIPTOR.fields:
        if not field.is_repeated:
            rules = _rules(field)
            minimum = rules.min if rules.HasField("min") else float("-inf")
            is_float = field.cpp_type == FieldDescriptor.CPPTYPE_FLOAT
            found.append(SamplingField(field.name, is_float, rules.neutral, minimum, rules.needs_history))
    return found


SAMPLING_FIELDS: Mapping[str, SamplingField] = {field.name: field for field in _fields()}
"""By name, in the order of the declaration."""

HISTORY_LISTS = [
    field.name
    for field in common_pb2.SamplingParams.DESCRIPTOR.fields
    if field.is_repeated and _rules(field).needs_history
]
"""Parameters that are lists, and whose items take the tokens so far."""
