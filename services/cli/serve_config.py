"""Settings of `octavo serve`: those of a whole deployment."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from octavo.gpu_worker import quantization
from octavo.gpu_worker.config import MAX_SPECULATIVE_TOKENS
from octavo.services.gateway.output_formats import NONE, REASONING_FORMATS, TOOL_CALL_FORMATS

_LISTENING = "listening"
_PROCESSES = "processes"
_OBSERVING = "observing"
_SCHEDULING = "scheduling"
_SECURITY = "security"


@dataclass(frozen=True)
class ServeConfig:
    """Settings of `octavo serve`. None leaves a value to the process that it belongs to."""

    model: str = field(
        metadata={"positional": True, "help": "a folder, a .gguf file, a hub id such as org/name, demo or demo-embed"}
    )
    model_name: str = field(default="", metadata={"help": "the name that clients use; by default made from MODEL"})
    device: str = field(
        default="auto",
        metadata={"help": "what computes", "choices": ("auto", "cuda", "cpu", "reference"), "metavar": "DEVICE"},
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "type that weights are converted to; auto: as stored",
            "choices": ("auto", "bfloat16", "float16", "float32"),
            "metavar": "TYPE",
        },
    )
    kv_cache_memory: int | None = field(
        default=None,
        metadata={"kind": "bytes", "help": "memory for the KV cache of each worker, such as 2GiB"},
    )
    kv_cache_dtype: str = field(
        default="auto",
        metadata={
            "help": "type of the KV cache on a GPU; auto: that of the weights",
            "choices": ("auto", "fp8"),
            "metavar": "TYPE",
        },
    )
    quantization: str = field(
        default="none",
        metadata={
            "help": "quantise the weights of linear layers while they are loaded; none: keep them as they are",
            "choices": quantization.QUANTIZATIONS,
            "metavar": "SCHEME",
        },
    )
    max_model_len: int | None = field(
        default=None, metadata={"help": "most tokens of prompt and output together; by default what the model allows"}
    )

    packed_cache: bool = field(
        default=True,
        metadata={"help": "keep weights on disk as the CPU kernels read them, which makes the next start faster"},
    )
    speculative_tokens: int = field(
        default=11,
        metadata={
            "help": "on a CPU: guess at most so many tokens from what a text repeats, where that pays, and compute "
            "them at once; 0: do not. The text stays the same"
        },
    )

    grpc_address: str = field(
        default="127.0.0.1:50051",
        metadata={
            "group": _LISTENING,
            "help": "where the first gateway listens; further ones take the ports after it. Port 0: any free port",
        },
    )
    http_address: str = field(
        default="127.0.0.1:8000",
        metadata={
            "group": _LISTENING,
            "help": "where the first gateway listens for the OpenAI-compatible API; further ones take the ports after "
            "it. Empty: nowhere",
        },
    )
    http_cors_origins: tuple[str, ...] = field(
        default=(),
        metadata={"group": _LISTENING, "help": "origins whose web pages may call the HTTP API, * for all; empty: none"},
    )
    ui: bool = field(
        default=False, metadata={"group": _LISTENING, "help": "serve a page to chat with the model over HTTP, at /ui"}
    )
    tool_call_format: str = field(
        default="auto",
        metadata={
            "group": _LISTENING,
            "help": "how the model writes tool calls; auto: as its chat template says, none: they stay text",
            "choices": ("auto", NONE, *TOOL_CALL_FORMATS),
            "metavar": "FORMAT",
        },
    )
    reasoning_format: str = field(
        default="auto",
        metadata={
            "group": _LISTENING,
            "help": "what is around the model's reasoning; auto: as its chat template says, none: it stays text",
            "choices": ("auto", NONE, *REASONING_FORMATS),
            "metavar": "FORMAT",
        },
    )
    reflection: bool = field(
        default=True, metadata={"group": _LISTENING, "help": "let tools such as grpcurl ask for the API's description"}
    )

    api_keys: Path | None = field(
        default=None,
        metadata={"group": _SECURITY, "help": "file of API keys, made by `octavo keys add`: every call needs one"},
    )
    tls_certificate: Path | None = field(
        default=None, metadata={"group": _SECURITY, "help": "PEM chain for gRPC and HTTP; without it they are plain"}
    )
    tls_key: Path | None = field(default=None, metadata={"group": _SECURITY, "help": "its key"})
    tls_client_ca: Path | None = field(
        default=None,
        metadata={"group": _SECURITY, "help": "PEM authorities: clients need a certificate of theirs"},
    )

    gateways: int = field(
        default=1,
        metadata={"group": _PROCESSES, "help": "how many gateway processes; 0: an engine alone (--scheduler-address)"},
    )
    schedulers: int = field(
        default=1,
        metadata={
            "group": _PROCESSES,
            "help": "how many scheduler processes, each with workers of its own; 0: gateways alone, for the schedulers "
            "at --scheduler-addresses",
        },
    )
    scheduler_address: str = field(
        default="",
        metadata={
            "group": _PROCESSES,
            "help": "where the one scheduler listens for gateways that are elsewhere: host:port. Port 0: any free port",
        },
    )
    trusted_network: bool = field(
        default=False,
        metadata={
            "group": _PROCESSES,
            "help": "let gateways of other machines attach without certificates: only where nothing else reaches "
            "--scheduler-address",
        },
    )
    scheduler_addresses: tuple[str, ...] = field(
        default=(),
        metadata={
            "group": _PROCESSES,
            "help": "schedulers that are elsewhere: see octavo gateway --help",
            "metavar": "ADDRESS,...",
        },
    )
    workers: int = field(
        default=1,
        metadata={"group": _PROCESSES, "help": "how many workers for each scheduler, each with the whole model"},
    )
    tensor_parallel: int = field(
        default=1,
        metadata={
            "group": _PROCESSES,
            "help": "over how many processes, each with a GPU, the model of a worker is split; not for device cpu",
        },
    )
    startup_timeout_s: float = field(
        default=1800.0, metadata={"group": _PROCESSES, "help": "give up if not ready after this time"}
    )
    grace_s: float = field(
        default=30.0, metadata={"group": _PROCESSES, "help": "how long running requests may take after Ctrl-C"}
    )
    resume_key_file: Path | None = field(
        default=None,
        metadata={
            "group": _PROCESSES,
            "help": "file with a secret, shared with gateways elsewhere, so that each can resume the others' streams",
            "metavar": "FILE",
        },
    )

    max_running: int | None = field(default=None, metadata={"group": _SCHEDULING, "help": "most sequences in a step"})
    max_waiting: int | None = field(
        default=None, metadata={"group": _SCHEDULING, "help": "most requests in the queue; more are refused"}
    )
    max_batch_tokens: int | None = field(default=None, metadata={"group": _SCHEDULING, "help": "most tokens in a step"})
    max_prefill_tokens: int | None = field(
        default=None, metadata={"group": _SCHEDULING, "help": "most prompt tokens in a step that also decodes"}
    )

    metrics_address: str = field(
        default="",
        metadata={
            "group": _OBSERVING,
            "help": "where the first gateway serves /metrics for Prometheus; the other processes take the ports after "
            "it: gateways, schedulers, workers. Empty: nowhere",
        },
    )
    otlp_endpoint: str = field(
        default="",
        metadata={
            "group": _OBSERVING,
            "help": "collector of OpenTelemetry traces (OTLP over gRPC), such as http://127.0.0.1:4317; empty: none",
            "metavar": "URL",
        },
    )

    log_level: str = field(
        default="warning",
        metadata={
            "group": "logging",
            "help": "least severe messages of the processes to show",
            "choices": ("debug", "info", "warning", "error"),
            "metavar": "LEVEL",
        },
    )
    log_format: str = field(
        default="text",
        metadata={"group": "logging", "help": "how to show them", "choices": ("text", "json"), "metavar": "FORMAT"},
    )

    parent_pid: int = field(
        default=0, metadata={"hidden": True, "help": "stop when this process is no longer the parent; 0: never"}
    )

    def __post_init__(self) -> None:
        for name, least in (("gateways", 0), ("schedulers", 0), ("workers", 1), ("tensor_parallel", 1)):
            if not least <= getattr(self, name) <= 64:
                raise ValueError(f"--{name.replace('_', '-')} must be from {least} to 64, not {getattr(self, name)}")
        self._check_parts()
        if self.tensor_parallel > 1 and self.device == "cpu":
            raise ValueError("--tensor-parallel is not for device cpu, which uses all cores in one process")
        if problem := quantization.problem(self.quantization, self.device):
            raise ValueError(problem)
        if not 0 <= self.speculative_tokens <= MAX_SPECULATIVE_TOKENS:
            raise ValueError(
                f"--speculative-tokens must be from 0 to {MAX_SPECULATIVE_TOKENS}, not {self.speculative_tokens}"
            )
        for name in ("max_model_len", "max_running", "max_waiting", "max_batch_tokens", "max_prefill_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.kv_cache_memory is not None and self.kv_cache_memory < 1:
            raise ValueError(f"--kv-cache-memory must be positive, not {self.kv_cache_memory}")
        if self.grace_s < 0 or self.startup_timeout_s <= 0:
            raise ValueError("--grace-s must not be negative and --startup-timeout-s must be positive")

    def _check_parts(self) -> None:
        """Raise ValueError unless an engine alone, or gateways alone, can be reached and reach what they need."""
        if not self.gateways and not self.scheduler_address:
            raise ValueError("--gateways 0 needs --scheduler-address: gateways elsewhere have to reach the scheduler")
        if self.scheduler_address and self.schedulers != 1:
            raise ValueError(f"--scheduler-address is for one scheduler, not {self.schedulers}")
        if bool(self.schedulers) == bool(self.scheduler_addresses):
            raise ValueError("--schedulers 0 and --scheduler-addresses go together: give both or neither")
