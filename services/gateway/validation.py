"""Checks requests against the rules beside their fields (octavo/common/v1/rules.proto).

The descriptors are compiled once into a list of checks for each message type. A check looks at the
fields that are set and at nothing else, and never at single tokens in Python.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from octavo.common.v1 import rules_pb2
from octavo.services.common.errors import MAX_VIOLATIONS, FieldViolation, invalid_fields

Report = Callable[[str, str], None]
"""Takes the path of a field and what to change about it."""
_Check = Callable[[Any, str, Report], None]
"""Takes a field's value, its path, and where to report."""

_FLOATS = (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE)
_NUMBERS = (
    *_FLOATS,
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
)
_TEXTS = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)


class _TooManyError(Exception):
    """Enough violations are known."""


def is_longer(message: Message, size: int) -> bool:
    """Return whether a message has more than `size` characters and items; no more of it is looked at than that."""
    left = size
    pending = [message]
    while pending:
        for field, value in pending.pop().ListFields():
            is_message = field.message_type is not None and not field.message_type.GetOptions().map_entry
            if field.is_repeated:
                left -= len(value)
                if left >= 0 and is_message:
                    pending.extend(value)
                elif left >= 0 and field.type in _TEXTS:
                    left -= sum(map(len, value))
            elif is_message:
                left -= 1
                pending.append(value)
            elif field.type in _TEXTS:
                left -= len(value)
            if left < 0:
                return True
    return False


class RequestValidator:
    """Validates messages of any type. Holds only compiled checks, so one serves all calls."""

    def __init__(self) -> None:
        self._checks: dict[Any, _MessageChecks] = {}  # by descriptor

    def violations(self, message: Message) -> list[FieldViolation]:
        """Return every broken rule of a message and of those in it, at most 16."""
        found: list[FieldViolation] = []

        def report(field: str, description: str) -> None:
            found.append(FieldViolation(field, description))
            if len(found) == MAX_VIOLATIONS:
                raise _TooManyError

        with contextlib.suppress(_TooManyError):
            self._compiled(message.DESCRIPTOR).run(message, "", report)
        return found

    def check(self, message: Message) -> None:
        """Raise INVALID_FIELD with all violations, if there is one."""
        found = self.violations(message)
        if found:
            raise invalid_fields(found)

    def _compiled(self, descriptor: Any) -> _MessageChecks:
        checks = self._checks.get(descriptor)
        if checks is None:
            checks = self._checks[descriptor] = _MessageChecks()  # before its fields: types may be recursive
            checks.compile(descriptor, self._compiled)
        return checks


class _MessageChecks:
    """The checks of one message type."""

    def __init__(self) -> None:
        self._required: list[tuple[str, bool, str]] = []  # name, has presence, what to change
        self._required_oneofs: list[tuple[str, str]] = []  # name, what to change
        self._fields: dict[int, _Check] = {}  # by field number

    def compile(self, descriptor: Descriptor, compiled: Callable[[Any], _MessageChecks]) -> None:
        for field in descriptor.fields:
            rules = _rules_of(field)
            if rules.internal:
                self._fields[field.number] = _refused
                continue
            if rules.required:
                advice = "must be set" if field.has_presence else "must not be empty"
                self._required.append((field.name, field.has_presence, advice))
            check = _field_check(field, rules, compiled)
            if check is not None:
                self._fields[field.number] = check
        for oneof in descriptor.oneofs:
            # The stubs give extensions no type: rules.proto is generated without them.
            if oneof.GetOptions().Extensions[rules_pb2.member_required]:  # type: ignore[index]
                names = ", ".join(field.name for field in oneof.fields)
                self._required_oneofs.append((oneof.name, f"one of these must be set: {names}"))

    def run(self, message: Message, path: str, report: Report) -> None:
        """Check a message whose fields' paths start with `path`."""
        for name, has_presence, advice in self._required:
            if not (message.HasField(name) if has_presence else getattr(message, name)):
                report(path + name, advice)
        for name, advice in self._required_oneofs:
            if message.WhichOneof(name) is None:
                report(path + name, advice)
        fields = self._fields
        for field, value in message.ListFields():
            check = fields.get(field.number)
            if check is not None:
                check(value, path + field.name, report)


def _rules_of(field: FieldDescriptor) -> rules_pb2.FieldRules:
    rules: rules_pb2.FieldRules = field.GetOptions().Extensions[rules_pb2.rules]  # type: ignore[index]
    return rules


def _field_check(
    field: FieldDescriptor, rules: rules_pb2.FieldRules, compiled: Callable[[Any], _MessageChecks]
) -> _Check | None:
    """Return the check of a field's value, or None if any value will do."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return _map_check(field, rules, compiled)
    item = _item_check(field, rules, compiled)
    if not field.is_repeated:
        return item
    numbers = field.cpp_type in _NUMBERS
    each = None if item is None else _each_number(item, field.cpp_type in _FLOATS) if numbers else _each(item)
    return _limited(each, rules)


def _refused(_value: Any, path: str, report: Report) -> None:
    report(path, "is set by servers; leave it out")


def _item_check(
    field: FieldDescriptor, rules: rules_pb2.FieldRules, compiled: Callable[[Any], _MessageChecks]
) -> _Check | None:
    """Return the check of one value of a field, be the field a list or not."""
    if field.message_type is not None:
        checks = compiled(field.message_type)
        return lambda value, path, report: checks.run(value, path + ".", report)
    if field.type in _TEXTS:
        return _length(rules) if rules.HasField("max_bytes") or rules.HasField("min_bytes") else None
    if field.cpp_type not in _NUMBERS:
        return None
    low = rules.min if rules.HasField("min") else None
    high = rules.max if rules.HasField("max") else None
    return _number(low, high, rules.exclusive_min, field.cpp_type in _FLOATS)


def _map_check(
    field: FieldDescriptor, rules: rules_pb2.FieldRules, compiled: Callable[[Any], _MessageChecks]
) -> _Check | None:
    assert field.message_type is not None, "a map's field has an entry type"
    value = field.message_type.fields_by_name["value"]
    item: _Check | None
    if value.cpp_type in _NUMBERS:
        low = rules.min_value if rules.HasField("min_value") else None
        high = rules.max_value if rules.HasField("max_value") else None
        item = _number(low, high, False, value.cpp_type in _FLOATS)
    else:
        item = _item_check(value, rules_pb2.FieldRules(), compiled)
    if item is None:
        return _limited(None, rules)
    check_value = item

    def check(entries: Any, path: str, report: Report) -> None:
        for key in entries:
            check_value(entries[key], f"{path}[{key}]", report)

    return _limited(check, rules)


def _limited(each: _Check | None, rules: rules_pb2.FieldRules) -> _Check | None:
    """Return the check of a list or a map: how many items there are, and if not too many, what they are."""
    if not rules.HasField("max_items"):
        return each
    limit = rules.max_items

    def check(items: Any, path: str, report: Report) -> None:
        if len(items) > limit:
            report(path, f"has {len(items)} items; send at most {limit}")
        elif each is not None:
            each(items, path, report)

    return check


def _each(item: _Check) -> _Check:
    def check(items: Iterable[Any], path: str, report: Report) -> None:
        for index, value in enumerate(items):
            item(value, f"{path}[{index}]", report)

    return check


def _each_number(item: _Check, floating: bool) -> _Check:
    """Check a list of numbers by its extremes first, which C code finds."""

    def check(items: Any, path: str, report: Report) -> None:
        broken: list[str] = []
        if not floating or all(map(math.isfinite, items)):
            for extreme in (min(items), max(items)):  # a field that is listed is not empty
                item(extreme, path, lambda _path, description: broken.append(description))
            if not broken:
                return
        for index, value in enumerate(items):
            item(value, f"{path}[{index}]", report)

    return check


def _length(rules: rules_pb2.FieldRules) -> _Check:
    low = rules.min_bytes
    high = rules.max_bytes if rules.HasField("max_bytes") else math.inf

    def check(value: str | bytes, path: str, report: Report) -> None:
        size = len(value)
        if low <= size and size * 4 <= high:  # a character takes at most four bytes
            return
        if isinstance(value, str):
            size = len(value.encode())
        if size > high:
            report(path, f"is {size} bytes long; send at most {int(high)}")
        elif size < low:
            report(path, f"is {size} bytes long; send at least {low}")

    return check


def _number(low: float | None, high: float | None, exclusive_min: bool, floating: bool) -> _Check | None:
    if low is None and high is None and not floating:
        return None
    wanted = _range_text(low, high, exclusive_min)
    least = -math.inf if low is None else low
    most = math.inf if high is None else high

    def check(value: float, path: str, report: Report) -> None:
        if floating and not math.isfinite(value):
            report(path, f"must be a finite number{wanted}; it is {value}")
        elif not least <= value <= most or (exclusive_min and value == least):
            is_near = least <= float(f"{value:g}") <= most  # a limit, if it were rounded
            report(path, f"must be a number{wanted}; it is {value:{'.9g' if is_near else 'g'}}")

    return check


def _range_text(low: float | None, high: float | None, exclusive_min: bool) -> str:
    parts = []
    if low is not None:
        parts.append(f"{'above' if exclusive_min else 'from'} {low:.10g}")
    if high is not None:
        parts.append(f"up to {high:.10g}")
    return (" " + " ".join(parts)) if parts else ""
