from google.protobuf import descriptor_pb2 as _descriptor_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor
RULES_FIELD_NUMBER: _ClassVar[int]
rules: _descriptor.FieldDescriptor
MEMBER_REQUIRED_FIELD_NUMBER: _ClassVar[int]
member_required: _descriptor.FieldDescriptor

class FieldRules(_message.Message):
    __slots__ = ("required", "min", "max", "exclusive_min", "max_bytes", "max_items", "min_bytes", "min_value", "max_value", "neutral", "needs_history", "internal")
    REQUIRED_FIELD_NUMBER: _ClassVar[int]
    MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    EXCLUSIVE_MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_ITEMS_FIELD_NUMBER: _ClassVar[int]
    MIN_BYTES_FIELD_NUMBER: _ClassVar[int]
    MIN_VALUE_FIELD_NUMBER: _ClassVar[int]
    MAX_VALUE_FIELD_NUMBER: _ClassVar[int]
    NEUTRAL_FIELD_NUMBER: _ClassVar[int]
    NEEDS_HISTORY_FIELD_NUMBER: _ClassVar[int]
    INTERNAL_FIELD_NUMBER: _ClassVar[int]
    required: bool
    min: float
    max: float
    exclusive_min: bool
    max_bytes: int
    max_items: int
    min_bytes: int
    min_value: float
    max_value: float
    neutral: float
    needs_history: bool
    internal: bool
    def __init__(self, required: _Optional[bool] = ..., min: _Optional[float] = ..., max: _Optional[float] = ..., exclusive_min: _Optional[bool] = ..., max_bytes: _Optional[int] = ..., max_items: _Optional[int] = ..., min_bytes: _Optional[int] = ..., min_value: _Optional[float] = ..., max_value: _Optional[float] = ..., neutral: _Optional[float] = ..., needs_history: _Optional[bool] = ..., internal: _Optional[bool] = ...) -> None: ...
