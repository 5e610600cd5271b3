from octavo.common.v1 import rules_pb2 as _rules_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LoadAdapterRequest(_message.Message):
    __slots__ = ("name", "path")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ...) -> None: ...

class LoadAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: AdapterInfo
    def __init__(self, adapter: _Optional[_Union[AdapterInfo, _Mapping]] = ...) -> None: ...

class UnloadAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnloadAdapterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[AdapterInfo]
    def __init__(self, adapters: _Optional[_Iterable[_Union[AdapterInfo, _Mapping]]] = ...) -> None: ...

class AdapterInfo(_message.Message):
    __slots__ = ("name", "path", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    sha256: str
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., sha256: _Optional[str] = ...) -> None: ...

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

class UndrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UndrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CancelRequestsRequest(_message.Message):
    __slots__ = ("request_ids", "tenant")
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    tenant: str
    def __init__(self, request_ids: _Optional[_Iterable[str]] = ..., tenant: _Optional[str] = ...) -> None: ...

class CancelRequestsResponse(_message.Message):
    __slots__ = ("requests_cancelled",)
    REQUESTS_CANCELLED_FIELD_NUMBER: _ClassVar[int]
    requests_cancelled: int
    def __init__(self, requests_cancelled: _Optional[int] = ...) -> None: ...

class TenantLimits(_message.Message):
    __slots__ = ("tenant", "max_requests", "tokens_per_s", "weight")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    max_requests: int
    tokens_per_s: float
    weight: float
    def __init__(self, tenant: _Optional[str] = ..., max_requests: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., weight: _Optional[float] = ...) -> None: ...

class ListTenantsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTenantsResponse(_message.Message):
    __slots__ = ("default_limits", "tenants")
    DEFAULT_LIMITS_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    default_limits: TenantLimits
    tenants: _containers.RepeatedCompositeFieldContainer[TenantLimits]
    def __init__(self, default_limits: _Optional[_Union[TenantLimits, _Mapping]] = ..., tenants: _Optional[_Iterable[_Union[TenantLimits, _Mapping]]] = ...) -> None: ...

class SetTenantRequest(_message.Message):
    __slots__ = ("limits",)
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    limits: TenantLimits
    def __init__(self, limits: _Optional[_Union[TenantLimits, _Mapping]] = ...) -> None: ...

class SetTenantResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListQuarantineRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListQuarantineResponse(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[QuarantinedRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[QuarantinedRequest, _Mapping]]] = ...) -> None: ...

class QuarantinedRequest(_message.Message):
    __slots__ = ("id", "request_id", "tenant", "left_ms")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    LEFT_MS_FIELD_NUMBER: _ClassVar[int]
    id: str
    request_id: str
    tenant: str
    left_ms: int
    def __init__(self, id: _Optional[str] = ..., request_id: _Optional[str] = ..., tenant: _Optional[str] = ..., left_ms: _Optional[int] = ...) -> None: ...

class LiftQuarantineRequest(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ids: _Optional[_Iterable[str]] = ...) -> None: ...

class LiftQuarantineResponse(_message.Message):
    __slots__ = ("requests_lifted",)
    REQUESTS_LIFTED_FIELD_NUMBER: _ClassVar[int]
    requests_lifted: int
    def __init__(self, requests_lifted: _Optional[int] = ...) -> None: ...

class EvictWorkerRequest(_message.Message):
    __slots__ = ("worker_id", "hold_ms")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    HOLD_MS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    hold_ms: int
    def __init__(self, worker_id: _Optional[str] = ..., hold_ms: _Optional[int] = ...) -> None: ...

class EvictWorkerResponse(_message.Message):
    __slots__ = ("requests_moved",)
    REQUESTS_MOVED_FIELD_NUMBER: _ClassVar[int]
    requests_moved: int
    def __init__(self, requests_moved: _Optional[int] = ...) -> None: ...

class SetLogLevelRequest(_message.Message):
    __slots__ = ("level",)
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    level: str
    def __init__(self, level: _Optional[str] = ...) -> None: ...

class SetLogLevelResponse(_message.Message):
    __slots__ = ("previous_level",)
    PREVIOUS_LEVEL_FIELD_NUMBER: _ClassVar[int]
    previous_level: str
    def __init__(self, previous_level: _Optional[str] = ...) -> None: ...

class DumpStacksRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DumpStacksResponse(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...
