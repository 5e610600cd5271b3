"""Checks of objects that Kubernetes itself does not know.

Where a package has the models of their authors, an object must survive being read and written by
them: what they do not know is lost, and so found. For the others a schema here has what the chart
uses of Gateway API 1.4 and LeaderWorkerSet 0.8.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable
from typing import Any

import jsonschema

from . import kubernetes


def _model(module: str, name: str) -> Callable[[dict[str, Any]], None]:
    def check(manifest: dict[str, Any]) -> None:
        model = getattr(importlib.import_module(f"cloudcoil.models.{module}"), name)
        read = model.model_validate_json(json.dumps(manifest))
        assert json.loads(read.model_dump_json(by_alias=True, exclude_unset=True)) == manifest

    return check


def _closed(required: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object", "additionalProperties": False, "required": required.split(), "properties": properties
    }  # fmt: skip


def _list(items: dict[str, Any], most: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1, "maxItems": most}


_NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"}
_PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
_COUNT = {"type": "integer", "minimum": 0}
_DURATION = {"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
_PARENT = _closed(
    "name", group=_NAME, kind={"type": "string"}, name=_NAME, namespace=_NAME, sectionName=_NAME, port=_PORT
)
_BACKEND = _closed("name port", name=_NAME, port=_PORT, namespace=_NAME, weight=_COUNT)
_GRPC_METHOD = _closed(
    "",
    type={"enum": ["Exact", "RegularExpression"]},
    service={"type": "string", "pattern": r"^[A-Za-z_][A-Za-z_0-9]*(\.[A-Za-z_][A-Za-z_0-9]*)*$"},
    method={"type": "string", "pattern": "^[A-Za-z_][A-Za-z_0-9]*$"},
)
_PATH = _closed("type value", type={"enum": ["Exact", "PathPrefix"]}, value={"type": "string", "pattern": "^/"})
_HEADERS = _list(_closed("name value", name={"type": "string"}, value={"type": "string", "minLength": 1}), 16)
_COUNT_OR_PERCENT = {"anyOf": [_COUNT, {"type": "string", "pattern": "^[0-9]+%$"}]}
_TARGET = _closed("group kind name", group={"type": "string"}, kind={"type": "string"}, name=_NAME)
_TIMEOUTS = _closed("", request=_DURATION, backendRequest=_DURATION)


def _route(match: dict[str, Any], **more: Any) -> dict[str, Any]:
    rule = _closed("backendRefs", matches=_list(match, 8), backendRefs=_list(_BACKEND, 16), **more)
    return _closed("parentRefs rules", parentRefs=_list(_PARENT, 32), hostnames=_list(_NAME, 16), rules=_list(rule, 16))


_POD = _closed("metadata spec", metadata={"type": "object"}, spec={"type": "object"})
_SPECS = {
    "GRPCRoute": _route(_closed("method", method=_GRPC_METHOD, headers=_HEADERS)),
    "HTTPRoute": _route(_closed("path", path=_PATH, headers=_HEADERS), timeouts=_TIMEOUTS),
    "BackendTrafficPolicy": _closed(
        "targetRefs",
        targetRefs=_list(_TARGET, 16),
        timeout=_closed("", http=_closed("", requestTimeout=_DURATION)),
    ),
    "GCPBackendPolicy": _closed(
        "default targetRef",
        targetRef=_TARGET,
        default=_closed("", timeoutSec={"type": "integer", "maximum": 2147483647}),
    ),
    "LeaderWorkerSet": _closed(
        "leaderWorkerTemplate",
        replicas=_COUNT,
        startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
        rolloutStrategy=_closed(
            "type",
            type={"const": "RollingUpdate"},
            rollingUpdateConfiguration=_closed(
                "", maxUnavailable=_COUNT_OR_PERCENT, maxSurge=_COUNT_OR_PERCENT, partition=_COUNT
            ),
        ),
        leaderWorkerTemplate=_closed(
            "workerTemplate size",
            size={"type": "integer", "minimum": 1},
            restartPolicy={"enum": ["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]},
            leaderTemplate=_POD,
            workerTemplate=_POD,
        ),
    ),
}


@functools.cache
def _validator(kind: str) -> jsonschema.Draft202012Validator:
    schema = _closed(
        "apiVersion kind metadata spec",
        apiVersion={"type": "string"}, kind={"const": kind}, metadata={"type": "object"}, spec=_SPECS[kind],
    )  # fmt: skip
    return jsonschema.Draft202012Validator(schema)


def _own(manifest: dict[str, Any]) -> None:
    error = next(_validator(manifest["kind"]).iter_errors(manifest), None)
    assert error is None, f"{error.json_path}: {error.message}"
    templates = manifest["spec"].get("leaderWorkerTemplate", {})
    for name in ("leaderTemplate", "workerTemplate"):
        if name in templates:
            pod = {"apiVersion": "v1", "kind": "Pod", **templates[name]}
            kubernetes.check(pod, "1.37")


# By (API group, kind).
CHECKS: dict[tuple[str, str], Callable[[dict[str, Any]], None]] = {
    ("gateway.networking.k8s.io", "GRPCRoute"): _own,
    ("gateway.networking.k8s.io", "HTTPRoute"): _own,
    ("leaderworkerset.x-k8s.io", "LeaderWorkerSet"): _own,
    ("gateway.envoyproxy.io", "BackendTrafficPolicy"): _own,
    ("networking.gke.io", "GCPBackendPolicy"): _own,
    ("keda.sh", "ScaledObject"): _model("keda.v1alpha1", "ScaledObject"),
    ("cert-manager.io", "Certificate"): _model("cert_manager.v1", "Certificate"),
    ("monitoring.coreos.com", "PodMonitor"): _model("prometheus_operator.v1", "PodMonitor"),
    ("monitoring.coreos.com", "ServiceMonitor"): _model("prometheus_operator.v1", "ServiceMonitor"),
    ("monitoring.coreos.com", "PrometheusRule"): _model("prometheus_operator.v1", "PrometheusRule"),
}
