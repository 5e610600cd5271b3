"""What a client or a network may do wrong: one exception, one table of reasons, one status format.

Every error that leaves a process is a google.rpc.Status with an ErrorInfo of our domain, so that a
client can tell our RESOURCE_EXHAUSTED from gRPC's own, and with the id of the request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "octavo"
MAX_VIOLATIONS = 16
# gRPC replaces a status whose metadata passes 8 KiB, and details travel in base64.
_MAX_STATUS_BYTES = 4000
_MAX_MESSAGE_BYTES = 512
_MAX_TEXT_BYTES = 200
_MAX_TOKEN_BYTES = 1024  # a token that is cut is worth nothing
_MAX_METADATA = 6


class Reason(StrEnum):
    """Why a call failed, for programs: ErrorInfo.reason."""

    INVALID_FIELD = "INVALID_FIELD"
    MALFORMED_REQUEST = "MALFORMED_REQUEST"
    CONTEXT_LENGTH_EXCEEDED = "CONTEXT_LENGTH_EXCEEDED"
    KV_CAPACITY_EXCEEDED = "KV_CAPACITY_EXCEEDED"
    INVALID_CONSTRAINT = "INVALID_CONSTRAINT"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    ADAPTER_NOT_FOUND = "ADAPTER_NOT_FOUND"
    REQUEST_NOT_FOUND = "REQUEST_NOT_FOUND"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    FEATURE_DISABLED = "FEATURE_DISABLED"
    ADAPTER_NOT_LOADED = "ADAPTER_NOT_LOADED"
    PROTOCOL_REVISION = "PROTOCOL_REVISION"
    IDEMPOTENCY_CONFLICT = "IDEMPOTENCY_CONFLICT"
    QUEUE_FULL = "QUEUE_FULL"
    DEADLINE_UNREACHABLE = "DEADLINE_UNREACHABLE"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
    DRAINING = "DRAINING"
    SCHEDULER_UNREACHABLE = "SCHEDULER_UNREACHABLE"
    NO_WORKERS = "NO_WORKERS"
    STREAM_INTERRUPTED = "STREAM_INTERRUPTED"
    TAKEN_OVER = "TAKEN_OVER"
    RESUME_STATE_LOST = "RESUME_STATE_LOST"
    QUEUE_TIMEOUT = "QUEUE_TIMEOUT"
    GENERATION_TIMEOUT = "GENERATION_TIMEOUT"
    CLIENT_CANCELLED = "CLIENT_CANCELLED"
    ADMIN_CANCELLED = "ADMIN_CANCELLED"
    WORKER_FAULT = "WORKER_FAULT"
    QUARANTINED = "QUARANTINED"
    INTERNAL = "INTERNAL"


CODES: Mapping[Reason, grpc.StatusCode] = {
    # The request is wrong: sending it again does not help.
    Reason.INVALID_FIELD: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.MALFORMED_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.CONTEXT_LENGTH_EXCEEDED: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.KV_CAPACITY_EXCEEDED: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.INVALID_CONSTRAINT: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.MODEL_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.ADAPTER_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.REQUEST_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.IDEMPOTENCY_CONFLICT: grpc.StatusCode.ALREADY_EXISTS,
    # The caller is not who may do this.
    Reason.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.PERMISSION_DENIED: grpc.StatusCode.PERMISSION_DENIED,
    # The operator has to change something.
    Reason.FEATURE_DISABLED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.ADAPTER_NOT_LOADED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.PROTOCOL_REVISION: grpc.StatusCode.FAILED_PRECONDITION,
    # Too much at once: back off, for as long as RetryInfo says.
    Reason.QUEUE_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.DEADLINE_UNREACHABLE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.QUOTA_EXCEEDED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    # Nothing has been sent yet: a client retries by itself.
    Reason.DRAINING: grpc.StatusCode.UNAVAILABLE,
    Reason.SCHEDULER_UNREACHABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.NO_WORKERS: grpc.StatusCode.UNAVAILABLE,
    # ABORTED, not UNAVAILABLE, in the middle of a stream: no policy may replay it blindly.
    Reason.STREAM_INTERRUPTED: grpc.StatusCode.ABORTED,
    # Another call goes on with the output: this one is not to be resumed.
    Reason.TAKEN_OVER: grpc.StatusCode.ABORTED,
    Reason.RESUME_STATE_LOST: grpc.StatusCode.DATA_LOSS,
    Reason.QUEUE_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.GENERATION_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.CLIENT_CANCELLED: grpc.StatusCode.CANCELLED,
    Reason.ADMIN_CANCELLED: grpc.StatusCode.CANCELLED,
    Reason.WORKER_FAULT: grpc.StatusCode.INTERNAL,
    Reason.QUARANTINED: grpc.StatusCode.INTERNAL,
    Reason.INTERNAL: grpc.StatusCode.INTERNAL,
}
"""The one table: which code each reason has."""

_CODE_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field that breaks a rule. `description` says what to change."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class Resource:
    """A thing that was not found: its kind, for example "model", and its name."""

    type: str
    name: str


class ServingError(Exception):
    """A failure that is no bug. The interceptor makes a status of it; nothing else does.

    `reason` is a Reason, or the word another process sent, and then `code` must be given.
    `retry_after_ms` above 0 tells the client when to try again.
    """

    def __init__(
        self,
        reason: Reason | str,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[FieldViolation] = (),
        resource: Resource | None = None,
        quota_subject: str = "",
        feature: str = "",
        retry_after_ms: int = 0,
    ) -> None:
        super().__init__(message)
        self.reason = str(reason)
        self.message = message
        self.code = code if code is not None else CODES[Reason(reason)]
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.resource = resource
        self.quota_subject = quota_subject
        self.feature = feature
        self.retry_after_ms = retry_after_ms

    @property
    def code_number(self) -> int:
        """The code as a google.rpc.Code, for messages between our processes."""
        number: int = self.code.value[0]
        return number

    @classmethod
    def from_wire(
        cls, code: int, reason: str, message: str, retry_after_ms: int = 0, metadata: Mapping[str, str] | None = None
    ) -> ServingError:
        """Return the error another of our processes described; an unknown code becomes INTERNAL."""
        known = _CODE_BY_NUMBER.get(code, grpc.StatusCode.INTERNAL)
        if known is grpc.StatusCode.OK:
            known = grpc.StatusCode.INTERNAL
        quota_subject = "tenant" if reason == Reason.QUOTA_EXCEEDED else ""
        return cls(
            reason or Reason.INTERNAL,
            message,
            code=known,
            metadata=metadata,
            quota_subject=quota_subject,
            retry_after_ms=retry_after_ms,
        )


def invalid_fields(violations: Sequence[FieldViolation]) -> ServingError:
    """Return the error for fields that break rules; there must be at least one."""
    assert violations, "an error without a violation"
    first = violations[0]
    message = f"{first.field}: {first.description}"
    if len(violations) > 1:
        message += f" (and {len(violations) - 1} more, see the BadRequest detail)"
    return ServingError(Reason.INVALID_FIELD, message, violations=violations)


def invalid_field(field: str, description: str) -> ServingError:
    """Return the error for one field that breaks a rule."""
    return invalid_fields([FieldViolation(field, description)])


def feature_disabled(feature: str, message: str, field: str = "") -> ServingError:
    """Return the error for something that this server does not do; `message` says what instead."""
    violations = [FieldViolation(field, message)] if field else []
    return ServingError(Reason.FEATURE_DISABLED, message, feature=feature, violations=violations)


def _short(text: str, limit: int = _MAX_TEXT_BYTES) -> str:
    """Return `text`, cut to `limit` bytes of UTF-8 and fit for a protobuf string."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return data.decode()
    return data[: limit - 3].decode("utf-8", "ignore") + "..."


def _details(error: ServingError, request_id: str, num_violations: int) -> list[Any]:
    """Return the detail messages of an error, most important first."""
    metadata = {
        _short(key, 64): _short(value, _MAX_TOKEN_BYTES if key == "resume_token" else _MAX_TEXT_BYTES)
        for key, value in list(error.metadata.items())[:_MAX_METADATA]
    }
    details: list[Any] = [
        error_details_pb2.ErrorInfo(reason=_short(error.reason, 64), domain=DOMAIN, metadata=metadata),
        error_details_pb2.RequestInfo(request_id=_short(request_id)),
    ]
    if error.retry_after_ms > 0:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(error.retry_after_ms)
        details.append(retry)
    if error.resource is not None:
        name = _short(error.resource.name)
        details.append(error_details_pb2.ResourceInfo(resource_type=error.resource.type, resource_name=name))
    if error.quota_subject:
        quota = error_details_pb2.QuotaFailure()
        quota.violations.add(subject=_short(error.quota_subject), description=_short(error.message))
        details.append(quota)
    if error.feature:
        precondition = error_details_pb2.PreconditionFailure()
        precondition.violations.add(
            type="FEATURE", subject=_short(error.feature, 64), description=_short(error.message)
        )
        details.append(precondition)
    if num_violations:
        bad = error_details_pb2.BadRequest()
        for violation in error.violations[:num_violations]:
            bad.field_violations.add(field=_short(violation.field), description=_short(violation.description))
        details.append(bad)
    return details


def to_status(error: ServingError, request_id: str) -> status_pb2.Status:
    """Return the status that clients see: always an ErrorInfo and a RequestInfo, below 4 KiB.

    At most 16 field violations are reported, fewer if their texts are long.
    """
    num_violations = min(len(error.violations), MAX_VIOLATIONS)
    while True:
        status = status_pb2.Status(code=error.code_number, message=status_text(error))
        for detail in _details(error, request_id, num_violations):
            packed: any_pb2.Any = status.details.add()
            packed.Pack(detail)
        if status.ByteSize() <= _MAX_STATUS_BYTES or num_violations == 0:
            return status
        num_violations -= 1


def status_text(error: ServingError) -> str:
    """Return the message as it may travel beside the details: gRPC writes each byte above ASCII as three."""
    return _short(error.message, _MAX_MESSAGE_BYTES)


def trailers(error: ServingError, request_id: str) -> tuple[tuple[str, str | bytes], ...]:
    """Return the trailing metadata of an error: details, request id and, if there is one, the retry delay."""
    pairs: list[tuple[str, str | bytes]] = [
        ("grpc-status-details-bin", to_status(error, request_id).SerializeToString()),
        ("x-request-id", request_id),
    ]
    if error.retry_after_ms > 0:
        pairs.append(("grpc-retry-pushback-ms", str(error.retry_after_ms)))
    return tuple(pairs)
