"""The one table of metrics: every name, label and bucket that any process exposes.

Names are an interface: dashboards and alerts use them, so a test freezes them. Each is counted by one
kind of process, so that a sum over all processes counts nothing twice. `alias` is the name under which
vLLM has the same thing; it is exposed beside ours, with the label `model_name`, for tools made for vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_DURATION_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0)
_TOKEN_GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
_STEP_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_STEP_TOKENS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0)


@dataclass(frozen=True, eq=False)  # each is itself: the hot paths look it up by identity
class Metric:
    """One row. Counters have `_total` in their names; times are seconds, sizes bytes, shares 0 to 1."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    alias: str = ""


# -- every process -----------------------------------------------------------------------------------

BUILD_INFO = Metric("octavo_build_info", "gauge", "always 1; what runs", ("process", "name", "version"))
STARTED = Metric("octavo_start_time_seconds", "gauge", "when the process started, as a Unix time")

LOOP_LAG = Metric(
    "octavo_event_loop_lag_seconds", "gauge", "how long a gateway's or scheduler's event loop let the last scrape wait"
)
CERTIFICATE_END = Metric(
    "octavo_certificate_end_seconds",
    "gauge",
    "when a certificate that the process shows ends, as a Unix time: tls to clients, hop between processes",
    ("use",),
)

# -- gateway: what clients see -----------------------------------------------------------------------

REQUESTS = Metric(
    "octavo_requests_total", "counter", "generate calls that ended, by their gRPC status code", ("tenant", "code")
)
REQUESTS_RUNNING = Metric("octavo_requests_in_flight", "gauge", "generate calls that have not ended")
REJECTIONS = Metric(
    "octavo_rejections_total", "counter", "calls refused before their admission, by ErrorInfo.reason", ("reason",)
)
INTERRUPTIONS = Metric(
    "octavo_interruptions_total", "counter", "calls that failed after their admission, by ErrorInfo.reason", ("reason",)
)
FINISHES = Metric(
    "octavo_candidates_finished_total",
    "counter",
    "outputs that ended, by why",
    ("finished_reason",),
    alias="vllm:request_success_total",
)
PROMPT_TOKENS = Metric(
    "octavo_prompt_tokens_total",
    "counter",
    "prompt tokens of admitted calls",
    ("tenant",),
    alias="vllm:prompt_tokens_total",
)
CACHED_TOKENS = Metric(
    "octavo_cached_prompt_tokens_total",
    "counter",
    "of these, tokens that the prefix cache had",
    ("tenant",),
    alias="vllm:prompt_tokens_cached_total",
)
OUTPUT_TOKENS = Metric(
    "octavo_output_tokens_total",
    "counter",
    "tokens sent to clients",
    ("tenant",),
    alias="vllm:generation_tokens_total",
)
TTFT = Metric(
    "octavo_time_to_first_token_seconds",
    "histogram",
    "from a call's arrival to its first token",
    ("tenant",),
    _LATENCY_S,
    alias="vllm:time_to_first_token_seconds",
)
DURATION = Metric(
    "octavo_request_duration_seconds",
    "histogram",
    "from a call's arrival to its end, if it ended well",
    (),
    _DURATION_S,
    alias="vllm:e2e_request_latency_seconds",
)
FAILOVERS = Metric(
    "octavo_failovers_total", "counter", "times that a running request lost its scheduler and went on at one"
)
SCHEDULERS = Metric(
    "octavo_gateway_schedulers",
    "gauge",
    "schedulers of a gateway: connected ones, those of them that make progress, and unusable ones, which answer and "
    "have another model, tokenizer or protocol revision",
    ("state",),
)

MODEL_SCHEDULERS = Metric(
    "octavo_gateway_model_schedulers",
    "gauge",
    "connected schedulers of a gateway by the version of their weights; two rows: they serve different ones",
    ("model_version",),
)

# -- scheduler: the queue, the cache, the steps ------------------------------------------------------

RUNNING = Metric("octavo_sequences_running", "gauge", "sequences that are computed", alias="vllm:num_requests_running")
WAITING = Metric("octavo_sequences_waiting", "gauge", "sequences in the queue", alias="vllm:num_requests_waiting")
WAITING_TOKENS = Metric("octavo_waiting_tokens", "gauge", "tokens that waiting sequences still have to compute")
QUEUE_ESTIMATE = Metric("octavo_queue_estimate_seconds", "gauge", "how long a new request would wait")
KV_USAGE = Metric(
    "octavo_kv_cache_usage_ratio",
    "gauge",
    "share of the KV blocks that running sequences hold",
    alias="vllm:kv_cache_usage_perc",
)
KV_BLOCKS = Metric("octavo_kv_blocks", "gauge", "KV blocks of all workers", ("state",))
CACHE_CONFIG = Metric(
    "octavo_cache_config_info",
    "gauge",
    "always 1; tokens in a block and blocks of all workers",
    ("block_size", "num_gpu_blocks"),
    alias="vllm:cache_config_info",
)
WORKERS_READY = Metric("octavo_workers_ready", "gauge", "workers that compute")
STEP_AGE = Metric("octavo_oldest_step_seconds", "gauge", "age of the oldest unanswered step; 0 if none is out")
DRAINING = Metric("octavo_draining", "gauge", "1 while no new requests are taken")
QUARANTINED = Metric("octavo_quarantined_requests", "gauge", "requests that are refused because workers died of them")
ADMISSIONS = Metric("octavo_admissions_total", "counter", "requests that entered the queue")
REFUSALS = Metric(
    "octavo_scheduler_refusals_total",
    "counter",
    "requests that one scheduler did not take, by reason; another one may have",
    ("reason",),
)
QUEUE_TIME = Metric(
    "octavo_queue_time_seconds",
    "histogram",
    "from a sequence's admission to its first step",
    (),
    _LATENCY_S,
    alias="vllm:request_queue_time_seconds",
)
PREFILL_TIME = Metric(
    "octavo_prefill_time_seconds",
    "histogram",
    "from a sequence's first step to its first token",
    (),
    _LATENCY_S,
    alias="vllm:request_prefill_time_seconds",
)
DECODE_TIME = Metric(
    "octavo_decode_time_seconds",
    "histogram",
    "from a sequence's first token to its last",
    (),
    _DURATION_S,
    alias="vllm:request_decode_time_seconds",
)
ITL = Metric(
    "octavo_inter_token_latency_seconds",
    "histogram",
    "between two tokens of a sequence",
    (),
    _TOKEN_GAP_S,
    alias="vllm:inter_token_latency_seconds",
)
COMPUTED_TOKENS = Metric(
    "octavo_computed_tokens_total",
    "counter",
    "tokens that steps computed: of prompts (again after a preemption), or one new one for a sequence",
    ("phase",),
)
CACHE_QUERIES = Metric(
    "octavo_prefix_cache_queries_total",
    "counter",
    "tokens that were looked up in the prefix cache",
    alias="vllm:prefix_cache_queries_total",
)
CACHE_HITS = Metric(
    "octavo_prefix_cache_hits_total",
    "counter",
    "of these, tokens that were there",
    alias="vllm:prefix_cache_hits_total",
)
ADAPTERS = Metric("octavo_adapters", "gauge", "LoRA adapters that the workers hold, or load")
ADAPTER_LOADS = Metric("octavo_adapter_loads_total", "counter", "times that a worker has loaded an adapter")
ACCEPTED_TOKENS = Metric(
    "octavo_speculative_accepted_tokens_total",
    "counter",
    "output tokens that took no step of their own: they were guessed, and the guess was right",
    alias="vllm:spec_decode_num_accepted_tokens_total",
)
DRAFT_TOKENS = Metric(
    "octavo_speculative_draft_tokens_total",
    "counter",
    "tokens that were guessed and computed, by what guessed them; is_right: they are what was drawn",
    ("proposer", "is_right"),
    alias="vllm:spec_decode_num_draft_tokens_total",
)
DRAFT_TIME = Metric(
    "octavo_speculative_seconds_total",
    "counter",
    "time of guessing tokens, and of computing them in steps",
    ("proposer",),
)
PREEMPTIONS = Metric(
    "octavo_preemptions_total",
    "counter",
    "times that a sequence lost its blocks to others",
    alias="vllm:num_preemptions_total",
)
WORKER_LOSSES = Metric(
    "octavo_worker_losses_total", "counter", "workers that were lost; crashed: it died or hung", ("crashed",)
)
RECOVERIES = Metric("octavo_recoveries_total", "counter", "sequences that went on after the loss of their worker")
STEPS = Metric("octavo_steps_total", "counter", "steps that workers answered")
STEP_TIME = Metric(
    "octavo_step_seconds",
    "histogram",
    "a step's parts: plan (scheduler), transport (waiting and both ways), forward, sample (worker)",
    ("part",),
    _STEP_S,
)
STEP_TOKENS = Metric(
    "octavo_step_tokens",
    "histogram",
    "tokens in a step",
    (),
    _STEP_TOKENS,
    alias="vllm:iteration_tokens_total",
)

# -- worker: what it knows alone ---------------------------------------------------------------------

WORKER_JOINED = Metric("octavo_worker_joined", "gauge", "1 while the worker takes part in a scheduler's work")
WORKER_JOINS = Metric("octavo_worker_joins_total", "counter", "times that the worker joined a scheduler")
WORKER_STEPS = Metric("octavo_worker_steps_total", "counter", "steps that the worker computed")
WORKER_TOKENS = Metric("octavo_worker_tokens_total", "counter", "tokens that the worker computed")
WORKER_BUSY = Metric("octavo_worker_busy_seconds_total", "counter", "time in forward passes and in sampling", ("part",))
WORKER_FAULTS = Metric("octavo_worker_faults_total", "counter", "faults that the worker reported", ("reason",))
WORKER_MEMORY = Metric("octavo_worker_memory_bytes", "gauge", "memory in use where weights and cache are")
WORKER_KV_BLOCKS = Metric("octavo_worker_kv_blocks", "gauge", "KV blocks that the worker has")

# -- an endpoint picker reads these of a gateway, at a path of their own ------------------------------

PICKER_WAITING = Metric("vllm:num_requests_waiting", "gauge", "sequences in the queues of all schedulers")
PICKER_RUNNING = Metric("vllm:num_requests_running", "gauge", "sequences that are computed, at all schedulers")
PICKER_KV_USAGE = Metric("vllm:kv_cache_usage_perc", "gauge", "share of the KV blocks in use, at all schedulers")
PICKER_CACHE_CONFIG = Metric(
    "vllm:cache_config_info",
    "gauge",
    "always 1; tokens in a block and blocks of all workers",
    ("block_size", "num_gpu_blocks"),
)

COMMON = (BUILD_INFO, STARTED, LOOP_LAG, CERTIFICATE_END)
GATEWAY = (
    REQUESTS, REQUESTS_RUNNING, REJECTIONS, INTERRUPTIONS, FINISHES, PROMPT_TOKENS, CACHED_TOKENS, OUTPUT_TOKENS, TTFT,
    DURATION, FAILOVERS, SCHEDULERS, MODEL_SCHEDULERS,
)  # fmt: skip
SCHEDULER = (
    RUNNING, WAITING, WAITING_TOKENS, QUEUE_ESTIMATE, KV_USAGE, KV_BLOCKS, CACHE_CONFIG, WORKERS_READY, STEP_AGE,
    DRAINING, ADMISSIONS, REFUSALS, QUEUE_TIME, PREFILL_TIME, DECODE_TIME, ITL, COMPUTED_TOKENS, CACHE_QUERIES,
    CACHE_HITS, ACCEPTED_TOKENS, DRAFT_TOKENS, DRAFT_TIME,
    PREEMPTIONS, WORKER_LOSSES, RECOVERIES, STEPS, STEP_TIME, STEP_TOKENS, ADAPTERS,
    ADAPTER_LOADS, QUARANTINED,
)  # fmt: skip
WORKER = (
    WORKER_JOINED, WORKER_JOINS, WORKER_STEPS, WORKER_TOKENS, WORKER_BUSY, WORKER_FAULTS, WORKER_MEMORY,
    WORKER_KV_BLOCKS,
)  # fmt: skip
PICKER = (PICKER_WAITING, PICKER_RUNNING, PICKER_KV_USAGE, PICKER_CACHE_CONFIG)
