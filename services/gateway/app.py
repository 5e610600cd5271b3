"""Puts a gateway together: one model, the schedulers, the public servers and the operators' one."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from starlette.types import ASGIApp

from octavo.admin.v1 import admin_pb2_grpc
from octavo.common.adapter_files import AdapterError
from octavo.inference.v1 import (
    embedding_pb2_grpc,
    generation_pb2_grpc,
    load_pb2_grpc,
    model_pb2_grpc,
    tokenizer_pb2_grpc,
)
from octavo.services.common.grpc_options import SMALL_MESSAGE_BYTES, public_server_options
from octavo.services.common.interceptor import ErrorInterceptor
from octavo.services.common.operating import AdminKeys
from octavo.services.common.probes import ProbeServer
from octavo.services.common.request_memory import RequestMemory
from octavo.services.common.tls import listen, server_credentials
from octavo.services.gateway.authentication import Authenticator
from octavo.services.gateway.config import REFUSE, GatewayConfig, parse_adapters
from octavo.services.gateway.constraints.checker import Constraints
from octavo.services.gateway.constraints.checker import available as constraints_available
from octavo.services.gateway.http.adapters import AdapterEndpoints
from octavo.services.gateway.http.app import make_app
from octavo.services.gateway.http.batches import BatchService
from octavo.services.gateway.http.embed import EmbedEndpoints
from octavo.services.gateway.http.endpoint import Handler
from octavo.services.gateway.http.generate import GenerateEndpoints
from octavo.services.gateway.http.info import InfoEndpoints
from octavo.services.gateway.http.listener import HttpListener
from octavo.services.gateway.http.ui_endpoints import UiEndpoints
from octavo.services.gateway.mesh import MeshHeaders
from octavo.services.gateway.output.formats import detect_reasoning_format, detect_tool_call_format
from octavo.services.gateway.requests.adapters import Adapters
from octavo.services.gateway.requests.calls import GenerateCalls
from octavo.services.gateway.requests.model import Models, ServedModel
from octavo.services.gateway.requests.vector_calls import VectorCalls
from octavo.services.gateway.rpc.admin import AdminServicer
from octavo.services.gateway.rpc.batch import BatchLimits
from octavo.services.gateway.rpc.embedding_service import EmbeddingServicer
from octavo.services.gateway.rpc.generation_service import GenerationServicer
from octavo.services.gateway.rpc.health import SERVICE_NAMES, HealthMonitor
from octavo.services.gateway.rpc.model_service import LoadServicer, ModelServicer
from octavo.services.gateway.rpc.tokenizer_service import TokenizerServicer
from octavo.services.gateway.schedulers.pool import SchedulerPool
from octavo.services.gateway.schedulers.resume_token import ResumeTokens
from octavo.services.gateway.telemetry import GatewayTelemetry
from octavo.services.gateway.tokenization.model_files import ModelError
from octavo.services.gateway.tokenization.model_identity import ModelIdentity
from octavo.services.gateway.tokenization.tokenizer import ModelTokenizer
from octavo.services.gateway.validation import RequestValidator

log = logging.getLogger(__name__)

_LAST_WRITES_S = 0.5


class BindError(RuntimeError):
    """An address cannot be listened on; the message is one line."""


class Gateway:
    """A gateway in this process. Make it on the event loop that runs it."""

    def __init__(self, config: GatewayConfig) -> None:
        """Load the tokenizer, bind the addresses. Raises ModelError, BindError, KeyFileError, ValueError (keys)."""
        authenticator = Authenticator(config.authentication)
        credentials = None if config.tls is None else server_credentials(config.tls)
        tokens = ResumeTokens.load(config.resume_key_file)
        self._config = config
        gateway_id = config.gateway_id or f"{socket.gethostname()}-{os.getpid()}"
        model = _load_model(config)
        self._constraints = model.constraints
        models = Models([model])
        validator = RequestValidator()
        self._tokenizer = model.tokenizer
        self.schedulers = SchedulerPool(
            config.scheduler_addresses,
            gateway_id,
            config.failover_s,
            config.hop_tls,
            identity=ModelIdentity(self._tokenizer.vocab_size, self._tokenizer.tokens_sha256, config.model_version),
            max_tries=config.scheduler_tries,
            min_usable_share=config.min_usable_schedulers,
        )
        if self._tokenizer.vector_files is None:
            models.adapters = Adapters((model.name, *model.aliases), config.adapter_dir, self.schedulers)
        elif config.adapter or config.adapter_dir is not None:
            raise ModelError(
                f"{config.model} makes vectors, and takes no adapters: leave --adapter and --adapter-dir out"
            )
        self._adapters = models.adapters
        self._health = HealthMonitor(self.schedulers)
        self._telemetry = GatewayTelemetry(config, gateway_id, self.schedulers)
        accounting = self._telemetry.accounting
        authenticator.on_refused = accounting.refused
        mesh = MeshHeaders(config.mesh_headers, config.mesh_objectives)
        self._calls = GenerateCalls(models, self.schedulers, tokens, validator, accounting, mesh, config.max_requests)

        max_message_bytes = config.max_message_bytes(model.max_model_len)
        memory = self.request_memory = RequestMemory(config.request_memory_bytes, max_message_bytes)
        """What the requests of running calls take."""
        self._server = aio.server(
            interceptors=[ErrorInterceptor(authenticator.authorize, memory)],
            options=public_server_options(
                max_message_bytes, config.max_concurrent_streams, config.max_connection_age_s
            ),
        )
        batch_limits = BatchLimits(config.batch_window, config.batch_wait_s)
        generation = GenerationServicer(
            self._calls, self.schedulers, validator, batch_limits, self._telemetry.load_reports
        )
        _add(self._server, generation_pb2_grpc.add_GenerationServiceServicer_to_server, generation)
        vector_calls = VectorCalls(self._calls, models, self.schedulers)
        embedding = EmbeddingServicer(vector_calls)
        _add(self._server, embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server, embedding)
        model_servicer = ModelServicer(models, self.schedulers, validator)
        tokenizer_servicer = TokenizerServicer(models, validator)
        _add(self._server, model_pb2_grpc.add_ModelServiceServicer_to_server, model_servicer)
        _add(self._server, tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server, tokenizer_servicer)
        load = LoadServicer(model.name, self.schedulers, validator)
        _add(self._server, load_pb2_grpc.add_LoadServiceServicer_to_server, load)
        _add(self._server, health_pb2_grpc.add_HealthServicer_to_server, self._health.servicer)
        if config.reflection:
            names = (*SERVICE_NAMES, "grpc.health.v1.Health", reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        self.port = _bind(self._server, config.grpc_address, credentials)
        """The port that is listened on; for tests, which ask for port 0."""

        if config.local_address:
            _bind(self._server, config.local_address, None)

        self._admin: aio.Server | None = None
        self.admin_port = 0
        if config.admin_address:
            admin = AdminServicer(
                self._calls, self._health, self.schedulers, validator, gateway_id, config.grace_s, self._adapters
            )
            authorize: Callable[[str, Any], str] = partial(authenticator.authorize, admin=True)
            if config.admin_keys is not None:
                authorize = AdminKeys(config.admin_keys).authorize
            self._admin = aio.server(
                interceptors=[ErrorInterceptor(authorize, memory)],
                options=public_server_options(SMALL_MESSAGE_BYTES, config.max_concurrent_streams),
            )
            _add(self._admin, admin_pb2_grpc.add_AdminServiceServicer_to_server, admin)
            self.admin_port = _bind(self._admin, config.admin_address, credentials)

        self._was_ready = False
        self._probes = _bind_probes(config.health_address, self._takes_calls)
        self._http: HttpListener | None = None
        self._batches: BatchService | None = None
        self.http_port = 0
        if config.http_address:
            generate = GenerateEndpoints(self._calls, models)
            embed = EmbedEndpoints(vector_calls)
            in_batches = {
                "/v1/chat/completions": generate.chat,
                "/v1/completions": generate.complete,
                "/v1/responses": generate.respond,
                "/v1/embeddings": embed.embeddings,
            }
            self._batches = _open_batches(config, in_batches, authenticator, memory)
            ui = UiEndpoints(models, load, self._ready) if config.ui else None
            http_app = make_app(
                generate,
                embed,
                InfoEndpoints(models, model_servicer, tokenizer_servicer, self._ready),
                authenticator,
                config.http_max_body_bytes,
                memory,
                config.http_cors_origins,
                [
                    *([] if self._batches is None else self._batches.routes),
                    *([] if ui is None else ui.routes),
                    *([] if self._adapters is None else AdapterEndpoints(self._adapters, authenticator).routes),
                ],
                [] if ui is None else ui.public_routes,
                refuses_unknown=config.unknown_fields == REFUSE,
            )
            self._http = _bind_http(config, http_app)
            self.http_port = self._http.port

        try:
            self._telemetry.serve(self._calls, self.schedulers)
        except OSError as error:
            raise BindError(f"cannot listen on {config.metrics_address}: {error.strerror}") from None
        self.metrics_port = self._telemetry.port

    async def start(self) -> None:
        """Connect to the schedulers and take calls; does not wait for the schedulers. Raises ModelError."""
        await self._tokenizer.start()
        if self._adapters is not None:
            try:
                await self._adapters.start(parse_adapters(self._config.adapter))
            except AdapterError as error:
                raise ModelError(f"--adapter: {error}") from None
        self.schedulers.start()
        if self._constraints is not None:
            self._constraints.start()
        await self._health.start()
        if self._http is not None:
            await self._http.start()  # first: gRPC's health check says that all of the gateway serves
        if self._batches is not None:
            self._batches.start()
        await self._server.start()
        if self._admin is not None:
            await self._admin.start()
        if self._probes is not None:
            await self._probes.start()

    @property
    def num_requests(self) -> int:
        """Calls that run now."""
        return self._calls.num_requests

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, let running ones go on for `grace_s`, then end everything.

        Clients are told at once, by health checks and on every connection (GOAWAY). What has to be ended
        ends with UNAVAILABLE and with what its client needs to go on elsewhere.
        """
        self._calls.draining = True
        if self._batches is not None:
            await self._batches.stop()  # another gateway goes on with them
        await self._health.stop()
        # Refuses new connections and calls now, and would cancel the others after twice the grace.
        stopping = asyncio.create_task(self._server.stop(2 * grace_s + _LAST_WRITES_S))
        if not await self._idle_within(grace_s):
            self.schedulers.interrupt_all("the gateway stops")
            await self._idle_within(_LAST_WRITES_S)
        await self._server.stop(_LAST_WRITES_S)
        await stopping
        if self._admin is not None:
            await self._admin.stop(0.5)
        await self.schedulers.close()
        if self._http is not None:
            await self._http.stop()  # last: HTTP streams that were still running have got their error by now
        if self._probes is not None:
            await self._probes.stop()
        if self._constraints is not None:
            await self._constraints.close()
        await self._tokenizer.stop()
        await asyncio.to_thread(self._telemetry.close)

    async def _idle_within(self, seconds: float) -> bool:
        """Wait for the end of all calls; return whether they ended in time."""
        try:
            async with asyncio.timeout(seconds):
                await self._calls.wait_idle()
        except TimeoutError:
            return False
        return True

    def _ready(self) -> bool:
        return self._health.ready() and not self._calls.draining

    def _takes_calls(self) -> bool:
        """Whether clients are to be sent here, which the first scheduler decides.

        A gateway that loses the last one stays: it lists models, makes tokens, says how long to wait, and holds calls
        for the one that comes back. Nobody answers at all if all gateways leave. What is served is the health of the
        services, for proxies that ask each gateway.
        """
        self._was_ready = self._was_ready or self._health.ready()
        return self._was_ready and not self._calls.draining


def _add(server: aio.Server, register: Callable[[Any, aio.Server], None], servicer: Any) -> None:
    """Register a servicer: generated code has no types, and this is the one place that knows."""
    register(servicer, server)


def _load_model(config: GatewayConfig) -> ServedModel:
    tokenizer = ModelTokenizer.load(config.model, config.tokenizer_threads)
    limits = [limit for limit in (config.max_model_len, tokenizer.max_model_len) if limit]
    if not limits:
        raise ModelError(f"{config.model} does not say how long its context is; set --max-model-len")
    name = config.served_name
    aliases = tuple(dict.fromkeys(alias for alias in config.model_aliases if alias != name))
    template = tokenizer.chat_template.source if tokenizer.chat_template is not None else ""
    tool_calls, reasoning = config.tool_call_format, config.reasoning_format
    return ServedModel(
        name,
        aliases,
        tokenizer,
        min(limits),
        detect_tool_call_format(template) if tool_calls == "auto" else tool_calls,
        detect_reasoning_format(template) if reasoning == "auto" else reasoning,
        _constraints(tokenizer, config.constraint_processes),
        config.clamp_max_tokens,
    )


def _open_batches(
    config: GatewayConfig, handlers: Mapping[str, Handler], authenticator: Authenticator, memory: RequestMemory
) -> BatchService | None:
    if config.batch_dir is None:
        return None
    try:
        return BatchService(config, config.batch_dir, handlers, authenticator, memory)
    except OSError as error:
        raise BindError(f"cannot use --batch-dir {config.batch_dir}: {error.strerror}") from None


def _constraints(tokenizer: ModelTokenizer, num_processes: int) -> Constraints | None:
    if not num_processes or tokenizer.vector_files is not None:
        return None
    if not constraints_available() or not tokenizer.has_token_bytes:
        log.warning("structured output is off: it needs llguidance, and a tokenizer whose tokens are bytes")
        return None
    return Constraints(tokenizer.vocabulary, num_processes)


def _bind_http(config: GatewayConfig, app: ASGIApp) -> HttpListener:
    try:
        return HttpListener(config.http_address, app, config.http_max_connections, config.http_keep_alive_s, config.tls)
    except OSError as error:
        raise BindError(f"cannot listen on {config.http_address}: {error.strerror}") from None


def _bind_probes(address: str, is_ready: Callable[[], bool]) -> ProbeServer | None:
    try:
        return ProbeServer(address, is_ready) if address else None
    except RuntimeError:
        raise BindError(f"cannot listen on {address}: it is in use, or not an address of this machine") from None


def _bind(server: aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    try:
        port = listen(server, address, credentials)
    except RuntimeError:
        port = 0
    if not port:
        raise BindError(f"cannot listen on {address}: it is in use, or not an address of this machine")
    return port
