from octavo.common.v1 import rules_pb2 as _rules_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DrainRequest(_message.Message):
    __slots__ = ("grace_ms",)
    GRACE_MS_FIELD_NUMBER: _ClassVar[int]
    grace_ms: int
    def __init__(self, grace_ms: _Optional[int] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("requests_left",)
    REQUESTS_LEFT_FIELD_NUMBER: _ClassVar[int]
    requests_left: int
    def __init__(self, requests_left: _Optional[int] = ...) -> None: ...

class ListRequestsRequest(_message.Message):
    __slots__ = ("max_requests",)
    MAX_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    max_requests: int
    def __init__(self, max_requests: _Optional[int] = ...) -> None: ...

class ListRequestsResponse(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[RequestInfo]
    def __init__(self, requests: _Optional[_Iterable[_Union[RequestInfo, _Mapping]]] = ...) -> None: ...

class RequestInfo(_message.Message):
    __slots__ = ("request_id", "tenant", "state", "prompt_tokens", "output_tokens", "age_ms", "kv_blocks", "preemptions", "gateway_id")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[RequestInfo.State]
        STATE_WAITING: _ClassVar[RequestInfo.State]
        STATE_RUNNING: _ClassVar[RequestInfo.State]
    STATE_UNSPECIFIED: RequestInfo.State
    STATE_WAITING: RequestInfo.State
    STATE_RUNNING: RequestInfo.State
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    tenant: str
    state: RequestInfo.State
    prompt_tokens: int
    output_tokens: int
    age_ms: int
    kv_blocks: int
    preemptions: int
    gateway_id: str
    def __init__(self, request_id: _Optional[str] = ..., tenant: _Optional[str] = ..., state: _Optional[_Union[RequestInfo.State, str]] = ..., prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., age_ms: _Optional[int] = ..., kv_blocks: _Optional[int] = ..., preemptions: _Optional[int] = ..., gateway_id: _Optional[str] = ...) -> None: ...

class FlushPrefixCacheRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FlushPrefixCacheResponse(_message.Message):
    __slots__ = ("blocks_forgotten",)
    BLOCKS_FORGOTTEN_FIELD_NUMBER: _ClassVar[int]
    blocks_forgotten: int
    def __init__(self, blocks_forgotten: _Optional[int] = ...) -> None: ...
