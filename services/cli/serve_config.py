"""Settings of `octavo serve`: those of a whole deployment, and those that it passes on to its processes."""

# ruff: noqa: RUF009 - what `_as_in` returns is a field, not its value

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from octavo.gpu_worker import quantization
from octavo.gpu_worker.config import MAX_SPECULATIVE_TOKENS, WorkerConfig
from octavo.services.common.config import Setting, settings_of
from octavo.services.gateway.config import GatewayConfig
from octavo.services.scheduler.config import SchedulerConfig

_LISTENING = "listening"
_PROCESSES = "processes"
_OBSERVING = "observing"
_SCHEDULING = "scheduling"
_SECURITY = "security"

PROCESSES: Mapping[str, type[Any]] = {"gateway": GatewayConfig, "scheduler": SchedulerConfig, "worker": WorkerConfig}
# What each process of a kind has for itself: one value cannot be that of several.
_OWN = {
    "gateway": {"model", "gateway_id", "admin_address", "health_address"},
    "scheduler": {"scheduler_id", "worker_endpoint", "admin_address", "health_address"},
    "worker": {
        "model", "worker_id", "worker_endpoint", "group_id", "rank", "world_size", "rendezvous", "alive_file",
        "drain_s",
    },
}  # fmt: skip


def _as_in(config: type[Any], name: str, **metadata: object) -> Any:
    """Return the field of a process's own configuration, with other metadata where some is given."""
    (theirs,) = (each for each in fields(config) if each.name == name)
    return field(default=theirs.default, metadata={**theirs.metadata, **metadata})


def passed_on() -> list[Setting]:
    """Return the settings of the processes that are no settings of `octavo serve`, but are taken and passed on."""
    taken = {each.name for each in fields(ServeConfig)}
    found: dict[str, Setting] = {}
    for kind, config in PROCESSES.items():
        for setting in settings_of(config):
            if setting.name not in taken | _OWN[kind] and not setting.metadata.get("hidden"):
                found.setdefault(setting.name, setting)
    return list(found.values())


@dataclass(frozen=True)
class ServeConfig:
    """Settings of `octavo serve`. None leaves a value to the process that it belongs to."""

    model: str = field(
        metadata={"positional": True, "help": "a folder, a .gguf file, a hub id such as org/name, demo or demo-embed"}
    )
    model_name: str = field(default="", metadata={"help": "the name that clients use; by default made from MODEL"})
    device: str = _as_in(WorkerConfig, "device", help="what computes", metavar="DEVICE")
    dtype: str = _as_in(WorkerConfig, "dtype", metavar="TYPE")
    kv_cache_memory: int | None = field(
        default=None,
        metadata={"kind": "bytes", "help": "memory for the KV cache of each worker, such as 2GiB"},
    )
    kv_cache_dtype: str = _as_in(WorkerConfig, "kv_cache_dtype", metavar="TYPE")
    quantization: str = _as_in(WorkerConfig, "quantization", metavar="SCHEME")
    max_model_len: int | None = field(
        default=None, metadata={"help": "most tokens of prompt and output together; by default what the model allows"}
    )

    adapter: tuple[str, ...] = _as_in(GatewayConfig, "adapter")
    adapter_dir: Path | None = _as_in(GatewayConfig, "adapter_dir")
    max_adapters: int = _as_in(WorkerConfig, "max_adapters")
    packed_cache: bool = _as_in(WorkerConfig, "packed_cache")
    speculative_tokens: int = _as_in(WorkerConfig, "speculative_tokens")

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
    http_cors_origins: tuple[str, ...] = _as_in(GatewayConfig, "http_cors_origins", group=_LISTENING)
    ui: bool = _as_in(GatewayConfig, "ui", group=_LISTENING)
    tool_call_format: str = _as_in(GatewayConfig, "tool_call_format", group=_LISTENING, metavar="FORMAT")
    reasoning_format: str = _as_in(GatewayConfig, "reasoning_format", group=_LISTENING, metavar="FORMAT")
    reflection: bool = _as_in(GatewayConfig, "reflection", group=_LISTENING)

    api_keys: Path | None = _as_in(GatewayConfig, "api_keys", group=_SECURITY)
    tls_certificate: Path | None = _as_in(GatewayConfig, "tls_certificate", group=_SECURITY)
    tls_key: Path | None = _as_in(GatewayConfig, "tls_key", group=_SECURITY)
    tls_client_ca: Path | None = _as_in(GatewayConfig, "tls_client_ca", group=_SECURITY)

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
    trusted_network: bool = _as_in(SchedulerConfig, "trusted_network", group=_PROCESSES)
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

    max_num_seqs: int = _as_in(SchedulerConfig, "max_num_seqs", group=_SCHEDULING)
    max_waiting: int = _as_in(SchedulerConfig, "max_waiting", group=_SCHEDULING)
    max_num_batched_tokens: int = _as_in(SchedulerConfig, "max_num_batched_tokens", group=_SCHEDULING)
    max_prefill_tokens: int = _as_in(SchedulerConfig, "max_prefill_tokens", group=_SCHEDULING)

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

    passed: Mapping[str, object] = field(default_factory=dict, metadata={"internal": True})
    """Values of `passed_on()`, by name."""

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
        for name in ("max_model_len", "max_num_seqs", "max_waiting", "max_num_batched_tokens", "max_prefill_tokens"):
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
