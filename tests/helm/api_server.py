"""A stand-in for the Kubernetes API server: as much of it as Helm needs to install, upgrade, roll back and uninstall.

It keeps objects, applies what is sent, lets clients watch, and marks workloads ready a moment after
they changed, as controllers would. It validates nothing: the schemas in `kubernetes.py` do.
"""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from aiohttp import web

Object = dict[str, Any]

# Group and version, and the kinds in it by their plural.
KINDS = {
    "v1": {
        "secrets": "Secret", "services": "Service", "serviceaccounts": "ServiceAccount", "configmaps": "ConfigMap",
        "persistentvolumeclaims": "PersistentVolumeClaim", "pods": "Pod",
    },
    "apps/v1": {"deployments": "Deployment", "statefulsets": "StatefulSet", "replicasets": "ReplicaSet"},
    "batch/v1": {"jobs": "Job"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy"},
    "autoscaling/v2": {"horizontalpodautoscalers": "HorizontalPodAutoscaler"},
    "keda.sh/v1alpha1": {"scaledobjects": "ScaledObject"},
}  # fmt: skip
READY_AFTER_S = 0.05


class ApiServer:
    """The objects, by collection and name. Everything runs on one event loop."""

    def __init__(self, version: str) -> None:
        self._version = version
        self.objects: dict[tuple[str, str], Object] = {}
        self._events: list[tuple[str, str, Object]] = []  # (collection, type, object); the place is the version
        self._changed = asyncio.Condition()
        self._ready_tasks: set[asyncio.Task[None]] = set()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=16 << 20)
        app.router.add_get("/version", self._version_info)
        app.router.add_get("/{tail:(api|apis)}", self._groups)
        app.router.add_get("/{prefix:(api|apis/[^/]+)}/{version:v[0-9a-z]+}", self._resources)
        place = "/{prefix:(api|apis/[^/]+)}/{version:v[0-9a-z]+}/namespaces/{namespace}/{plural}"
        app.router.add_get(place, self._list_or_watch)
        app.router.add_post(place, self._create)
        app.router.add_get(place + "/{name}", self._get)
        app.router.add_put(place + "/{name}", self._replace)
        app.router.add_patch(place + "/{name}", self._patch)
        app.router.add_delete(place + "/{name}", self._delete)
        return app

    # -- discovery

    async def _version_info(self, _: web.Request) -> web.Response:
        major, minor = self._version.split(".")
        return web.json_response({"major": major, "minor": minor, "gitVersion": f"v{self._version}.0"})

    async def _groups(self, request: web.Request) -> web.Response:
        if request.path == "/api":
            return web.json_response({"kind": "APIVersions", "versions": ["v1"]})
        groups = []
        for name in KINDS:
            if "/" in name:
                group, version = name.split("/")
                entry = {"groupVersion": name, "version": version}
                groups.append({"name": group, "versions": [entry], "preferredVersion": entry})
        return web.json_response({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})

    async def _resources(self, request: web.Request) -> web.Response:
        name = _group_version(request)
        verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
        resources = [
            {
                "name": plural,
                "singularName": kind.lower(),
                "namespaced": True,
                "kind": kind,
                "verbs": verbs,
            }
            for plural, kind in KINDS.get(name, {}).items()
        ]
        return web.json_response({"kind": "APIResourceList", "groupVersion": name, "resources": resources})

    # -- objects

    async def _get(self, request: web.Request) -> web.Response:
        found = self.objects.get(_key(request))
        return web.json_response(found) if found else _status(404, "NotFound", request.path)

    async def _create(self, request: web.Request) -> web.Response:
        created = _decode(await request.read(), request.content_type)
        collection, _ = _key(request)
        if (collection, created["metadata"]["name"]) in self.objects:
            return _status(409, "AlreadyExists", request.path)
        return web.json_response(await self._store(request, created, "ADDED"), status=201)

    async def _replace(self, request: web.Request) -> web.Response:
        if _key(request) not in self.objects:
            return _status(404, "NotFound", request.path)
        return await self._change(request, _decode(await request.read(), request.content_type))

    async def _patch(self, request: web.Request) -> web.Response:
        patch = yaml.safe_load(await request.text())
        old = self.objects.get(_key(request))
        if request.content_type == "application/apply-patch+yaml":
            assert request.query["fieldManager"]
            if old is not None:
                return await self._change(request, patch | {"status": old.get("status", {})})
            return web.json_response(await self._store(request, patch, "ADDED"), status=201)
        if old is None:
            return _status(404, "NotFound", request.path)
        return await self._change(request, _merge(old, patch))

    async def _delete(self, request: web.Request) -> web.Response:
        key = _key(request)
        gone = self.objects.pop(key, None)
        if gone is None:
            return _status(404, "NotFound", request.path)
        await self._announce(key[0], "DELETED", gone)
        return web.json_response({"kind": "Status", "apiVersion": "v1", "status": "Success"})

    async def _change(self, request: web.Request, new: Object) -> web.Response:
        """Keep a changed object, unless what changed cannot be."""
        kind = KINDS[_group_version(request)][request.match_info["plural"]]
        old = self.objects[_key(request)]
        fixed = immutable_changes(kind, old, new)
        if fixed:
            what = f"{kind} {old['metadata']['name']}: {fixed[0]}: field is immutable"
            return _status(422, "Invalid", what)
        return web.json_response(await self._store(request, new, "MODIFIED"))

    async def _store(self, request: web.Request, new: Object, event: str) -> Object:
        """Keep an object as a server would, and tell those who watch."""
        name = _group_version(request)
        plural = request.match_info["plural"]
        new = {"apiVersion": name, "kind": KINDS[name][plural], **new}
        metadata = new["metadata"]
        metadata["namespace"] = request.match_info["namespace"]
        key = (_key(request)[0], metadata["name"])
        old = self.objects.get(key)
        metadata.setdefault("uid", f"uid-{len(self._events)}")
        same = old is not None and old.get("spec") == new.get("spec")
        before = 0 if old is None else old["metadata"]["generation"]
        metadata["generation"] = before if same else before + 1
        self.objects[key] = new
        await self._announce(key[0], event, new)
        task = asyncio.create_task(self._make_ready(key))
        self._ready_tasks.add(task)
        task.add_done_callback(self._ready_tasks.discard)
        return new

    async def _make_ready(self, key: tuple[str, str]) -> None:
        """Do what controllers do, after a moment."""
        await asyncio.sleep(READY_AFTER_S)
        it = self.objects.get(key)
        status = None if it is None else STATUSES.get(it["kind"], lambda _: None)(it)
        if it is not None and status is not None and status != it.get("status"):
            self.objects[key] = it = it | {"status": status}
            await self._announce(key[0], "MODIFIED", it)

    async def _announce(self, collection: str, event: str, it: Object) -> None:
        it["metadata"]["resourceVersion"] = str(len(self._events) + 1)
        async with self._changed:
            self._events.append((collection, event, json.loads(json.dumps(it))))
            self._changed.notify_all()

    # -- lists and watches

    async def _list_or_watch(self, request: web.Request) -> web.StreamResponse:
        collection, _ = _key(request)
        matches = _selector(request)
        if request.query.get("watch") in ("1", "true"):
            return await self._watch(request, collection, matches)
        items = [it for (place, _), it in self.objects.items() if place == collection and matches(it)]
        kind = KINDS[_group_version(request)][request.match_info["plural"]]
        return web.json_response(
            {
                "kind": f"{kind}List",
                "apiVersion": _group_version(request),
                "metadata": {"resourceVersion": str(len(self._events))},
                "items": items,
            }
        )

    async def _watch(
        self, request: web.Request, collection: str, matches: Callable[[Object], bool]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        async for event, it in self._changes(request, collection):
            if event == "BOOKMARK" or matches(it):
                await response.write(json.dumps({"type": event, "object": it}).encode() + b"\n")
        return response

    async def _changes(self, request: web.Request, collection: str) -> AsyncIterator[tuple[str, Object]]:
        """Yield what happens in a collection, first what is there if that is asked for."""
        seen = int(request.query.get("resourceVersion") or len(self._events))
        if request.query.get("sendInitialEvents") == "true":
            seen = len(self._events)
            for (place, _), it in list(self.objects.items()):
                if place == collection:
                    yield "ADDED", it
            name = _group_version(request)
            yield (
                "BOOKMARK",
                {
                    "kind": KINDS[name][request.match_info["plural"]],
                    "apiVersion": name,
                    "metadata": {
                        "resourceVersion": str(seen),
                        "annotations": {"k8s.io/initial-events-end": "true"},
                    },
                },
            )
        while True:
            async with self._changed:
                while len(self._events) == seen:
                    await self._changed.wait()
            news = self._events[seen:]
            seen += len(news)
            for place, event, it in news:
                if place == collection:
                    yield event, it


def _workload(it: Object) -> Object:
    count = it["spec"].get("replicas", 1)
    return {
        "observedGeneration": it["metadata"]["generation"],
        "replicas": count, "updatedReplicas": count, "readyReplicas": count, "availableReplicas": count,
        "currentReplicas": count, "currentRevision": "r", "updateRevision": "r",
        "conditions": [
            {"type": "Available", "status": "True"},
            {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable"},
        ],
    }  # fmt: skip


STATUSES: dict[str, Callable[[Object], Object | None]] = {
    "Deployment": _workload,
    "StatefulSet": _workload,
    "PersistentVolumeClaim": lambda _: {"phase": "Bound"},
    "Job": lambda _: {"succeeded": 1, "conditions": [{"type": "Complete", "status": "True"}]},
}


def _same(old: Any, new: Any) -> bool:
    return bool(old == new)


def _at(it: Object, path: str) -> Any:
    """Return what is at a path such as spec.selector; `spec-a,b` is the spec without a and b."""
    path, _, without = path.partition("-")
    place: Any = it
    for key in path.split("."):
        place = (place or {}).get(key)
    return {key: value for key, value in (place or {}).items() if key not in without.split(",")} if without else place


def immutable_changes(kind: str, old: Object, new: Object) -> list[str]:
    """Return what of an object would change that a real server lets nobody change."""
    return [path for path, same in IMMUTABLE.get(kind, {}).items() if not same(_at(old, path), _at(new, path))]


# By kind: what a real server refuses to change, and whether two values count as the same. From Kubernetes' own
# validation (ValidateStatefulSetUpdate and its like), as far as the chart has such fields.
IMMUTABLE: dict[str, dict[str, Callable[[Any, Any], bool]]] = {
    "Deployment": {"spec.selector": _same},
    "StatefulSet": {
        "spec-replicas,ordinals,template,updateStrategy,persistentVolumeClaimRetentionPolicy,minReadySeconds,"
        "revisionHistoryLimit": _same,
    },
    "Job": {"spec.template": _same, "spec.selector": _same, "spec.completionMode": _same},
    "PersistentVolumeClaim": {"spec-resources": _same},
    "Service": {"spec.clusterIP": lambda old, new: _same(old, new) or not old},
    "Secret": {"type": _same},
}


def _group_version(request: web.Request) -> str:
    prefix = request.match_info["prefix"].removeprefix("apis/").removeprefix("api")
    return "/".join(part for part in (prefix, request.match_info["version"]) if part)


def _key(request: web.Request) -> tuple[str, str]:
    where = request.match_info
    return f"{_group_version(request)}/{where['plural']}/{where['namespace']}", where.get("name", "")


def _status(code: int, reason: str, what: str) -> web.Response:
    status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code}
    return web.json_response(status | {"message": f"{what}: {reason}", "details": {}}, status=code)


def _merge(old: Any, patch: Any) -> Any:
    """Return a JSON merge patch's result (RFC 7386)."""
    if not isinstance(patch, dict) or not isinstance(old, dict):
        return patch
    merged = {key: value for key, value in old.items() if key not in patch or patch[key] is not None}
    return merged | {key: _merge(old.get(key), value) for key, value in patch.items() if value is not None}


def _selector(request: web.Request) -> Callable[[Object], bool]:
    labels = [part.split("=") for part in request.query.get("labelSelector", "").split(",") if part]
    fields = [part.split("=") for part in request.query.get("fieldSelector", "").split(",") if part]

    def matches(it: Object) -> bool:
        metadata = it["metadata"]
        named = all(metadata["name"] == value for field, value in fields if field == "metadata.name")
        return named and all(metadata.get("labels", {}).get(name) == value for name, value in labels)

    return matches


def _decode(body: bytes, content_type: str) -> Object:
    """Return an object that was sent as JSON, or a Secret as protobuf: Helm writes its own Secrets so."""
    if content_type != "application/vnd.kubernetes.protobuf":
        decoded: Object = json.loads(body)
        return decoded
    secret = dict(_fields(dict(_fields(body.removeprefix(b"k8s\x00")))[2]))
    metadata = list(_fields(secret[1]))
    data = [dict(_fields(entry)) for number, entry in _fields(dict(_fields(body[4:]))[2]) if number == 2]
    labels = [dict(_fields(entry)) for number, entry in metadata if number == 11]
    return {
        "metadata": {
            "name": dict(metadata)[1].decode(),
            "labels": {label[1].decode(): label[2].decode() for label in labels},
        },
        "data": {entry[1].decode(): base64.b64encode(entry[2]).decode() for entry in data},
        "type": secret[3].decode(),
    }


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of a protobuf message's fields: bytes, or an integer."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        assert kind in (0, 2), kind
        if kind == 0:
            yield number, varint()
        else:
            size = varint()
            at += size
            yield number, message[at - size : at]


@contextmanager
def running(version: str) -> Iterator[tuple[ApiServer, str]]:
    """Run a server in a thread; yield it and its URL."""
    loop = asyncio.new_event_loop()
    started: asyncio.Future[tuple[ApiServer, str]] = loop.create_future()
    stop = asyncio.Event()

    async def serve() -> None:
        server = ApiServer(version)
        runner = web.AppRunner(server.app(), shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        started.set_result((server, f"http://127.0.0.1:{port}"))
        await stop.wait()
        await runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}  # watches that nobody reads any more
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=[serve()])

    async def wait() -> tuple[ApiServer, str]:
        return await asyncio.shield(started)

    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(wait(), loop).result(30)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()
