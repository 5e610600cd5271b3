from octavo.common.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerFrame(_message.Message):
    __slots__ = ("protocol_revision", "epoch", "worker_hello", "worker_config", "worker_ready", "step_plan", "step_result", "worker_fault", "heartbeat", "shutdown", "fenced", "rank_config", "idle_time", "adapter_load", "adapter_drop", "adapter_loaded")
    PROTOCOL_REVISION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WORKER_HELLO_FIELD_NUMBER: _ClassVar[int]
    WORKER_CONFIG_FIELD_NUMBER: _ClassVar[int]
    WORKER_READY_FIELD_NUMBER: _ClassVar[int]
    STEP_PLAN_FIELD_NUMBER: _ClassVar[int]
    STEP_RESULT_FIELD_NUMBER: _ClassVar[int]
    WORKER_FAULT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    SHUTDOWN_FIELD_NUMBER: _ClassVar[int]
    FENCED_FIELD_NUMBER: _ClassVar[int]
    RANK_CONFIG_FIELD_NUMBER: _ClassVar[int]
    IDLE_TIME_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_LOAD_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DROP_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_LOADED_FIELD_NUMBER: _ClassVar[int]
    protocol_revision: int
    epoch: int
    worker_hello: WorkerHello
    worker_config: WorkerConfig
    worker_ready: WorkerReady
    step_plan: StepPlan
    step_result: StepResult
    worker_fault: WorkerFault
    heartbeat: Heartbeat
    shutdown: Shutdown
    fenced: Fenced
    rank_config: RankConfig
    idle_time: IdleTime
    adapter_load: AdapterLoad
    adapter_drop: AdapterDrop
    adapter_loaded: AdapterLoaded
    def __init__(self, protocol_revision: _Optional[int] = ..., epoch: _Optional[int] = ..., worker_hello: _Optional[_Union[WorkerHello, _Mapping]] = ..., worker_config: _Optional[_Union[WorkerConfig, _Mapping]] = ..., worker_ready: _Optional[_Union[WorkerReady, _Mapping]] = ..., step_plan: _Optional[_Union[StepPlan, _Mapping]] = ..., step_result: _Optional[_Union[StepResult, _Mapping]] = ..., worker_fault: _Optional[_Union[WorkerFault, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., shutdown: _Optional[_Union[Shutdown, _Mapping]] = ..., fenced: _Optional[_Union[Fenced, _Mapping]] = ..., rank_config: _Optional[_Union[RankConfig, _Mapping]] = ..., idle_time: _Optional[_Union[IdleTime, _Mapping]] = ..., adapter_load: _Optional[_Union[AdapterLoad, _Mapping]] = ..., adapter_drop: _Optional[_Union[AdapterDrop, _Mapping]] = ..., adapter_loaded: _Optional[_Union[AdapterLoaded, _Mapping]] = ...) -> None: ...

class WorkerHello(_message.Message):
    __slots__ = ("worker_id", "rank", "world_size", "device", "free_memory_bytes", "code_version", "model_version", "group_id")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    FREE_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CODE_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    rank: int
    world_size: int
    device: str
    free_memory_bytes: int
    code_version: str
    model_version: str
    group_id: str
    def __init__(self, worker_id: _Optional[str] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., device: _Optional[str] = ..., free_memory_bytes: _Optional[int] = ..., code_version: _Optional[str] = ..., model_version: _Optional[str] = ..., group_id: _Optional[str] = ...) -> None: ...

class RankConfig(_message.Message):
    __slots__ = ("store",)
    STORE_FIELD_NUMBER: _ClassVar[int]
    store: str
    def __init__(self, store: _Optional[str] = ...) -> None: ...

class IdleTime(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerConfig(_message.Message):
    __slots__ = ("model_path", "weights_sha256", "kv_block_size", "kv_blocks", "max_batch_tokens", "dtype", "max_running", "token_counts", "kv_groups")
    MODEL_PATH_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_SHA256_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    KV_GROUPS_FIELD_NUMBER: _ClassVar[int]
    model_path: str
    weights_sha256: str
    kv_block_size: int
    kv_blocks: int
    max_batch_tokens: int
    dtype: str
    max_running: int
    token_counts: bool
    kv_groups: int
    def __init__(self, model_path: _Optional[str] = ..., weights_sha256: _Optional[str] = ..., kv_block_size: _Optional[int] = ..., kv_blocks: _Optional[int] = ..., max_batch_tokens: _Optional[int] = ..., dtype: _Optional[str] = ..., max_running: _Optional[int] = ..., token_counts: _Optional[bool] = ..., kv_groups: _Optional[int] = ...) -> None: ...

class AdapterLoad(_message.Message):
    __slots__ = ("adapter_id", "path", "sha256")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    adapter_id: int
    path: str
    sha256: str
    def __init__(self, adapter_id: _Optional[int] = ..., path: _Optional[str] = ..., sha256: _Optional[str] = ...) -> None: ...

class AdapterDrop(_message.Message):
    __slots__ = ("adapter_id",)
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    adapter_id: int
    def __init__(self, adapter_id: _Optional[int] = ...) -> None: ...

class AdapterLoaded(_message.Message):
    __slots__ = ("adapter_id", "num_bytes", "problem", "is_full")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    IS_FULL_FIELD_NUMBER: _ClassVar[int]
    adapter_id: int
    num_bytes: int
    problem: str
    is_full: bool
    def __init__(self, adapter_id: _Optional[int] = ..., num_bytes: _Optional[int] = ..., problem: _Optional[str] = ..., is_full: _Optional[bool] = ...) -> None: ...

class WorkerReady(_message.Message):
    __slots__ = ("kv_blocks", "warmup_us", "max_model_len", "vocab_size", "max_batch_tokens", "task", "vector_size", "whole_sequences", "structured_output", "prompt_logprobs", "max_row_tokens", "tokenizer_sha256", "max_adapters", "adapter_memory_bytes", "vectors_of_last_token", "notes", "kv_group_windows")
    KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WARMUP_US_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    VECTOR_SIZE_FIELD_NUMBER: _ClassVar[int]
    WHOLE_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    STRUCTURED_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MAX_ROW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_SHA256_FIELD_NUMBER: _ClassVar[int]
    MAX_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    VECTORS_OF_LAST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    KV_GROUP_WINDOWS_FIELD_NUMBER: _ClassVar[int]
    kv_blocks: int
    warmup_us: int
    max_model_len: int
    vocab_size: int
    max_batch_tokens: int
    task: _common_pb2.ModelTask
    vector_size: int
    whole_sequences: bool
    structured_output: bool
    prompt_logprobs: bool
    max_row_tokens: int
    tokenizer_sha256: str
    max_adapters: int
    adapter_memory_bytes: int
    vectors_of_last_token: bool
    notes: _containers.RepeatedScalarFieldContainer[str]
    kv_group_windows: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, kv_blocks: _Optional[int] = ..., warmup_us: _Optional[int] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ..., max_batch_tokens: _Optional[int] = ..., task: _Optional[_Union[_common_pb2.ModelTask, str]] = ..., vector_size: _Optional[int] = ..., whole_sequences: _Optional[bool] = ..., structured_output: _Optional[bool] = ..., prompt_logprobs: _Optional[bool] = ..., max_row_tokens: _Optional[int] = ..., tokenizer_sha256: _Optional[str] = ..., max_adapters: _Optional[int] = ..., adapter_memory_bytes: _Optional[int] = ..., vectors_of_last_token: _Optional[bool] = ..., notes: _Optional[_Iterable[str]] = ..., kv_group_windows: _Optional[_Iterable[int]] = ...) -> None: ...

class StepPlan(_message.Message):
    __slots__ = ("step_id", "num_sequences", "num_tokens", "slot_indexes", "query_lengths", "context_lengths", "token_ids", "block_table_rows", "block_table_counts", "block_ids", "copy_pairs", "freed_slots", "sampling_updates", "row_flags", "pooling_updates")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SLOT_INDEXES_FIELD_NUMBER: _ClassVar[int]
    QUERY_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TABLE_ROWS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TABLE_COUNTS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    COPY_PAIRS_FIELD_NUMBER: _ClassVar[int]
    FREED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_UPDATES_FIELD_NUMBER: _ClassVar[int]
    ROW_FLAGS_FIELD_NUMBER: _ClassVar[int]
    POOLING_UPDATES_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    num_sequences: int
    num_tokens: int
    slot_indexes: bytes
    query_lengths: bytes
    context_lengths: bytes
    token_ids: bytes
    block_table_rows: bytes
    block_table_counts: bytes
    block_ids: bytes
    copy_pairs: bytes
    freed_slots: bytes
    sampling_updates: _containers.RepeatedCompositeFieldContainer[SamplingUpdate]
    row_flags: bytes
    pooling_updates: _containers.RepeatedCompositeFieldContainer[PoolingUpdate]
    def __init__(self, step_id: _Optional[int] = ..., num_sequences: _Optional[int] = ..., num_tokens: _Optional[int] = ..., slot_indexes: _Optional[bytes] = ..., query_lengths: _Optional[bytes] = ..., context_lengths: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., block_table_rows: _Optional[bytes] = ..., block_table_counts: _Optional[bytes] = ..., block_ids: _Optional[bytes] = ..., copy_pairs: _Optional[bytes] = ..., freed_slots: _Optional[bytes] = ..., sampling_updates: _Optional[_Iterable[_Union[SamplingUpdate, _Mapping]]] = ..., row_flags: _Optional[bytes] = ..., pooling_updates: _Optional[_Iterable[_Union[PoolingUpdate, _Mapping]]] = ...) -> None: ...

class PoolingUpdate(_message.Message):
    __slots__ = ("slot", "dimensions", "normalize", "second_segment_start")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    NORMALIZE_FIELD_NUMBER: _ClassVar[int]
    SECOND_SEGMENT_START_FIELD_NUMBER: _ClassVar[int]
    slot: int
    dimensions: int
    normalize: bool
    second_segment_start: int
    def __init__(self, slot: _Optional[int] = ..., dimensions: _Optional[int] = ..., normalize: _Optional[bool] = ..., second_segment_start: _Optional[int] = ...) -> None: ...

class SamplingUpdate(_message.Message):
    __slots__ = ("slot", "temperature", "top_p", "top_k", "min_p", "seed", "logprobs", "allowed_token_mask", "candidate_index", "chosen_logprob", "presence_penalty", "frequency_penalty", "repetition_penalty", "bias_token_ids", "bias_values", "allowed_token_ids", "banned_until_min_token_ids", "min_new_tokens", "prompt_length", "history_token_ids", "traceparent", "grammar", "end_of_sequence_ids", "prompt_logprobs", "sampling", "adapter_id")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_MASK_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_INDEX_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_LOGPROB_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    BIAS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BIAS_VALUES_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BANNED_UNTIL_MIN_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MIN_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    HISTORY_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    END_OF_SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    slot: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    logprobs: int
    allowed_token_mask: bytes
    candidate_index: int
    chosen_logprob: bool
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    bias_token_ids: bytes
    bias_values: bytes
    allowed_token_ids: bytes
    banned_until_min_token_ids: bytes
    min_new_tokens: int
    prompt_length: int
    history_token_ids: bytes
    traceparent: str
    grammar: str
    end_of_sequence_ids: bytes
    prompt_logprobs: int
    sampling: _common_pb2.SamplingParams
    adapter_id: int
    def __init__(self, slot: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., logprobs: _Optional[int] = ..., allowed_token_mask: _Optional[bytes] = ..., candidate_index: _Optional[int] = ..., chosen_logprob: _Optional[bool] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., bias_token_ids: _Optional[bytes] = ..., bias_values: _Optional[bytes] = ..., allowed_token_ids: _Optional[bytes] = ..., banned_until_min_token_ids: _Optional[bytes] = ..., min_new_tokens: _Optional[int] = ..., prompt_length: _Optional[int] = ..., history_token_ids: _Optional[bytes] = ..., traceparent: _Optional[str] = ..., grammar: _Optional[str] = ..., end_of_sequence_ids: _Optional[bytes] = ..., prompt_logprobs: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., adapter_id: _Optional[int] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("step_id", "slot_indexes", "token_ids", "logprobs", "candidate_token_ids", "candidate_logprobs", "forward_us", "sample_us", "ranks", "vectors", "vector_sizes", "token_counts", "guesses")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    SLOT_INDEXES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FORWARD_US_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_US_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    VECTOR_SIZES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    GUESSES_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    slot_indexes: bytes
    token_ids: bytes
    logprobs: bytes
    candidate_token_ids: bytes
    candidate_logprobs: bytes
    forward_us: int
    sample_us: int
    ranks: bytes
    vectors: bytes
    vector_sizes: bytes
    token_counts: bytes
    guesses: _containers.RepeatedCompositeFieldContainer[Guesses]
    def __init__(self, step_id: _Optional[int] = ..., slot_indexes: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., candidate_token_ids: _Optional[bytes] = ..., candidate_logprobs: _Optional[bytes] = ..., forward_us: _Optional[int] = ..., sample_us: _Optional[int] = ..., ranks: _Optional[bytes] = ..., vectors: _Optional[bytes] = ..., vector_sizes: _Optional[bytes] = ..., token_counts: _Optional[bytes] = ..., guesses: _Optional[_Iterable[_Union[Guesses, _Mapping]]] = ...) -> None: ...

class Guesses(_message.Message):
    __slots__ = ("proposer", "drafted", "accepted", "time_us")
    PROPOSER_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    TIME_US_FIELD_NUMBER: _ClassVar[int]
    proposer: str
    drafted: int
    accepted: int
    time_us: int
    def __init__(self, proposer: _Optional[str] = ..., drafted: _Optional[int] = ..., accepted: _Optional[int] = ..., time_us: _Optional[int] = ...) -> None: ...

class WorkerFault(_message.Message):
    __slots__ = ("step_id", "code", "reason", "message", "fatal", "slot")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FATAL_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    code: int
    reason: str
    message: str
    fatal: bool
    slot: int
    def __init__(self, step_id: _Optional[int] = ..., code: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., fatal: _Optional[bool] = ..., slot: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("last_step_id", "device_memory_used_bytes", "progress", "processor_time_us")
    LAST_STEP_ID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MEMORY_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PROCESSOR_TIME_US_FIELD_NUMBER: _ClassVar[int]
    last_step_id: int
    device_memory_used_bytes: int
    progress: int
    processor_time_us: int
    def __init__(self, last_step_id: _Optional[int] = ..., device_memory_used_bytes: _Optional[int] = ..., progress: _Optional[int] = ..., processor_time_us: _Optional[int] = ...) -> None: ...

class Fenced(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Shutdown(_message.Message):
    __slots__ = ("grace_ms",)
    GRACE_MS_FIELD_NUMBER: _ClassVar[int]
    grace_ms: int
    def __init__(self, grace_ms: _Optional[int] = ...) -> None: ...
