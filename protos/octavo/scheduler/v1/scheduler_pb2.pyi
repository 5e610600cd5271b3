from octavo.common.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AttachRequest(_message.Message):
    __slots__ = ("hello", "submit", "cancel", "reattach", "detach", "check_adapter", "adapter_names")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    REATTACH_FIELD_NUMBER: _ClassVar[int]
    DETACH_FIELD_NUMBER: _ClassVar[int]
    CHECK_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_NAMES_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    submit: Submit
    cancel: Cancel
    reattach: Reattach
    detach: Detach
    check_adapter: CheckAdapter
    adapter_names: AdapterNames
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., reattach: _Optional[_Union[Reattach, _Mapping]] = ..., detach: _Optional[_Union[Detach, _Mapping]] = ..., check_adapter: _Optional[_Union[CheckAdapter, _Mapping]] = ..., adapter_names: _Optional[_Union[AdapterNames, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("gateway_id", "protocol_revision", "oldest_protocol_revision")
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_REVISION_FIELD_NUMBER: _ClassVar[int]
    OLDEST_PROTOCOL_REVISION_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    protocol_revision: int
    oldest_protocol_revision: int
    def __init__(self, gateway_id: _Optional[str] = ..., protocol_revision: _Optional[int] = ..., oldest_protocol_revision: _Optional[int] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("handle", "request_id", "body_sha256", "prompt_token_ids", "continue_token_ids", "sampling", "stop", "constraint", "candidate_count", "logprobs", "remaining_ms", "priority", "tenant", "cache_salt", "adapter", "resume_window_ms", "traceparent", "first_candidate_index", "end_of_sequence_ids", "chosen_logprob", "bypass_prefix_cache", "progress_interval_ms", "gateway_state", "pooling", "prompt_logprobs", "is_failover", "adapter_path")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    BODY_SHA256_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CONTINUE_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    CONSTRAINT_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_COUNT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    RESUME_WINDOW_MS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    FIRST_CANDIDATE_INDEX_FIELD_NUMBER: _ClassVar[int]
    END_OF_SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_LOGPROB_FIELD_NUMBER: _ClassVar[int]
    BYPASS_PREFIX_CACHE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_STATE_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    IS_FAILOVER_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_PATH_FIELD_NUMBER: _ClassVar[int]
    handle: int
    request_id: str
    body_sha256: bytes
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    continue_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _common_pb2.SamplingParams
    stop: _common_pb2.StopCriteria
    constraint: _common_pb2.OutputConstraint
    candidate_count: int
    logprobs: int
    remaining_ms: int
    priority: int
    tenant: str
    cache_salt: str
    adapter: str
    resume_window_ms: int
    traceparent: str
    first_candidate_index: int
    end_of_sequence_ids: _containers.RepeatedScalarFieldContainer[int]
    chosen_logprob: bool
    bypass_prefix_cache: bool
    progress_interval_ms: int
    gateway_state: bytes
    pooling: Pooling
    prompt_logprobs: int
    is_failover: bool
    adapter_path: str
    def __init__(self, handle: _Optional[int] = ..., request_id: _Optional[str] = ..., body_sha256: _Optional[bytes] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., continue_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., stop: _Optional[_Union[_common_pb2.StopCriteria, _Mapping]] = ..., constraint: _Optional[_Union[_common_pb2.OutputConstraint, _Mapping]] = ..., candidate_count: _Optional[int] = ..., logprobs: _Optional[int] = ..., remaining_ms: _Optional[int] = ..., priority: _Optional[int] = ..., tenant: _Optional[str] = ..., cache_salt: _Optional[str] = ..., adapter: _Optional[str] = ..., resume_window_ms: _Optional[int] = ..., traceparent: _Optional[str] = ..., first_candidate_index: _Optional[int] = ..., end_of_sequence_ids: _Optional[_Iterable[int]] = ..., chosen_logprob: _Optional[bool] = ..., bypass_prefix_cache: _Optional[bool] = ..., progress_interval_ms: _Optional[int] = ..., gateway_state: _Optional[bytes] = ..., pooling: _Optional[_Union[Pooling, _Mapping]] = ..., prompt_logprobs: _Optional[int] = ..., is_failover: _Optional[bool] = ..., adapter_path: _Optional[str] = ...) -> None: ...

class CheckAdapter(_message.Message):
    __slots__ = ("handle", "adapter", "adapter_path")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_PATH_FIELD_NUMBER: _ClassVar[int]
    handle: int
    adapter: str
    adapter_path: str
    def __init__(self, handle: _Optional[int] = ..., adapter: _Optional[str] = ..., adapter_path: _Optional[str] = ...) -> None: ...

class AdapterChecked(_message.Message):
    __slots__ = ("handle", "problem")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    handle: int
    problem: str
    def __init__(self, handle: _Optional[int] = ..., problem: _Optional[str] = ...) -> None: ...

class AdapterNames(_message.Message):
    __slots__ = ("names",)
    NAMES_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedCompositeFieldContainer[AdapterName]
    def __init__(self, names: _Optional[_Iterable[_Union[AdapterName, _Mapping]]] = ...) -> None: ...

class AdapterName(_message.Message):
    __slots__ = ("name", "path", "sha256", "version", "is_removed")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    IS_REMOVED_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    sha256: str
    version: int
    is_removed: bool
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., sha256: _Optional[str] = ..., version: _Optional[int] = ..., is_removed: _Optional[bool] = ...) -> None: ...

class Pooling(_message.Message):
    __slots__ = ("input_lengths", "second_segment_starts", "dimensions", "normalize")
    INPUT_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    SECOND_SEGMENT_STARTS_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    NORMALIZE_FIELD_NUMBER: _ClassVar[int]
    input_lengths: _containers.RepeatedScalarFieldContainer[int]
    second_segment_starts: _containers.RepeatedScalarFieldContainer[int]
    dimensions: int
    normalize: bool
    def __init__(self, input_lengths: _Optional[_Iterable[int]] = ..., second_segment_starts: _Optional[_Iterable[int]] = ..., dimensions: _Optional[int] = ..., normalize: _Optional[bool] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("handle", "request_id", "candidate_index", "tenant")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_INDEX_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    handle: int
    request_id: str
    candidate_index: int
    tenant: str
    def __init__(self, handle: _Optional[int] = ..., request_id: _Optional[str] = ..., candidate_index: _Optional[int] = ..., tenant: _Optional[str] = ...) -> None: ...

class Reattach(_message.Message):
    __slots__ = ("handle", "request_id", "epoch", "next_token_offsets", "tenant")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NEXT_TOKEN_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    handle: int
    request_id: str
    epoch: int
    next_token_offsets: _containers.RepeatedScalarFieldContainer[int]
    tenant: str
    def __init__(self, handle: _Optional[int] = ..., request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., next_token_offsets: _Optional[_Iterable[int]] = ..., tenant: _Optional[str] = ...) -> None: ...

class Detach(_message.Message):
    __slots__ = ("handle",)
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    def __init__(self, handle: _Optional[int] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("welcome", "admitted", "rejected", "step_outputs", "draining", "failed", "progress", "cancelled", "load", "reattached", "adapter_checked", "adapter_names")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    STEP_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    REATTACHED_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_CHECKED_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_NAMES_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    admitted: Admitted
    rejected: Rejected
    step_outputs: StepOutputs
    draining: Draining
    failed: Failed
    progress: Progress
    cancelled: Cancelled
    load: Load
    reattached: Reattached
    adapter_checked: AdapterChecked
    adapter_names: AdapterNames
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., admitted: _Optional[_Union[Admitted, _Mapping]] = ..., rejected: _Optional[_Union[Rejected, _Mapping]] = ..., step_outputs: _Optional[_Union[StepOutputs, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., cancelled: _Optional[_Union[Cancelled, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., reattached: _Optional[_Union[Reattached, _Mapping]] = ..., adapter_checked: _Optional[_Union[AdapterChecked, _Mapping]] = ..., adapter_names: _Optional[_Union[AdapterNames, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("scheduler_id", "epoch", "kv_block_size", "kv_blocks_total", "max_running", "protocol_revision", "load")
    SCHEDULER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_REVISION_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    scheduler_id: str
    epoch: int
    kv_block_size: int
    kv_blocks_total: int
    max_running: int
    protocol_revision: int
    load: Load
    def __init__(self, scheduler_id: _Optional[str] = ..., epoch: _Optional[int] = ..., kv_block_size: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., max_running: _Optional[int] = ..., protocol_revision: _Optional[int] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class Admitted(_message.Message):
    __slots__ = ("handle", "cached_prompt_tokens", "seed")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    handle: int
    cached_prompt_tokens: int
    seed: int
    def __init__(self, handle: _Optional[int] = ..., cached_prompt_tokens: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class Reattached(_message.Message):
    __slots__ = ("handle", "gateway_state", "seed", "prompt_tokens", "candidate_count", "first_candidate_index")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_STATE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_COUNT_FIELD_NUMBER: _ClassVar[int]
    FIRST_CANDIDATE_INDEX_FIELD_NUMBER: _ClassVar[int]
    handle: int
    gateway_state: bytes
    seed: int
    prompt_tokens: int
    candidate_count: int
    first_candidate_index: int
    def __init__(self, handle: _Optional[int] = ..., gateway_state: _Optional[bytes] = ..., seed: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., candidate_count: _Optional[int] = ..., first_candidate_index: _Optional[int] = ...) -> None: ...

class Rejected(_message.Message):
    __slots__ = ("handle", "code", "reason", "message", "retry_after_ms", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    handle: int
    code: int
    reason: str
    message: str
    retry_after_ms: int
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, handle: _Optional[int] = ..., code: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class StepOutputs(_message.Message):
    __slots__ = ("step_id", "handles", "candidate_indexes", "token_counts", "token_ids", "logprobs", "finished", "running", "waiting", "kv_blocks_free", "ranks", "candidate_token_ids", "candidate_logprobs", "vector_handles", "vector_candidate_indexes", "vector_sizes", "vectors", "prompt_logprobs")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_INDEXES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    VECTOR_HANDLES_FIELD_NUMBER: _ClassVar[int]
    VECTOR_CANDIDATE_INDEXES_FIELD_NUMBER: _ClassVar[int]
    VECTOR_SIZES_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    handles: _containers.RepeatedScalarFieldContainer[int]
    candidate_indexes: _containers.RepeatedScalarFieldContainer[int]
    token_counts: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    finished: _containers.RepeatedCompositeFieldContainer[Finished]
    running: int
    waiting: int
    kv_blocks_free: int
    ranks: _containers.RepeatedScalarFieldContainer[int]
    candidate_token_ids: _containers.RepeatedScalarFieldContainer[int]
    candidate_logprobs: _containers.RepeatedScalarFieldContainer[float]
    vector_handles: _containers.RepeatedScalarFieldContainer[int]
    vector_candidate_indexes: _containers.RepeatedScalarFieldContainer[int]
    vector_sizes: _containers.RepeatedScalarFieldContainer[int]
    vectors: bytes
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[PromptLogprobs]
    def __init__(self, step_id: _Optional[int] = ..., handles: _Optional[_Iterable[int]] = ..., candidate_indexes: _Optional[_Iterable[int]] = ..., token_counts: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., finished: _Optional[_Iterable[_Union[Finished, _Mapping]]] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., kv_blocks_free: _Optional[int] = ..., ranks: _Optional[_Iterable[int]] = ..., candidate_token_ids: _Optional[_Iterable[int]] = ..., candidate_logprobs: _Optional[_Iterable[float]] = ..., vector_handles: _Optional[_Iterable[int]] = ..., vector_candidate_indexes: _Optional[_Iterable[int]] = ..., vector_sizes: _Optional[_Iterable[int]] = ..., vectors: _Optional[bytes] = ..., prompt_logprobs: _Optional[_Iterable[_Union[PromptLogprobs, _Mapping]]] = ...) -> None: ...

class PromptLogprobs(_message.Message):
    __slots__ = ("handle", "position", "columns")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    handle: int
    position: int
    columns: _common_pb2.LogprobColumns
    def __init__(self, handle: _Optional[int] = ..., position: _Optional[int] = ..., columns: _Optional[_Union[_common_pb2.LogprobColumns, _Mapping]] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("handle", "candidate_index", "reason", "stop_token_id", "usage", "timing")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_INDEX_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    handle: int
    candidate_index: int
    reason: _common_pb2.FinishReason
    stop_token_id: int
    usage: _common_pb2.Usage
    timing: _common_pb2.Timing
    def __init__(self, handle: _Optional[int] = ..., candidate_index: _Optional[int] = ..., reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., stop_token_id: _Optional[int] = ..., usage: _Optional[_Union[_common_pb2.Usage, _Mapping]] = ..., timing: _Optional[_Union[_common_pb2.Timing, _Mapping]] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("handle", "code", "reason", "message", "resumable")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RESUMABLE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    code: int
    reason: str
    message: str
    resumable: bool
    def __init__(self, handle: _Optional[int] = ..., code: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., resumable: _Optional[bool] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("handles", "phases", "queue_positions", "prefill_tokens_done")
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_DONE_FIELD_NUMBER: _ClassVar[int]
    handles: _containers.RepeatedScalarFieldContainer[int]
    phases: _containers.RepeatedScalarFieldContainer[int]
    queue_positions: _containers.RepeatedScalarFieldContainer[int]
    prefill_tokens_done: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, handles: _Optional[_Iterable[int]] = ..., phases: _Optional[_Iterable[int]] = ..., queue_positions: _Optional[_Iterable[int]] = ..., prefill_tokens_done: _Optional[_Iterable[int]] = ...) -> None: ...

class Cancelled(_message.Message):
    __slots__ = ("request_id", "was_running", "usage")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    WAS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    was_running: bool
    usage: _common_pb2.Usage
    def __init__(self, request_id: _Optional[str] = ..., was_running: _Optional[bool] = ..., usage: _Optional[_Union[_common_pb2.Usage, _Mapping]] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("running", "waiting", "waiting_uncached_tokens", "kv_blocks_free", "kv_blocks_total", "estimated_queue_ms", "draining", "workers_ready", "step_age_ms", "max_model_len", "model_version", "prompt_tokens", "output_tokens", "looked_up_tokens", "accepted_tokens", "cached_tokens", "preemptions", "workers", "task", "vector_size", "prompt_logprobs", "vocab_size", "tokenizer_sha256", "max_adapters", "adapters_loaded", "adapter_loads", "notes", "may_grow", "proposers")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    WAITING_UNCACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    WORKERS_READY_FIELD_NUMBER: _ClassVar[int]
    STEP_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOOKED_UP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    VECTOR_SIZE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_SHA256_FIELD_NUMBER: _ClassVar[int]
    MAX_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_LOADED_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_LOADS_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    MAY_GROW_FIELD_NUMBER: _ClassVar[int]
    PROPOSERS_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    waiting_uncached_tokens: int
    kv_blocks_free: int
    kv_blocks_total: int
    estimated_queue_ms: int
    draining: bool
    workers_ready: int
    step_age_ms: int
    max_model_len: int
    model_version: str
    prompt_tokens: int
    output_tokens: int
    looked_up_tokens: int
    accepted_tokens: int
    cached_tokens: int
    preemptions: int
    workers: _containers.RepeatedCompositeFieldContainer[WorkerLoad]
    task: _common_pb2.ModelTask
    vector_size: int
    prompt_logprobs: bool
    vocab_size: int
    tokenizer_sha256: str
    max_adapters: int
    adapters_loaded: int
    adapter_loads: int
    notes: _containers.RepeatedScalarFieldContainer[str]
    may_grow: bool
    proposers: _containers.RepeatedCompositeFieldContainer[_common_pb2.Proposer]
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., waiting_uncached_tokens: _Optional[int] = ..., kv_blocks_free: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., estimated_queue_ms: _Optional[int] = ..., draining: _Optional[bool] = ..., workers_ready: _Optional[int] = ..., step_age_ms: _Optional[int] = ..., max_model_len: _Optional[int] = ..., model_version: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., looked_up_tokens: _Optional[int] = ..., accepted_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., preemptions: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[WorkerLoad, _Mapping]]] = ..., task: _Optional[_Union[_common_pb2.ModelTask, str]] = ..., vector_size: _Optional[int] = ..., prompt_logprobs: _Optional[bool] = ..., vocab_size: _Optional[int] = ..., tokenizer_sha256: _Optional[str] = ..., max_adapters: _Optional[int] = ..., adapters_loaded: _Optional[int] = ..., adapter_loads: _Optional[int] = ..., notes: _Optional[_Iterable[str]] = ..., may_grow: _Optional[bool] = ..., proposers: _Optional[_Iterable[_Union[_common_pb2.Proposer, _Mapping]]] = ...) -> None: ...

class WorkerLoad(_message.Message):
    __slots__ = ("worker_id", "running", "kv_blocks_free", "kv_blocks_total", "tokens_per_s")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    running: int
    kv_blocks_free: int
    kv_blocks_total: int
    tokens_per_s: float
    def __init__(self, worker_id: _Optional[str] = ..., running: _Optional[int] = ..., kv_blocks_free: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., tokens_per_s: _Optional[float] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ("deadline_ms",)
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    deadline_ms: int
    def __init__(self, deadline_ms: _Optional[int] = ...) -> None: ...

class WatchCacheRequest(_message.Message):
    __slots__ = ("after_event_id", "epoch")
    AFTER_EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    after_event_id: int
    epoch: int
    def __init__(self, after_event_id: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class WatchCacheResponse(_message.Message):
    __slots__ = ("event_id", "stored_block_hashes", "removed_block_hashes", "cleared", "more_follows", "epoch", "kv_block_size")
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    STORED_BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    REMOVED_BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    CLEARED_FIELD_NUMBER: _ClassVar[int]
    MORE_FOLLOWS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    event_id: int
    stored_block_hashes: _containers.RepeatedScalarFieldContainer[int]
    removed_block_hashes: _containers.RepeatedScalarFieldContainer[int]
    cleared: bool
    more_follows: bool
    epoch: int
    kv_block_size: int
    def __init__(self, event_id: _Optional[int] = ..., stored_block_hashes: _Optional[_Iterable[int]] = ..., removed_block_hashes: _Optional[_Iterable[int]] = ..., cleared: _Optional[bool] = ..., more_follows: _Optional[bool] = ..., epoch: _Optional[int] = ..., kv_block_size: _Optional[int] = ...) -> None: ...
