"""Looks through the wire format of a request before it is parsed.

Two bytes on the wire can become a hundred in memory: an empty message in a list. So lists are counted against their
rules (octavo/common/v1/rules.proto) while they are still bytes, and so is everything else that becomes an object.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from octavo.common.v1 import rules_pb2
from octavo.services.common.errors import Reason, ServingError, invalid_field

MAX_FIELDS = 65_536
"""Most fields of a request with all messages in it; a list of numbers in packed form is one."""

SMALL_BYTES = 256
"""Messages up to this length are parsed as they are."""

_FIELD_BYTES = 128  # about what a field takes in memory: a message, or a string with its place in a list
_ITEM_BYTES = 8
_MAX_DEPTH = 100  # as protobuf's parser has it
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_HIGH = bytes(range(128, 256))  # bytes of a varint before its last one
_FIXED_SIZES = {
    FieldDescriptor.TYPE_DOUBLE: 8,
    FieldDescriptor.TYPE_FIXED64: 8,
    FieldDescriptor.TYPE_SFIXED64: 8,
    FieldDescriptor.TYPE_FLOAT: 4,
    FieldDescriptor.TYPE_FIXED32: 4,
    FieldDescriptor.TYPE_SFIXED32: 4,
}
_NOT_NUMBERS = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_MESSAGE)


class _MalformedError(Exception):
    """These bytes are no protobuf message."""


class _TooManyItemsError(Exception):
    def __init__(self, name: str, limit: int) -> None:
        self.path = [name]
        self.limit = limit


class _Field(NamedTuple):
    """What the scan knows of a field in one of its forms on the wire.

    table      the fields of its message type, or None
    max_items  most items of the list, or None
    item_size  bytes of each number of a packed list, 0 for varints, -1 if it is no packed list
    """

    name: str
    table: _Table | None
    max_items: int | None
    item_size: int


_Table = dict[int, _Field]
"""By tag: the field's number and its form on the wire."""


@dataclass(slots=True)
class Scan:
    """How much there is in a message."""

    num_bytes: int
    num_fields: int = 0
    num_items: int = 0

    @property
    def memory_bytes(self) -> int:
        """About how much memory the message takes: its bytes, and what is made of them."""
        return 2 * self.num_bytes + _FIELD_BYTES * self.num_fields + _ITEM_BYTES * self.num_items


class WireScanner:
    """Scans messages of one type."""

    def __init__(self, descriptor: Descriptor) -> None:
        self._table = _compile(descriptor, {})

    def scan(self, data: bytes) -> Scan:
        """Return how much is in a message. Raises INVALID_FIELD if it is too much, MALFORMED_REQUEST."""
        if len(data) <= SMALL_BYTES:
            return Scan(len(data), num_fields=len(data) // 16)
        found = Scan(len(data))
        try:
            _scan(found, data, 0, len(data), self._table, 0)
        except _TooManyItemsError as error:
            path = ".".join(reversed(error.path))
            raise invalid_field(path, f"has more than {error.limit} items; send at most {error.limit}") from None
        except (_MalformedError, IndexError):
            raise malformed() from None
        return found


def malformed() -> ServingError:
    """Return the error of a request that cannot be parsed."""
    return ServingError(
        Reason.MALFORMED_REQUEST,
        "the request is not a valid protobuf message of its type (strings must be UTF-8); "
        "build it with code generated from this server's protos",
    )


def _compile(descriptor: Descriptor, known: dict[str, _Table]) -> _Table:
    table = known.get(descriptor.full_name)
    if table is not None:
        return table
    table = known[descriptor.full_name] = {}  # before its fields: types may be recursive
    for field in descriptor.fields:
        rules: rules_pb2.FieldRules = field.GetOptions().Extensions[rules_pb2.rules]  # type: ignore[index]
        limit = rules.max_items if field.is_repeated and rules.HasField("max_items") else None
        inner = None if field.message_type is None else _compile(field.message_type, known)
        if inner is None and limit is None and not field.is_repeated:
            continue
        item_size = -1
        if field.is_repeated and field.type not in _NOT_NUMBERS:
            item_size = _FIXED_SIZES.get(field.type, 0)
            single = {8: _FIXED64, 4: _FIXED32, 0: _VARINT}[item_size]  # lists may come unpacked as well
            table[field.number << 3 | single] = _Field(field.name, None, limit, -1)
        table[field.number << 3 | _BYTES] = _Field(field.name, inner, limit, item_size)
    return table


def _scan(found: Scan, data: bytes, at: int, end: int, table: _Table, depth: int) -> None:
    """Add what is between two positions, a message with the fields of `table`."""
    if depth > _MAX_DEPTH:
        raise _MalformedError
    counts: dict[str, int] = {}
    while at < end:
        found.num_fields += 1
        if found.num_fields > MAX_FIELDS:
            raise ServingError(
                Reason.INVALID_FIELD, f"the request has more than {MAX_FIELDS} fields and list items; send less at once"
            )
        tag = data[at]
        at += 1
        if tag > 127:
            tag, at = _varint(data, at - 1)
        field = table.get(tag)
        form = tag & 7
        num_items = 1
        if form == _BYTES:
            size = data[at]
            at += 1
            if size > 127:
                size, at = _varint(data, at - 1)
            start, at = at, at + size
            if at > end:
                raise _MalformedError
            if field is not None:
                if field.table is not None:
                    try:
                        _scan(found, data, start, at, field.table, depth + 1)
                    except _TooManyItemsError as error:
                        error.path.append(field.name)
                        raise
                elif field.item_size == 0:
                    num_items = len(data[start:at].translate(None, _HIGH))
                    found.num_items += num_items
                elif field.item_size > 0:
                    num_items = size // field.item_size
                    found.num_items += num_items
        elif form == _VARINT:
            if data[at] < 128:
                at += 1
            else:
                _, at = _varint(data, at)
        elif form == _FIXED64:
            at += 8
        elif form == _FIXED32:
            at += 4
        else:
            raise _MalformedError  # groups: proto3 has none
        if field is not None and field.max_items is not None:
            counts[field.name] = count = counts.get(field.name, 0) + num_items
            if count > field.max_items:
                raise _TooManyItemsError(field.name, field.max_items)
    if at != end:
        raise _MalformedError


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise _MalformedError
