"""Writes what the chart has from the code: values.schema.json, README.md and the lists of RPCs.

The descriptions and defaults of values come from values.yaml, those of the processes' settings from
their configuration classes. `--check` writes nothing and fails if a file is not current.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from octavo.gpu_worker.config import WorkerConfig
from octavo.inference import v1
from octavo.services.common.config import Setting, settings_of
from octavo.services.gateway.config import GatewayConfig
from octavo.services.scheduler.config import SchedulerConfig

CHART = Path(__file__).resolve().parent / "octavo"
PROCESSES = {"gateway": GatewayConfig, "scheduler": SchedulerConfig, "worker": WorkerConfig}
SECURITY = {"hop_certificate", "hop_key", "hop_ca", "tls_certificate", "tls_key", "tls_client_ca"}
# What the chart sets itself, from other values.
OWNED = {
    "gateway": SECURITY
    | {
        "model", "model_name", "grpc_address", "local_address", "scheduler_addresses", "admin_address", "http_address",
        "health_address", "metrics_address", "gateway_id", "resume_key_file", "grace_s", "api_keys", "jwt_jwks",
        "admin_keys", "batch_dir", "progress_fd",
    },
    "scheduler": SECURITY
    | {
        "scheduler_address", "worker_endpoint", "worker_curve_key", "worker_curve_allowed", "admin_address",
        "admin_keys", "trusted_network",
        "health_address", "metrics_address", "scheduler_id", "grace_s", "tenants_file", "progress_fd",
    },
    "worker": {
        "model", "worker_endpoint", "curve_key", "curve_server_key", "worker_id", "group_id", "rank", "world_size",
        "local_ranks", "node_rank", "rendezvous", "alive_file", "drain_s", "packed_cache_dir", "metrics_address",
        "progress_fd",
    },
}  # fmt: skip
SIZE = "^[0-9]+(\\.[0-9]+)? ?([kKmMgGtT]i?)?[bB]?$"
TIME = "^[0-9]+(\\.[0-9]+)? ?(us|ms|s|m|h)$"
COUNT = {"type": "number", "minimum": 0}
WEIGHT = {"type": "number", "exclusiveMinimum": 0}
QUANTITY = "^[0-9]+(\\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"


@dataclass
class Value:
    """A value of the chart as values.yaml has it. A map with documented keys has children."""

    path: tuple[str, ...]
    default: Any
    description: str = ""
    schema: dict[str, Any] = field(default_factory=dict)
    children: list[Value] = field(default_factory=list)


def read_values(text: str) -> list[Value]:
    """Return the top-level values, with what the comments above their keys say."""
    defaults = yaml.safe_load(text)
    top: list[Value] = []
    parents: list[tuple[int, Value]] = []  # by indentation
    description, schema = "", dict[str, Any]()
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("# -- "):
            description = stripped.removeprefix("# -- ")
        elif stripped.startswith("# @schema "):
            schema = yaml.safe_load(stripped.removeprefix("# @schema "))
        elif match := re.match(r"( *)([A-Za-z]\w*):", line):
            indent = len(match[1])
            while parents and parents[-1][0] >= indent:
                parents.pop()
            parent = parents[-1][1] if parents else None
            if parent is not None and parent.schema:
                continue  # a map that is described as a whole
            path = (*(parent.path if parent else ()), match[2])
            default = defaults
            for key in path:
                default = default[key]
            value = Value(path, default, description, schema)
            (parent.children if parent else top).append(value)
            parents.append((indent, value))
            description, schema = "", dict[str, Any]()
    return top


def value_schema(value: Value) -> dict[str, Any]:
    """Return the JSON schema of a value."""
    own: dict[str, Any] = {"description": value.description} if value.description else {}
    if "$ref" in value.schema:
        return own | value.schema
    if isinstance(value.default, dict):
        assert value.children, f"{'.'.join(value.path)} needs a @schema"
        return own | closed({child.path[-1]: value_schema(child) for child in value.children})
    kinds = {bool: "boolean", int: "integer", str: "string", list: "array"}
    assert value.description, f"{'.'.join(value.path)} is not described"
    return own | {"type": kinds[type(value.default)]} | value.schema


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a map without other keys."""
    return {"type": "object", "additionalProperties": False, "properties": properties}


def setting_schema(setting: Setting) -> dict[str, Any]:
    """Return the JSON schema of a process's setting."""
    schema: dict[str, Any] = {"description": setting.help}
    number = "integer" if setting.type is int else "number"
    if setting.choices:
        return schema | {"enum": list(setting.choices)}
    if setting.kind:
        pattern = SIZE if setting.kind == "bytes" else TIME
        return schema | {"anyOf": [{"type": number, "minimum": 0}, {"type": "string", "pattern": pattern}]}
    if setting.type is tuple:
        return schema | {"type": "array", "items": {"type": "string", "minLength": 1}}
    if setting.type is bool:
        return schema | {"type": "boolean"}
    return schema | ({"type": number} if setting.type in (int, float) else {"type": "string"})


def settings(process: str) -> list[Setting]:
    """Return the settings of a process that a user of the chart may set."""
    return [each for each in settings_of(PROCESSES[process]) if each.name not in OWNED[process]]


def definitions() -> dict[str, Any]:
    """Return the schemas that values refer to."""
    amounts = closed({})
    amounts["additionalProperties"] = {"$ref": "#/$defs/amount"}
    return {
        "strings": {"type": "object", "additionalProperties": {"type": "string"}},
        "object": {"type": "object"},
        "objects": {"type": "array", "items": {"type": "object"}},
        "seconds": {"type": "integer", "minimum": 0, "maximum": 86400},
        "quantity": {"type": "string", "pattern": QUANTITY},
        "amount": {"anyOf": [{"type": "integer", "minimum": 0}, {"$ref": "#/$defs/quantity"}]},
        "intOrPercent": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^[0-9]+%$"}]},
        "resources": closed({"requests": amounts, "limits": amounts, "claims": {"$ref": "#/$defs/objects"}}),
        "tenant": closed({"maxRequests": COUNT, "tokensPerSecond": COUNT, "weight": WEIGHT}),
        "tenants": {"type": "object", "additionalProperties": {"$ref": "#/$defs/tenant"}},
        "alertLimits": closed(dict.fromkeys(alert_limits(), WEIGHT)),
        "image": closed(
            {
                "repository": {"type": "string", "pattern": "^([a-z0-9.-]+(:[0-9]+)?/)?[a-z0-9._/-]*$"},
                "tag": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{0,128}$"},
                "digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
            }
        ),
    } | {
        f"{process}Settings": closed({name: setting_schema(each) for each in settings(process) for name in each.names})
        for process in PROCESSES
    }


def alert_limits() -> list[str]:
    """Return the names of the limits that alerts have, which values may set."""
    groups = yaml.safe_load((CHART / "files/rules.yaml").read_text())["groups"]
    names = [rule.get("record", "") for group in groups for rule in group["rules"]]
    return [name.removeprefix("octavo:limit:") for name in names if name.startswith("octavo:limit:")]


def schema_text(values: list[Value]) -> str:
    """Return values.schema.json."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    # `global` is what Helm itself hands to every chart.
    properties = {value.path[0]: value_schema(value) for value in values} | {"global": {"type": "object"}}
    return json.dumps(schema | closed(properties) | {"$defs": definitions()}, indent=1) + "\n"


def rpcs_text() -> str:
    """Return which RPCs a GRPCRoute lets through: those of the public API and health checks."""
    modules = [info.name for info in pkgutil.iter_modules(v1.__path__) if info.name.endswith("_pb2")]
    files = [importlib.import_module(f"{v1.__name__}.{name}").DESCRIPTOR for name in sorted(modules)]
    public = [service for file in files for service in file.services_by_name.values()]
    names = {service.full_name: [method.name for method in service.methods] for service in public}
    names["grpc.health.v1.Health"] = ["Check", "Watch"]
    return "# Made by helm/generate.py.\n" + yaml.safe_dump(names, sort_keys=False)


def readme_text(values: list[Value], template: str) -> str:
    """Return README.md: the template with the tables in it."""
    rows = ["| value | default | what it is |", "| --- | --- | --- |", *value_rows(values)]
    tables = []
    for process in PROCESSES:
        tables += ["", f"`octavo {process}`:", "", "| setting | default | what it is |", "| --- | --- | --- |"]
        tables += [f"| `{each.name}` | {code(each.default_text())} | {cell(each.help)} |" for each in settings(process)]
    text = template.replace("<!-- values -->", "\n".join(rows))
    return text.replace("<!-- settings -->", "\n".join(tables).strip())


def value_rows(values: list[Value]) -> list[str]:
    """Return the table's rows of values."""
    rows = []
    for value in values:
        if value.children:
            rows += value_rows(value.children)
        else:
            default = json.dumps(value.default) if value.default != "" else ""
            rows.append(f"| `{'.'.join(value.path)}` | {code(default)} | {cell(value.description)} |")
    return rows


def code(text: str) -> str:
    """Return text as code, or nothing."""
    return f"`{text}`" if text else ""


def cell(text: str) -> str:
    """Return text that may stand in a table."""
    return text.replace("|", "\\|")


def main() -> int:
    """Write the files, or compare them."""
    values = read_values((CHART / "values.yaml").read_text())
    files = {
        CHART / "values.schema.json": schema_text(values),
        CHART / "files/rpcs.yaml": rpcs_text(),
        CHART / "README.md": readme_text(values, (CHART / "README.md.tmpl").read_text()),
    }
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path} is not current: run python helm/generate.py", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(files[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
