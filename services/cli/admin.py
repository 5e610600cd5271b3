"""`octavo admin ACTION`: operates one gateway or scheduler, over its octavo.admin.v1."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from octavo.services.cli import server_options
from octavo.services.cli.server_options import ServerConfig

if TYPE_CHECKING:
    from octavo.admin.v1 import admin_pb2_grpc

DEFAULT_ADDRESS = "127.0.0.1:50056"
_DRAIN_SLACK_S = 10.0


@dataclass(frozen=True, kw_only=True)
class AdminConfig(ServerConfig):
    """Settings of `octavo admin`."""

    how_to_reach: ClassVar[str] = (
        "start `octavo gateway` or `octavo scheduler` with --admin-address (processes of `octavo serve` have none), or "
        "name it with --address"
    )
    action: str = field(
        metadata={
            "positional": True,
            "help": "drain: take no new requests, and wait for the running ones; undrain: take them again; list: show "
            "the requests; cancel: end those of NAMES or of --tenant; tenants: show quotas and weights; quota: set "
            "those of --tenant; quarantine: show what is refused because workers died of it; lift: let NAMES, or all, "
            "in again; evict: take the worker NAMES out; flush: forget cached prefixes; log-level: log NAMES (debug, "
            "info ...) from now on; stacks: show what the process is doing. A gateway knows drain, undrain, list, "
            "log-level and stacks",
            "choices": (
                "drain", "undrain", "list", "cancel", "tenants", "quota", "quarantine", "lift", "evict", "flush",
                "log-level", "stacks",
            ),
        }
    )  # fmt: skip
    names: tuple[str, ...] = field(
        default=(), metadata={"positional": True, "help": "what it is about, several with commas between them"}
    )
    address: str = field(
        default=DEFAULT_ADDRESS,
        metadata={"group": "server", "help": "the process's --admin-address: host:port or unix:PATH"},
    )
    tenant: str | None = field(default=None, metadata={"help": "whose requests, or whose quota"})
    max_requests: int | None = field(default=None, metadata={"help": "with quota: most requests at once; 0: no limit"})
    tokens_per_s: float | None = field(
        default=None, metadata={"help": "with quota: tokens in the long run; 0: no limit"}
    )
    weight: float | None = field(default=None, metadata={"help": "with quota: the share beside other tenants"})
    grace_s: float = field(default=0.0, metadata={"help": "with drain: how long to wait; 0: as the process does"})
    hold_s: float = field(default=60.0, metadata={"help": "with evict: how long the worker may not come back"})
    timeout_s: float = field(default=30.0, metadata={"help": "how long an answer may take, beside --grace"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.action in ("evict", "log-level") and len(self.names) != 1:
            what = "the worker's name" if self.action == "evict" else "debug, info, warning or error"
            raise ValueError(f"`octavo admin {self.action}` needs {what}")
        if self.action == "cancel" and not self.names and self.tenant is None:
            raise ValueError("`octavo admin cancel` needs ids of requests, or --tenant for all of a tenant's")
        if self.action == "quota" and self.tenant is None:
            raise ValueError("`octavo admin quota` needs --tenant: whose quota it is")
        given = (self.max_requests, self.tokens_per_s, self.weight)
        if self.action == "quota" and given == (None, None, None):
            raise ValueError("`octavo admin quota` needs --max-requests, --tokens-per-s or --weight")
        if not 0 <= self.hold_s <= 86_400 or not 0 <= self.grace_s <= 86_400:
            raise ValueError("--hold-s and --grace-s must be from 0 to a day")


def main(argv: Sequence[str]) -> int:
    """Do it; `argv[0]` is the command's name. Return 1, with a line on stderr, if that fails."""
    config = server_options.load(
        AdminConfig, argv[1:], prog="octavo admin", description="Operates one gateway or scheduler."
    )
    return asyncio.run(_run(config))


async def _run(config: AdminConfig) -> int:
    credentials = config.channel_credentials()
    import grpc

    from octavo.admin.v1 import admin_pb2_grpc
    from octavo.services.client.errors import from_rpc_error

    options = [("grpc.max_receive_message_length", 64 << 20)]
    make = grpc.aio.insecure_channel if credentials is None else _secure(credentials)
    async with make(config.target, options=options) as channel:
        stub = _Stub(admin_pb2_grpc.AdminServiceStub(channel), config)  # type: ignore[no-untyped-call]
        try:
            for line in await _ACTIONS[config.action](stub, config):
                print(line)
        except grpc.aio.AioRpcError as error:
            print(f"octavo admin: {config.explain(from_rpc_error(error, config.timeout_s))}", file=sys.stderr)
            return 1
    return 0


def _secure(credentials: Any) -> Callable[..., Any]:
    import grpc

    return lambda target, options: grpc.aio.secure_channel(target, credentials, options=options)


class _Stub:
    """The service, called with the key and the time limit that the options say."""

    def __init__(self, stub: admin_pb2_grpc.AdminServiceStub, config: AdminConfig) -> None:
        self._stub = stub
        self._timeout_s = config.timeout_s
        token = config.token()
        self._metadata = [("authorization", f"Bearer {token}")] if token else []

    async def __call__(self, method: str, more_s: float = 0.0, **fields: Any) -> Any:
        """Call a method with a request that has these fields; return the answer."""
        from octavo.admin.v1 import admin_pb2

        request = getattr(admin_pb2, f"{method}Request")(**fields)
        timeout_s = self._timeout_s + more_s
        return await getattr(self._stub, method)(request, metadata=self._metadata, timeout=timeout_s)


async def _drain(call: _Stub, config: AdminConfig) -> list[str]:
    # Without a grace the process's own counts, which is not known here.
    more_s = config.grace_s + _DRAIN_SLACK_S if config.grace_s else 86_400.0
    answer = await call("Drain", more_s, grace_ms=int(1000 * config.grace_s))
    return [f"takes no new requests; {answer.requests_left} still run"]


async def _undrain(call: _Stub, config: AdminConfig) -> list[str]:
    del config
    await call("Undrain")
    return ["takes requests"]


async def _list(call: _Stub, config: AdminConfig) -> list[str]:
    answer = await call("ListRequests", max_requests=100_000)
    rows = [("request", "tenant", "state", "age", "prompt", "output", "blocks", "preempted", "gateway")]
    rows += [
        (
            each.request_id, each.tenant or "-", {1: "waiting", 2: "running"}.get(each.state, "?"),
            f"{each.age_ms / 1000:.1f}s", str(each.prompt_tokens), str(each.output_tokens), str(each.kv_blocks),
            str(each.preemptions), each.gateway_id,
        )
        for each in answer.requests
        if config.tenant in (None, each.tenant)
    ]  # fmt: skip
    return _columns(rows)


async def _cancel(call: _Stub, config: AdminConfig) -> list[str]:
    answer = await call("CancelRequests", request_ids=config.names, tenant=config.tenant)
    return [f"{answer.requests_cancelled} requests ended"]


async def _tenants(call: _Stub, config: AdminConfig) -> list[str]:
    del config
    answer = await call("ListTenants")
    rows = [("tenant", "max requests", "tokens per s", "weight")]
    for name, each in [("(others)", answer.default_limits), *((each.tenant, each) for each in answer.tenants)]:
        rate = f"{each.tokens_per_s:g}" if each.tokens_per_s else "no limit"
        rows.append((name, str(each.max_requests or "no limit"), rate, f"{each.weight:g}"))
    return _columns(rows)


async def _quota(call: _Stub, config: AdminConfig) -> list[str]:
    """Change what is given, and leave the rest as it is."""
    now = await call("ListTenants")
    limits = next((each for each in now.tenants if each.tenant == config.tenant), now.default_limits)
    limits.tenant = config.tenant
    for name in ("max_requests", "tokens_per_s", "weight"):
        if (value := getattr(config, name)) is not None:
            setattr(limits, name, value)
    await call("SetTenant", limits=limits)
    return ["set, until the process ends or its file of tenants changes"]


async def _quarantine(call: _Stub, config: AdminConfig) -> list[str]:
    del config
    answer = await call("ListQuarantine")
    rows = [("id", "request", "tenant", "refused for")]
    rows += [(each.id, each.request_id, each.tenant or "-", f"{each.left_ms / 1000:.0f}s") for each in answer.requests]
    return _columns(rows)


async def _lift(call: _Stub, config: AdminConfig) -> list[str]:
    answer = await call("LiftQuarantine", ids=config.names)
    return [f"{answer.requests_lifted} requests are let in again"]


async def _evict(call: _Stub, config: AdminConfig) -> list[str]:
    answer = await call("EvictWorker", worker_id=config.names[0], hold_ms=int(1000 * config.hold_s))
    return [f"out for {config.hold_s:g} s; {answer.requests_moved} of its requests go on elsewhere or wait"]


async def _flush(call: _Stub, config: AdminConfig) -> list[str]:
    del config
    return [f"{(await call('FlushPrefixCache')).blocks_forgotten} blocks forgotten"]


async def _log_level(call: _Stub, config: AdminConfig) -> list[str]:
    answer = await call("SetLogLevel", level=config.names[0])
    return [f"{config.names[0]} in place of {answer.previous_level}"]


async def _stacks(call: _Stub, config: AdminConfig) -> list[str]:
    del config
    text: str = (await call("DumpStacks")).text
    return text.splitlines()


_ACTIONS: dict[str, Callable[[_Stub, AdminConfig], Coroutine[Any, Any, list[str]]]] = {
    "drain": _drain, "undrain": _undrain, "list": _list, "cancel": _cancel, "tenants": _tenants, "quota": _quota,
    "quarantine": _quarantine, "lift": _lift, "evict": _evict, "flush": _flush, "log-level": _log_level,
    "stacks": _stacks,
}  # fmt: skip


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
