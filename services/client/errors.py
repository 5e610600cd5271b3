"""What can go wrong in a call, decoded from the status that the server sends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_STATUS_DETAILS = "grpc-status-details-bin"


@dataclass(frozen=True)
class Violation:
    """A field of the request that breaks a rule."""

    field: str
    description: str


class OctavoError(Exception):
    """A call failed.

    code         the gRPC status code
    message      for people; says what to change
    reason       a constant for programs, such as "QUEUE_FULL"; empty if the error is not the server's own
    metadata     values that belong to the reason
    violations   the fields that break a rule, for INVALID_ARGUMENT
    retry_after  seconds after which a retry could succeed; None if the server names no time
    request_id   the request in the server's logs; empty if it was never given one
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: tuple[Violation, ...] = (),
        retry_after: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.violations = violations
        self.retry_after = retry_after
        self.request_id = request_id
        self.admitted = False
        """The request had been admitted when this happened: it must not be sent again as it was."""

    @property
    def is_broken_call(self) -> bool:
        """The call broke, and not the request: something on the way, or a process that had it, went away."""
        own_words = bool(self.reason)
        if self.reason == "STREAM_INTERRUPTED" or self.code is grpc.StatusCode.UNAVAILABLE:
            return True
        # ABORTED is STREAM_INTERRUPTED, whose word was lost on the way: some proxies pass no trailers on.
        bare = (
            grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED,
        )  # fmt: skip
        return self.code in bare and not own_words

    @property
    def was_not_taken(self) -> bool:
        """No server took the call: none can, or gRPC's server, told to stop, cancelled it before our code saw it."""
        dropped = self.code is grpc.StatusCode.CANCELLED and not self.reason
        return self.code is grpc.StatusCode.UNAVAILABLE or dropped

    @property
    def has_ended_already(self) -> bool:
        """A request to continue an output was refused because nothing is left of it."""
        return any(violation.field.startswith("generation.continue_output") for violation in self.violations)

    def __str__(self) -> str:
        line = f"{self.message} ({self.reason or self.code.name})"
        if rest := [f"{v.field}: {v.description}" for v in self.violations if v.description not in self.message]:
            line += ": " + "; ".join(rest)
        return line if self.retry_after is None else f"{line}; retry in {self.retry_after:g} s"


class ProtocolError(OctavoError):
    """The server broke the contract of a stream: a gap, a repeat, or an end without Completed."""

    def __init__(self, message: str, *, request_id: str = "") -> None:
        super().__init__(grpc.StatusCode.INTERNAL, message, reason="PROTOCOL_ERROR", request_id=request_id)


class ClientClosedError(OctavoError):
    """The client was closed, before the call or while it ran."""

    def __init__(self) -> None:
        super().__init__(grpc.StatusCode.CANCELLED, "this client is closed", reason="CLIENT_CLOSED")


def from_rpc_error(error: grpc.aio.AioRpcError, timeout_s: float | None = None) -> OctavoError:
    """Return what `error` says, with the details that the server attached, if any.

    timeout_s  the call's own limit, which a deadline that passed is told by
    """
    status = status_pb2.Status()
    trailers: Any = error.trailing_metadata() or ()
    for key, value in trailers:
        if key == _STATUS_DETAILS:
            try:
                status.ParseFromString(value.encode() if isinstance(value, str) else value)
            except DecodeError:  # a proxy's own idea of details: the plain status still stands
                status.Clear()
    message = error.details() or error.code().name
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and timeout_s is not None and not status.details:
        message = f"took longer than timeout_s={timeout_s:g}"
    return _from_details(error.code(), message, status)


def from_status(serialized: bytes) -> OctavoError:
    """Return what a serialized google.rpc.Status says."""
    status = status_pb2.Status.FromString(serialized)
    code = next((code for code in grpc.StatusCode if code.value[0] == status.code), grpc.StatusCode.UNKNOWN)
    return _from_details(code, status.message or code.name, status)


def _from_details(code: grpc.StatusCode, message: str, status: status_pb2.Status) -> OctavoError:
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    request = error_details_pb2.RequestInfo()
    for detail in status.details:
        for known in (info, bad_request, retry, request):
            if detail.Is(known.DESCRIPTOR):
                detail.Unpack(known)
    delay = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    return OctavoError(
        code,
        message,
        reason=info.reason,
        metadata=dict(info.metadata),
        violations=tuple(Violation(v.field, v.description) for v in bad_request.field_violations),
        retry_after=delay if retry.HasField("retry_delay") else None,
        request_id=request.request_id,
    )
