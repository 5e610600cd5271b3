"""What a gateway can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from octavo.services.common.adapter_names import is_name
from octavo.services.common.config import is_exposed_address
from octavo.services.common.grpc_options import MAX_MESSAGE_BYTES
from octavo.services.gateway.mesh import parse_objectives
from octavo.services.gateway.output.formats import NONE, REASONING_FORMATS, TOOL_CALL_FORMATS
from octavo.services.gateway.security_config import SecurityConfig
from octavo.services.telemetry.config import TelemetryConfig

IGNORE, REFUSE = "ignore", "refuse"


@dataclass(frozen=True)
class GatewayConfig(SecurityConfig, TelemetryConfig):
    """Settings of one gateway process. Raises ValueError, with one line that says what to change."""

    model: Path = field(metadata={"help": "the model's folder, or a .gguf file", "positional": True})
    model_name: str = field(default="", metadata={"help": "name that clients use; empty: the folder's name"})
    model_version: str = field(
        default="",
        metadata={"help": "use only schedulers whose workers have these weights, as workers log them; empty: any"},
    )
    adapter: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "LoRA adapters that requests can name, in PEFT's layout, which workers see under the same paths",
            "metavar": "NAME=PATH,...",
        },
    )
    adapter_dir: Path | None = field(
        default=None,
        metadata={
            "help": "a folder of further adapters, each in a folder that has its name: they are loaded when a request "
            "names them",
            "metavar": "FOLDER",
        },
    )
    model_aliases: tuple[str, ...] = field(default=(), metadata={"help": "further names that work as well"})
    max_model_len: int = field(
        default=0, metadata={"help": "most tokens of prompt and output together; 0: what the model allows"}
    )
    clamp_max_tokens: bool = field(
        default=False,
        metadata={"help": "cut max_tokens to what fits the context beside the prompt; else such calls are refused"},
    )
    grpc_address: str = field(default="127.0.0.1:50051", metadata={"help": "where to listen: host:port or unix:PATH"})
    local_address: str = field(
        default="",
        metadata={"hidden": True, "help": "a second address, unix:PATH, for checks from this machine: never encrypted"},
    )
    scheduler_addresses: tuple[str, ...] = field(
        default=("127.0.0.1:50052",),
        metadata={
            "help": "the schedulers: host:port or unix:PATH; a name stands for all addresses that DNS has for it, "
            "file:PATH for those in the lines of a file, which is followed",
            "metavar": "ADDRESS,...",
        },
    )
    admin_address: str = field(
        default="", metadata={"help": "where to listen for operators (octavo.admin.v1); empty: nowhere"}
    )
    admin_keys: Path | None = field(
        default=None,
        metadata={
            "help": "file of API keys for octavo.admin.v1, made by `octavo keys add --admin`; without one those of "
            "api_keys count"
        },
    )
    http_address: str = field(
        default="",
        metadata={"help": "where to listen for the OpenAI-compatible HTTP API: host:port; empty: nowhere"},
    )
    http_max_body_bytes: int = field(default=16 * 1024 * 1024, metadata={"help": "longest body of an HTTP request"})
    http_max_connections: int = field(default=4096, metadata={"help": "most HTTP connections at once"})
    http_keep_alive_s: int = field(
        default=75, metadata={"help": "close an HTTP connection that is idle for so long; longer than a proxy keeps it"}
    )
    http_cors_origins: tuple[str, ...] = field(
        default=(), metadata={"help": "origins whose web pages may call the HTTP API, * for all; empty: none"}
    )
    unknown_fields: str = field(
        default=IGNORE,
        metadata={
            "help": "what happens to fields of HTTP requests that are not known, or are hints for other servers",
            "choices": (IGNORE, REFUSE),
        },
    )
    health_address: str = field(
        default="",
        metadata={"help": "where probes are answered (grpc.health.v1: startup, readiness, liveness); empty: nowhere"},
    )
    ui: bool = field(default=False, metadata={"help": "serve a page to chat with the model over HTTP, at /ui"})
    tool_call_format: str = field(
        default="auto",
        metadata={
            "help": "how the model writes tool calls; auto: as its chat template says, none: they stay text",
            "choices": ("auto", NONE, *TOOL_CALL_FORMATS),
        },
    )
    reasoning_format: str = field(
        default="auto",
        metadata={
            "help": "what is around the model's reasoning; auto: as its chat template says, none: it stays text",
            "choices": ("auto", NONE, *REASONING_FORMATS),
        },
    )
    reflection: bool = field(default=True, metadata={"help": "let tools such as grpcurl ask for the API's description"})
    gateway_id: str = field(default="", metadata={"help": "name of this process; empty: host name and process id"})
    max_requests: int = field(
        default=4096, metadata={"help": "most generate calls at once; further ones are refused with a retry delay"}
    )
    batch_window: int = field(default=256, metadata={"help": "most items of one BatchGenerate call that run at once"})
    batch_wait_s: float = field(
        default=600.0, metadata={"help": "how long an item of a batch waits for room in the queue before it is refused"}
    )
    batch_dir: Path | None = field(
        default=None,
        metadata={
            "help": "folder for /v1/files and /v1/batches of the HTTP API, which gateways may share; without one there "
            "are none",
            "metavar": "FOLDER",
        },
    )
    batch_jobs: int = field(default=2, metadata={"help": "most batches of /v1/batches that run here at once"})
    batch_max_file_bytes: int = field(default=1 << 30, metadata={"help": "longest file for /v1/files"})
    batch_max_tenant_bytes: int = field(default=16 << 30, metadata={"help": "most bytes of files that a tenant keeps"})
    batch_retention_s: float = field(
        default=30 * 24 * 3600.0,
        metadata={"help": "how long files are kept, and batches from their end on; 0: for ever"},
    )
    batch_max_requests: int = field(default=1_000_000, metadata={"help": "most requests of one batch"})
    grpc_max_message_bytes: int = field(
        default=0,
        metadata={"help": "longest gRPC request; 0: 8 MiB, or 16 bytes for each token of the context if that is more"},
    )
    request_memory_bytes: int = field(
        default=256 * 1024 * 1024,
        metadata={
            "help": "most memory for the requests of running calls, of which one tenant may have half; further ones "
            "are refused with a retry delay"
        },
    )
    max_concurrent_streams: int = field(default=1024, metadata={"help": "most calls at once on one connection"})
    max_connection_age_s: int = field(
        default=1800,
        metadata={"help": "close connections after so long, so that new replicas get their share; 0: never"},
    )
    tokenizer_threads: int = field(
        default=2, metadata={"help": "threads for long texts, and chat templates rendered at once"}
    )
    constraint_processes: int = field(
        default=2,
        metadata={"help": "most schemas, regular expressions and grammars tried out at once; 0: none are taken"},
    )
    resume_key_file: Path | None = field(
        default=None,
        metadata={
            "help": "file with a secret that all gateways share, so that each can resume the others' streams; without "
            "one only this process can resume its own. Of several lines the first signs, and each is believed",
            "metavar": "FILE",
        },
    )
    failover_s: float = field(
        default=30.0, metadata={"help": "how long a running request waits for a lost scheduler to come back"}
    )
    scheduler_tries: int = field(
        default=3,
        metadata={"help": "most schedulers that are asked to take a request, one after the other, if they refuse it"},
    )
    min_usable_schedulers: float = field(
        default=0.5,
        metadata={
            "help": "share of the schedulers that answer which this gateway must be able to use, by model and version, "
            "before it is ready for the first time"
        },
    )
    grace_s: float = field(default=30.0, metadata={"help": "how long running calls may take after a stop signal"})
    metrics_max_tenants: int = field(
        default=50, metadata={"help": "tenants that have metrics of their own; later ones are counted as `other`"}
    )
    access_log: bool = field(
        default=True, metadata={"help": "log a line for each generate call: who, how many tokens, how long"}
    )
    mesh_headers: bool = field(
        default=False,
        metadata={"help": "believe the headers x-gateway-*: only where a gateway in front sets or removes all of them"},
    )
    mesh_objectives: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "priorities of the objectives in x-gateway-inference-objective",
            "metavar": "NAME=PRIORITY,...",
        },
    )
    log_level: str = field(
        default="info",
        metadata={"help": "least severe messages to log", "choices": ("debug", "info", "warning", "error")},
    )

    progress_fd: int = field(
        default=-1,
        metadata={"help": "file descriptor for reports to a supervisor, as JSON lines", "hidden": True},
    )

    def __post_init__(self) -> None:
        self.check_security()
        self.check_telemetry()
        parse_objectives(self.mesh_objectives)
        parse_adapters(self.adapter)
        if self.local_address and not self.local_address.startswith("unix:"):
            raise ValueError(f"--local-address must be unix:PATH, not {self.local_address!r}")
        for name in (
            "max_requests",
            "request_memory_bytes",
            "batch_window",
            "batch_jobs",
            "batch_max_file_bytes",
            "batch_max_tenant_bytes",
            "batch_max_requests",
            "tokenizer_threads",
            "max_concurrent_streams",
            "http_max_body_bytes",
            "http_max_connections",
            "http_keep_alive_s",
            "metrics_max_tenants",
            "scheduler_tries",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        for name in (
            "max_model_len",
            "constraint_processes",
            "failover_s",
            "grace_s",
            "grpc_max_message_bytes",
            "max_connection_age_s",
            "batch_wait_s",
            "batch_retention_s",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative, not {getattr(self, name)}")
        if not 0 <= self.min_usable_schedulers <= 1:
            raise ValueError(f"--min-usable-schedulers must be from 0 to 1, not {self.min_usable_schedulers:g}")
        for name in ("grpc_address", "admin_address", "health_address"):
            _check_address(f"--{name.replace('_', '-')}", getattr(self, name), may_be_empty=name != "grpc_address")
        if not self.scheduler_addresses:
            raise ValueError("--scheduler-addresses must name at least one scheduler")
        for address in self.scheduler_addresses:
            if not address.startswith("file:"):
                _check_address("--scheduler-addresses", address, may_be_empty=False)
        if self.admin_keys is None and not self.authentication.is_required and is_exposed_address(self.admin_address):
            raise ValueError(
                f"--admin-address {self.admin_address} can be reached from other machines: give --admin-keys (`octavo "
                "keys add --admin` makes them), or use a loopback address"
            )
        if self.batch_dir is not None and not self.http_address:
            raise ValueError("--batch-dir is for the HTTP API: give --http-address as well")
        if self.http_address.startswith("unix:"):
            raise ValueError(f"--http-address must be host:port, not {self.http_address!r}")
        _check_address("--http-address", self.http_address, may_be_empty=True)

    def max_message_bytes(self, max_model_len: int) -> int:
        """Return the longest gRPC request of a model with such a context."""
        by_context = min(max(8 << 20, 16 * max_model_len), MAX_MESSAGE_BYTES)
        return self.grpc_max_message_bytes or by_context

    @property
    def served_name(self) -> str:
        """The model's name for clients."""
        return self.model_name or self.model.resolve().name.removesuffix(".gguf")


def parse_adapters(values: tuple[str, ...]) -> dict[str, Path]:
    """Return the adapters of NAME=PATH, .... Raises ValueError."""
    given: dict[str, Path] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or not path or not is_name(name) or name in given:
            raise ValueError(f"--adapter must be NAME=PATH, each name once, not {value!r}")
        given[name] = Path(path)
    return given


def _check_address(flag: str, address: str, may_be_empty: bool) -> None:
    if address.startswith("unix:") and len(address) > len("unix:"):
        return
    host, colon, port = address.rpartition(":")
    if not (may_be_empty and not address) and not (host and colon and port.isdigit() and int(port) < 65536):
        raise ValueError(f"{flag} must be host:port or unix:PATH, not {address!r}")
