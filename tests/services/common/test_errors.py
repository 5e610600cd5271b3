"""The table of reasons, and the status that is made of an error."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from octavo.services.common.errors import (
    CODES,
    DOMAIN,
    FieldViolation,
    Reason,
    Resource,
    ServingError,
    feature_disabled,
    invalid_fields,
    status_text,
    to_status,
    trailers,
)


def details_of(status: status_pb2.Status) -> dict[str, Any]:
    found = {}
    for packed in status.details:
        detail = getattr(error_details_pb2, packed.type_url.rsplit(".", 1)[-1])()
        packed.Unpack(detail)
        found[type(detail).__name__] = detail
    return found


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_a_code_and_its_status_names_reason_domain_and_request(reason: Reason) -> None:
    status = to_status(ServingError(reason, "what to change"), "req-1")

    details = details_of(status)
    assert status.code == CODES[reason].value[0]
    assert status.message == "what to change"
    assert (details["ErrorInfo"].reason, details["ErrorInfo"].domain) == (reason.value, DOMAIN)
    assert details["RequestInfo"].request_id == "req-1"


def test_no_error_is_ok_and_mid_stream_loss_invites_no_blind_retry() -> None:
    assert grpc.StatusCode.OK not in CODES.values()
    assert CODES[Reason.STREAM_INTERRUPTED] is grpc.StatusCode.ABORTED


def test_violations_resource_quota_feature_and_retry_become_details() -> None:
    fields = details_of(to_status(invalid_fields([FieldViolation("a.b", "fix it")]), "r"))["BadRequest"]
    missing = ServingError(Reason.MODEL_NOT_FOUND, "no", resource=Resource("model", "x"))
    resource = details_of(to_status(missing, "r"))["ResourceInfo"]
    quota = ServingError(Reason.QUOTA_EXCEEDED, "no", quota_subject="t", retry_after_ms=1500)
    quota_details = details_of(to_status(quota, "r"))
    feature = details_of(to_status(feature_disabled("media", "text only"), "r"))["PreconditionFailure"]

    assert [(v.field, v.description) for v in fields.field_violations] == [("a.b", "fix it")]
    assert (resource.resource_type, resource.resource_name) == ("model", "x")
    assert quota_details["QuotaFailure"].violations[0].subject == "t"
    assert quota_details["RetryInfo"].retry_delay.ToMilliseconds() == 1500
    assert (feature.violations[0].type, feature.violations[0].subject) == ("FEATURE", "media")


def test_a_retry_delay_is_also_a_pushback_trailer_and_without_one_there_is_none() -> None:
    with_delay = dict(trailers(ServingError(Reason.QUEUE_FULL, "full", retry_after_ms=900), "r"))
    without = dict(trailers(ServingError(Reason.INVALID_FIELD, "bad"), "r"))

    assert with_delay["grpc-retry-pushback-ms"] == "900"
    assert with_delay["x-request-id"] == "r"
    assert "grpc-retry-pushback-ms" not in without


def test_a_status_stays_below_four_kib_whatever_is_in_it() -> None:
    long = "ü" * 5000
    error = ServingError(
        Reason.INVALID_FIELD,
        long,
        metadata={f"{index}{long}": long for index in range(100)},
        violations=[FieldViolation(long, long)] * 100,
        resource=Resource("model", long),
        quota_subject=long,
        feature=long,
        retry_after_ms=1,
    )

    status = to_status(error, long)

    assert status.ByteSize() < 4096
    assert len(status.SerializeToString()) < 4096
    assert details_of(status)["ErrorInfo"].reason == "INVALID_FIELD"
    # Details travel in base64 and each byte of the message as three: gRPC drops what passes 8 KiB.
    assert len(status.SerializeToString()) * 4 / 3 + len(status_text(error).encode()) * 3 < 7500


def test_at_most_sixteen_violations_are_reported() -> None:
    error = invalid_fields([FieldViolation(f"f{index}", "x") for index in range(40)])

    assert len(details_of(to_status(error, "r"))["BadRequest"].field_violations) == 16


def test_an_error_of_another_process_keeps_code_and_reason_and_an_unknown_code_is_internal() -> None:
    error = ServingError.from_wire(8, "QUEUE_FULL", "full", 250, {"waiting": "9"})
    unknown = ServingError.from_wire(99, "", "?")
    ok = ServingError.from_wire(0, "X", "?")

    assert (error.code, error.reason, error.retry_after_ms) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", 250)
    assert error.metadata == {"waiting": "9"}
    assert (unknown.code, unknown.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert ok.code is grpc.StatusCode.INTERNAL


def test_what_a_client_does_about_each_reason_is_what_its_code_says() -> None:
    """Client libraries know codes: who is told UNAVAILABLE sends again, of INTERNAL and ABORTED nobody does."""
    reasons: dict[str, set[str]] = {}
    for reason, code in CODES.items():
        reasons.setdefault(code.name, set()).add(reason.value)

    assert reasons == {
        "INVALID_ARGUMENT": {
            "INVALID_FIELD", "MALFORMED_REQUEST", "CONTEXT_LENGTH_EXCEEDED", "KV_CAPACITY_EXCEEDED",
            "INVALID_CONSTRAINT",
        },
        "NOT_FOUND": {"MODEL_NOT_FOUND", "ADAPTER_NOT_FOUND", "REQUEST_NOT_FOUND"},
        "ALREADY_EXISTS": {"IDEMPOTENCY_CONFLICT"},
        "UNAUTHENTICATED": {"UNAUTHENTICATED"},
        "PERMISSION_DENIED": {"PERMISSION_DENIED"},
        "FAILED_PRECONDITION": {"FEATURE_DISABLED", "ADAPTER_NOT_LOADED", "PROTOCOL_REVISION"},
        "RESOURCE_EXHAUSTED": {"QUEUE_FULL", "DEADLINE_UNREACHABLE", "QUOTA_EXCEEDED"},
        "UNAVAILABLE": {"DRAINING", "SCHEDULER_UNREACHABLE", "NO_WORKERS"},
        "ABORTED": {"STREAM_INTERRUPTED", "TAKEN_OVER"},
        "DATA_LOSS": {"RESUME_STATE_LOST"},
        "DEADLINE_EXCEEDED": {"QUEUE_TIMEOUT", "GENERATION_TIMEOUT"},
        "CANCELLED": {"CLIENT_CANCELLED", "ADMIN_CANCELLED"},
        "INTERNAL": {"WORKER_FAULT", "QUARANTINED", "INTERNAL"},
    }  # fmt: skip
    assert set(CODES) == set(Reason)
