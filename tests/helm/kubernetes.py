"""Strict schemas of Kubernetes' own objects, by version: kubernetes_validate's, each read once."""

from __future__ import annotations

import functools
from typing import Any

import jsonschema
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource


@functools.cache
def _definitions(version: str) -> Registry[Any]:
    contents = schema_contents(f"kubernetes-json-schema/v{version}.0-local-strict/_definitions.json", version)
    return (Resource.from_contents(contents) @ Registry()).crawl()


@functools.cache
def _validator(api_version: str, kind: str, version: str) -> jsonschema.Draft202012Validator:
    group, _, number = api_version.rpartition("/")
    name = "-".join(part for part in (kind.lower(), group.split(".")[0], number) if part)
    schema = schema_contents(f"kubernetes-json-schema/v{version}.0-local-strict/{name}.json", version)
    return jsonschema.Draft202012Validator(schema, registry=Resource.from_contents(schema) @ _definitions(version))


def check(manifest: dict[str, Any], version: str) -> None:
    """Raise jsonschema.ValidationError if a Kubernetes of that version knows no such object."""
    _validator(manifest["apiVersion"], manifest["kind"], version).validate(manifest)
