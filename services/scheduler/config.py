"""The configuration of a scheduler process is one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from octavo.services.common.config import is_exposed_address
from octavo.services.common.tls_files import TlsFiles, check_tls_options
from octavo.services.telemetry.config import TelemetryConfig


@dataclass(frozen=True)
class CurveFiles:
    """The server's secret key, and the list of public keys that may connect. The list is followed."""

    secret_key: Path
    allowed: Path


def is_exposed(endpoint: str) -> bool:
    """Return whether a ZeroMQ endpoint can be reached from other machines."""
    return endpoint.startswith("tcp://") and is_exposed_address(endpoint.removeprefix("tcp://"))


BLOCK_SIZE = 16  # tokens in a KV block: fixed, the kernels' page layout depends on it


@dataclass(frozen=True)
class Quota:
    """What one tenant may use, whatever others do; 0 means no limit."""

    max_requests: int = 0
    tokens_per_s: float = 0.0


@dataclass(frozen=True)
class SchedulerConfig(TelemetryConfig):
    """Settings of a scheduler. Times are seconds, sizes are tokens unless the name says otherwise."""

    scheduler_address: str = field(
        default="127.0.0.1:50052",
        metadata={"help": "where gateways attach: host:port, or unix:PATH"},
    )
    worker_endpoint: str = field(
        default="tcp://127.0.0.1:50053",
        metadata={"help": "where workers connect: a ZeroMQ endpoint, ipc://PATH or tcp://HOST:PORT"},
    )
    worker_curve_key: Path | None = field(
        default=None,
        metadata={"help": "secret key for encrypting the hop to workers, made by `octavo keys curve` (CurveZMQ)"},
    )
    worker_curve_allowed: Path | None = field(
        default=None, metadata={"help": "file with the public key of each worker that may connect, one a line"}
    )
    hop_certificate: Path | None = field(default=None, metadata={"help": "PEM chain that gateways are shown"})
    hop_key: Path | None = field(default=None, metadata={"help": "its key"})
    hop_ca: Path | None = field(default=None, metadata={"help": "PEM authorities of the gateways' certificates"})
    trusted_network: bool = field(
        default=False,
        metadata={
            "help": "let gateways of other machines attach without certificates: only where nothing else reaches "
            "scheduler_address"
        },
    )
    admin_address: str = field(default="", metadata={"help": "where octavo.admin.v1 is served; empty: nowhere"})
    admin_keys: Path | None = field(
        default=None,
        metadata={"help": "file of API keys, made by `octavo keys add --admin`: calls of octavo.admin.v1 need one"},
    )
    health_address: str = field(
        default="",
        metadata={"help": "where probes are answered (grpc.health.v1: startup, readiness, liveness); empty: nowhere"},
    )
    model_name: str = field(default="", metadata={"help": "the model's name, for the label that vLLM's metrics have"})
    scheduler_id: str = field(default="", metadata={"help": "this scheduler's name; empty: made from the process id"})
    max_num_seqs: int = field(default=256, metadata={"help": "most sequences in a step", "was": "max_running"})
    max_num_batched_tokens: int = field(
        default=2048, metadata={"help": "most tokens in a step", "was": "max_batch_tokens"}
    )
    max_prefill_tokens: int = field(
        default=512,
        metadata={"help": "most prompt tokens in a step that also decodes: bounds inter-token latency"},
    )
    max_waiting: int = field(default=1024, metadata={"help": "most requests in the queue; more are refused"})
    max_waiting_tokens: int = field(default=1 << 20, metadata={"help": "most prompt tokens in the queue"})
    max_request_ms: int = field(default=3_600_000, metadata={"help": "deadline of requests that have none"})
    max_recoveries: int = field(default=16, metadata={"help": "how often a request survives the loss of its worker"})
    max_resume_window_ms: int = field(
        default=600_000,
        metadata={"help": "how long requests may go on after their gateway's stream broke, or be kept once they ended"},
    )
    max_resume_bytes: int = field(
        default=256 << 20,
        metadata={
            "help": "memory for requests that ended and can still be resumed; without room the tenant that has most "
            "for its weight loses its oldest"
        },
    )
    ageing_tokens_per_s: float = field(
        default=1024.0,
        metadata={"help": "prompt tokens by which a second of waiting moves a request forward in the queue"},
    )
    tenant_weights: tuple[str, ...] = field(
        default=(), metadata={"help": "shares of tenants, as NAME=WEIGHT; others weigh 1"}
    )
    tenant_max_requests: int = field(
        default=0, metadata={"help": "most requests that a tenant has in the queue and running; 0: no limit"}
    )
    tenant_tokens_per_s: float = field(
        default=0.0, metadata={"help": "prompt and output tokens that a tenant may use in the long run; 0: no limit"}
    )
    tenant_quotas: tuple[str, ...] = field(
        default=(), metadata={"help": "other quotas of single tenants, as NAME=REQUESTS:TOKENS_PER_S"}
    )
    tenants_file: Path | None = field(
        default=None,
        metadata={
            "help": "YAML file with quotas and weights of tenants, which is followed: what it says counts from then on",
            "metavar": "FILE",
        },
    )
    step_timeout_s: float = field(
        default=60.0,
        metadata={"help": "a GPU worker that owes a step for longer is given up, and sooner once steps were measured"},
    )
    worker_grace_s: float = field(
        default=15.0, metadata={"help": "how long requests are still queued after the last worker went"}
    )
    check_every_steps: int = field(
        default=1000, metadata={"help": "steps between two checks of all bookkeeping; 0: only when idle"}
    )
    grace_s: float = field(default=30.0, metadata={"help": "how long running requests may take on shutdown"})
    log_level: str = field(
        default="info", metadata={"help": "how much to log", "choices": ("debug", "info", "warning", "error")}
    )

    progress_fd: int = field(
        default=-1,
        metadata={"help": "file descriptor for reports to a supervisor, as JSON lines", "hidden": True},
    )

    def __post_init__(self) -> None:
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_prefill_tokens",
            "max_waiting",
            "max_waiting_tokens",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running sequence gets a token in every step"
            )
        if self.step_timeout_s <= 0 or self.grace_s < 0 or self.worker_grace_s < 0:
            raise ValueError("step_timeout_s must be positive, grace_s and worker_grace_s not negative")
        if self.max_resume_window_ms < 0 or self.max_resume_bytes < 0:
            raise ValueError("max_resume_window_ms and max_resume_bytes must not be negative")
        if self.tenant_max_requests < 0 or self.tenant_tokens_per_s < 0:
            raise ValueError("tenant_max_requests and tenant_tokens_per_s must not be negative")
        self.check_telemetry()
        self.weights()
        self.quotas()
        self._check_security()

    def default_quota(self) -> Quota:
        """Return the limits of tenants that have none of their own."""
        return Quota(self.tenant_max_requests, self.tenant_tokens_per_s)

    def quotas(self) -> dict[str, Quota]:
        """Return the limits of single tenants, by name."""
        quotas = {}
        for entry in self.tenant_quotas:
            name, _, limits = entry.rpartition("=")
            max_requests, _, tokens_per_s = limits.partition(":")
            try:
                quotas[name] = Quota(int(max_requests), float(tokens_per_s))
            except ValueError:
                raise ValueError(f"tenant_quotas: {entry!r} is not NAME=REQUESTS:TOKENS_PER_S") from None
            if quotas[name].max_requests < 0 or not 0 <= quotas[name].tokens_per_s < 1e12:
                raise ValueError(f"tenant_quotas: the limits in {entry!r} must not be negative; 0 means none")
        return quotas

    def _check_security(self) -> None:
        if (self.worker_curve_key is None) != (self.worker_curve_allowed is None):
            raise ValueError("worker_curve_key and worker_curve_allowed go together: workers are known by their keys")
        if self.hop_tls is not None and self.hop_tls.ca is None:
            raise ValueError("hop_certificate needs hop_ca: gateways are known by their certificates")
        if self.hop_tls is None and not self.trusted_network and is_exposed_address(self.scheduler_address):
            raise ValueError(
                f"scheduler_address {self.scheduler_address} can be reached from other machines, and who attaches may "
                "act for any tenant: give hop_certificate, hop_key and hop_ca, or trusted_network if only gateways "
                "reach it"
            )
        if self.admin_keys is None and is_exposed_address(self.admin_address):
            raise ValueError(
                f"admin_address {self.admin_address} can be reached from other machines: give admin_keys "
                "(`octavo keys add --admin` makes them), or use a loopback address"
            )
        if self.worker_curve_key is None and is_exposed(self.worker_endpoint):
            raise ValueError(
                f"worker_endpoint {self.worker_endpoint} can be reached from other machines: give worker_curve_key and "
                "worker_curve_allowed (`octavo keys curve` makes keys), or use an ipc:// or a loopback endpoint"
            )

    @property
    def hop_tls(self) -> TlsFiles | None:
        """Files of the listener for gateways."""
        return check_tls_options("hop", self.hop_certificate, self.hop_key, self.hop_ca)

    @property
    def curve_files(self) -> CurveFiles | None:
        """Files of the encrypted hop to workers."""
        if self.worker_curve_key is None or self.worker_curve_allowed is None:
            return None
        return CurveFiles(self.worker_curve_key, self.worker_curve_allowed)

    def weights(self) -> dict[str, float]:
        """Return the tenants' weights by name."""
        weights = {}
        for entry in self.tenant_weights:
            name, _, weight = entry.partition("=")
            try:
                weights[name] = float(weight)
            except ValueError:
                raise ValueError(f"tenant_weights: {entry!r} is not NAME=WEIGHT") from None
            if not 0 < weights[name] < 1e6:
                raise ValueError(f"tenant_weights: the weight in {entry!r} must lie between 0 and 1,000,000")
        return weights
