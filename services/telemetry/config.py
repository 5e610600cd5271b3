"""Settings that every process has."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """The part of every process's settings that is about traces and metrics."""

    metrics_address: str = field(
        default="", metadata={"help": "where to serve /metrics for Prometheus: host:port; empty: nowhere"}
    )
    otlp_endpoint: str = field(
        default="",
        metadata={
            "help": "collector of OpenTelemetry traces (OTLP over gRPC), such as http://127.0.0.1:4317; empty: no "
            "traces. Needs the extra `otel`",
            "metavar": "URL",
        },
    )

    otlp_sample_ratio: float = field(
        default=1.0,
        metadata={"help": "share of traces that are recorded, of those that no caller has decided about: 0 to 1"},
    )

    def check_telemetry(self) -> None:
        """Raise ValueError if an address is none."""
        if self.metrics_address:
            split_address(self.metrics_address)
        if self.otlp_endpoint and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ValueError(f"otlp_endpoint must be http://host:port or https://host:port, not {self.otlp_endpoint!r}")
        if not 0 <= self.otlp_sample_ratio <= 1:
            raise ValueError(f"otlp_sample_ratio must be from 0 to 1, not {self.otlp_sample_ratio:g}")


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of host:port. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"metrics_address must be host:port, not {address!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)
