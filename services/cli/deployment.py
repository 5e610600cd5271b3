"""Which processes `octavo serve` runs, with which options, and where they listen."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from octavo.kernels.machine import available_cores
from octavo.services.cli import addresses, model_source
from octavo.services.cli.child import ChildSpec
from octavo.services.cli.errors import CommandError
from octavo.services.cli.one_process import LOG_FORMAT, SUPERVISOR_PID
from octavo.services.cli.ranks import visible_gpu
from octavo.services.cli.serve_config import PROCESSES, ServeConfig
from octavo.services.common import config as config_loader
from octavo.services.common.api_keys import parse_keys
from octavo.services.common.files import WatchedFile

RESUME_KEY = "resume.key"
"""Name of the file in the run directory that has the key of resume tokens."""
_CLI = "octavo.services.cli"
# In which order they stop: what depends on others first.
_GATEWAY, _SCHEDULER, _WORKER = 0, 1, 2


@dataclass(frozen=True)
class Listen:
    """Where one gateway listens; `http` is empty for nowhere."""

    grpc: str
    http: str


def take_addresses(config: ServeConfig) -> list[Listen]:
    """Return the addresses of each gateway, all free now. Raises CommandError."""
    grpc = addresses.take_free(config.grpc_address, config.gateways)
    if not config.http_address:
        return [Listen(address, "") for address in grpc]
    http = addresses.take_free(config.http_address, config.gateways)
    if both := set(grpc) & set(http):
        raise CommandError(f"{min(both)} is wanted for both gRPC and HTTP: choose ports that are further apart")
    return [Listen(*pair) for pair in zip(grpc, http, strict=True)]


def take_metrics_addresses(config: ServeConfig, listen: Sequence[Listen]) -> list[str]:
    """Return an address for each gateway, scheduler and worker, in this order; none if there are to be none."""
    if not config.metrics_address:
        return []
    count = config.gateways + config.schedulers * (1 + config.workers)
    metrics = addresses.take_free(config.metrics_address, count)
    if both := set(metrics) & {address for where in listen for address in (where.grpc, where.http)}:
        raise CommandError(f"{min(both)} is wanted for both metrics and an API: choose ports that are further apart")
    return metrics


def child_specs(
    config: ServeConfig,
    model: model_source.Model,
    listen: Sequence[Listen],
    folder: Path,
    metrics: Sequence[str] = (),
) -> list[ChildSpec]:
    """Return the processes to run: the schedulers, workers for each, and a gateway for each entry of `listen`.

    metrics  where they serve metrics: gateways, schedulers, workers; empty for nowhere
    """
    return _Deployment(config, model, folder, len(listen), metrics).specs(listen)


class _Deployment:
    def __init__(
        self, config: ServeConfig, model: model_source.Model, folder: Path, num_gateways: int, metrics: Sequence[str]
    ) -> None:
        self._config = config
        self._model = model
        self._folder = folder
        count = config.schedulers
        self._schedulers = ["scheduler"] if count == 1 else [f"scheduler-{index}" for index in range(count)]
        self._num_workers = count * config.workers
        observed = [f"gateway-{index}" for index in range(num_gateways)] + self._schedulers
        observed += [f"worker-{index}" for index in range(self._num_workers)]
        self._metrics = dict(zip(observed, metrics, strict=True)) if metrics else {}

    def specs(self, listen: Sequence[Listen]) -> list[ChildSpec]:
        return [*self.schedulers(), *self.workers(), *self.gateways(listen)]

    def schedulers(self) -> Iterator[ChildSpec]:
        config = self._config
        options = {
            "model_name": self._model.name,
            "admin_address": "",  # one variable in the environment would name the same port to several processes
            "trusted_network": config.trusted_network,
            "max_num_seqs": config.max_num_seqs,
            "max_waiting": config.max_waiting,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "max_prefill_tokens": config.max_prefill_tokens,
            "grace_s": config.grace_s,
        }
        for name in self._schedulers:
            own = {
                # A gateway tells its schedulers apart by their ids: elsewhere there are others called "scheduler".
                "scheduler_id": config.scheduler_address or name,
                "scheduler_address": self._scheduler_address(name),
                "health_address": "" if config.gateways else local_address(self._folder, name),
                "worker_endpoint": self._worker_endpoint(name),
            }
            yield self._spec(name, _SCHEDULER, {**options, **own}, progress="--progress-fd")

    def workers(self) -> Iterator[ChildSpec]:
        config = self._config
        num_ranks = config.tensor_parallel
        num_processes = self._num_workers * num_ranks
        options = {
            "model": str(self._model.path),
            "device": config.device,
            "dtype": config.dtype,
            "kv_cache_memory": config.kv_cache_memory,
            "kv_cache_dtype": config.kv_cache_dtype,
            "quantization": config.quantization,
            "max_model_len": config.max_model_len,
            "packed_cache": config.packed_cache,
            "speculative_tokens": config.speculative_tokens,
            "max_adapters": config.max_adapters,
            # Whoever stops all processes at once, as systemd does, stops no worker before its scheduler has drained.
            "drain_s": config.grace_s,
            # By default a worker takes every core: several of them would only wait for each other.
            "num_threads": max(1, available_cores() // num_processes) if num_processes > 1 else None,
        }
        for index in range(self._num_workers):
            name = f"worker-{index}"
            endpoint = self._worker_endpoint(self._schedulers[index // config.workers])
            own = {**options, "worker_id": name, "worker_endpoint": endpoint}
            if num_ranks == 1:
                yield self._spec(name, _WORKER, own, progress="--progress-fd")
                continue
            for rank in range(num_ranks):
                ranks = {"rank": rank, "world_size": num_ranks, "rendezvous": f"ipc://{self._folder}/{name}.sock"}
                yield self._spec(
                    f"{name}.{rank}",
                    _WORKER,
                    {**own, **ranks},
                    progress="--progress-fd" if rank == 0 else "",
                    unit=name,
                    environment=visible_gpu(index * num_ranks + rank, os.environ),
                )

    def gateways(self, listen: Sequence[Listen]) -> Iterator[ChildSpec]:
        config = self._config
        options = {
            "model_name": self._model.name,
            "scheduler_addresses": config.scheduler_addresses
            or tuple(self._scheduler_address(name) for name in self._schedulers),
            "resume_key_file": str(config.resume_key_file or self._folder / RESUME_KEY),
            "admin_address": "",
            "max_model_len": config.max_model_len,
            "http_cors_origins": config.http_cors_origins,
            "ui": config.ui,
            "adapter": config.adapter,
            "adapter_dir": config.adapter_dir,
            "tool_call_format": config.tool_call_format,
            "reasoning_format": config.reasoning_format,
            "reflection": config.reflection,
            "grace_s": config.grace_s,
            "api_keys": config.api_keys,
            "tls_certificate": config.tls_certificate,
            "tls_key": config.tls_key,
            "tls_client_ca": config.tls_client_ca,
        }
        for index, where in enumerate(listen):
            name = f"gateway-{index}"
            own = {
                "gateway_id": name,
                "grpc_address": where.grpc,
                "http_address": where.http,
                "local_address": local_address(self._folder, name),
            }
            yield self._spec(
                name, _GATEWAY, {**options, **own}, arguments=(str(self._model.path),), progress="--progress-fd"
            )

    def _scheduler_address(self, name: str) -> str:
        return self._config.scheduler_address or f"unix:{self._folder}/{name}.sock"

    def _worker_endpoint(self, scheduler: str) -> str:
        return f"ipc://{self._folder}/{scheduler}-workers.sock"

    def _spec(
        self,
        name: str,
        stop_order: int,
        options: Mapping[str, object],
        *,
        arguments: tuple[str, ...] = (),
        progress: str = "",
        unit: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> ChildSpec:
        kind = name.split("-")[0]
        observing = {
            # Given in any case: a variable in the environment would name one port to several processes. Of the ranks
            # of a worker the first one speaks for all.
            "metrics_address": self._metrics.get(name.removesuffix(".0"), ""),
            "otlp_endpoint": self._config.otlp_endpoint,
            "log_level": self._config.log_level,
        }
        known = {field.name for field in fields(PROCESSES[kind])}
        passed = {option: value for option, value in self._config.passed.items() if option in known}
        # An option that is left to its process here is none that would have to win.
        set_here = {option: value for option, value in {**options, **observing}.items() if value is not None}
        flags = config_loader.flags({**passed, **set_here})
        common = {SUPERVISOR_PID: str(os.getpid()), LOG_FORMAT: self._config.log_format, "PYTHONUNBUFFERED": "1"}
        command = (sys.executable, "-P", "-m", _CLI, kind, *arguments, *flags)
        return ChildSpec(name, command, stop_order, {**common, **(environment or {})}, progress, unit)


def check(config: ServeConfig) -> None:
    """Raise ValueError if a process would refuse its options, or lack a file that they name: before anything starts."""
    model = model_source.Model(Path("model"), "model")
    listen = [Listen(config.grpc_address, config.http_address)] if config.gateways else []
    for spec in _Deployment(config, model, Path("/run"), len(listen), ()).specs(listen):
        kind, *options = spec.command[spec.command.index(_CLI) + 1 :]
        config_loader.parse(PROCESSES[kind], options, prog=f"octavo {kind}")
    if config.api_keys is not None:
        WatchedFile(config.api_keys, parse_keys)


def asked_addresses(config: ServeConfig, folder: Path) -> list[str]:
    """Return where to ask whether all of it serves: at the gateways, or at the scheduler if there is none."""
    names = [f"gateway-{index}" for index in range(config.gateways)] or ["scheduler"]
    return [local_address(folder, name) for name in names]


def local_address(folder: Path, name: str) -> str:
    """Return where a process can be asked whether it serves, whatever clients need to be let in."""
    return f"unix:{folder}/{name}{'' if name.startswith('gateway') else '-health'}.sock"
