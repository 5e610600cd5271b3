"""The Serve application: gateways and engines, each a deployment that scales by itself."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingPolicy, gRPCOptions

from octavo.ray.engine import Engine
from octavo.ray.gateway import Gateway
from octavo.services.offline.llm import option_flags


class QueuePolicy:
    """Sequences, running and waiting, over a target for each engine; one more while a queue is long.

    Serve's own policy counts requests of replicas, and an engine's requests do not come through its replica.

    target_sequences  that an engine has
    max_queue_s       how long a new request may have to wait at the busiest engine before another one is added
    """

    def __init__(self, target_sequences: float = 32.0, max_queue_s: float = 5.0) -> None:
        if target_sequences <= 0 or max_queue_s <= 0:
            raise ValueError("target_sequences and max_queue_s must be positive")
        self._target_sequences = target_sequences
        self._max_queue_s = max_queue_s

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """Return the number of engines, and no state. `ctx`: Serve's AutoscalingContext."""
        found: dict[str, dict[Any, float]] = ctx.aggregated_metrics or {}
        sequences = found.get("sequences", {})
        if not sequences:  # nobody has said anything yet
            return ctx.target_num_replicas, {}
        # Those that have not reported are as busy as the others.
        total = sum(sequences.values()) / len(sequences) * max(len(sequences), ctx.current_num_replicas)
        wanted = math.ceil(total / self._target_sequences)
        if max(found.get("queue_s", {}).values(), default=0.0) > self._max_queue_s:
            wanted = max(wanted, ctx.current_num_replicas + 1)
        return max(wanted, 1), {}


GRPC_SERVICERS = [
    f"octavo.inference.v1.{name}_pb2_grpc.add_{name.capitalize()}ServiceServicer_to_server"
    for name in ("embedding", "generation", "load", "model", "tokenizer")
]
"""For `grpc_options` of Serve: the services that its proxies have."""

_MAX_REQUESTS = 4096  # at once, of a gateway: its own limit is --max-requests
_SHUTDOWN_S = 60.0
_POLICY = {"policy_function": "octavo.ray.application:QueuePolicy"}
Options = Mapping[str, str | float | bool]


def start(*, http_address: str = "127.0.0.1:8000", grpc_port: int = 9000, **options: Any) -> None:
    """Start Serve with proxies for HTTP and for Octavo's gRPC services. `options`: further ones of serve.start."""
    host, _, port = http_address.rpartition(":")
    serve.start(
        http_options={"host": host, "port": int(port)},
        grpc_options=gRPCOptions(port=grpc_port, grpc_servicer_functions=GRPC_SERVICERS),
        **options,
    )


def application(
    model: str,
    *,
    engines: int | Mapping[str, Any] = 1,
    gateways: int | Mapping[str, Any] = 1,
    engine_options: Options | None = None,
    gateway_options: Options | None = None,
    engine_resources: Mapping[str, Any] | None = None,
    gateway_resources: Mapping[str, Any] | None = None,
) -> Any:
    """Return an application for `serve.run`.

    model              a folder, a .gguf file, a hub id or "demo". Each node has to have it under this name.
    engines            how many, or Serve's autoscaling_config; unless it has a policy, QueuePolicy decides
    gateways           the same for gateways, for which Serve's own policy is right
    engine_options     of `octavo serve`, with _ for -: `{"device": "cuda", "tensor_parallel": 2}`
    gateway_options    the same, for what gateways do: `{"tool_call_format": "hermes"}`
    engine_resources   ray_actor_options of an engine: `{"num_gpus": 2}`; what its processes use
    gateway_resources  the same of a gateway
    """
    if not isinstance(engines, int):
        engines = {"policy": AutoscalingPolicy(**_POLICY), **engines}
    engine = serve.deployment(
        Engine,
        name="Engine",
        ray_actor_options=dict(engine_resources or {"num_cpus": 1}),
        graceful_shutdown_timeout_s=_SHUTDOWN_S,
        **_size(engines),
    )
    gateway = serve.deployment(
        Gateway,
        name="Gateway",
        ray_actor_options=dict(gateway_resources or {"num_cpus": 1}),
        max_ongoing_requests=_MAX_REQUESTS,
        graceful_shutdown_timeout_s=_SHUTDOWN_S,
        **_size(gateways),
    )
    bound = engine.bind(model, option_flags(engine_options or {}))
    return gateway.bind(bound, secrets.token_hex(32), model, option_flags(gateway_options or {}))


def build(args: dict[str, Any]) -> Any:
    """Return the application that `args` describe: `serve run octavo.ray:build model=demo`, or a Serve config file."""
    numbers = {name: int(args[name]) for name in ("engines", "gateways") if isinstance(args.get(name), str)}
    return application(**{**args, **numbers})


def _size(wanted: int | Mapping[str, Any]) -> dict[str, Any]:
    return {"num_replicas": wanted} if isinstance(wanted, int) else {"autoscaling_config": dict(wanted)}
