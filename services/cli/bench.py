"""`octavo bench [MODEL]`: measures a server as its clients see it."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.services.cli import addresses, server_options
from octavo.services.cli.errors import CommandError
from octavo.services.cli.server_options import ServerConfig

if TYPE_CHECKING:
    from octavo.services.bench.outcomes import Run
    from octavo.services.bench.server import Server
    from octavo.services.bench.transports import Transport

_LOAD = "load"
_RESULT = "result"


@dataclass(frozen=True, kw_only=True)
class BenchConfig(ServerConfig):
    """Settings of `octavo bench`."""

    model: str = field(
        default="",
        metadata={
            "positional": True,
            "help": "start `octavo serve MODEL` for the measurement, and measure its start-up, processor time and "
            "memory too; without it the server at --address or --url is measured",
        },
    )
    url: str = field(
        default="",
        metadata={"help": "use the OpenAI completions API instead: any server's URL, such as http://127.0.0.1:8000"},
    )
    http: bool = field(default=False, metadata={"help": "with MODEL: measure over HTTP instead of gRPC"})
    served_model: str = field(default="", metadata={"help": "the model's name there; not needed if there is one"})
    serve_flag: tuple[str, ...] = field(
        default=(),
        metadata={"help": "an option for `octavo serve`, such as --serve-flag=--device=cpu", "verbatim": True},
    )

    case: tuple[str, ...] = field(
        default=("c1", "c8", "c32", "offline", "prefill", "prefix"),
        metadata={
            "group": _LOAD,
            "help": "what to measure. cN: N streams, one request after the other; rN: N requests a second at random "
            "times; offline: 64 requests at once; prefill: documents of 2,048 tokens, one token out; prefix: 32 "
            "requests at once with a common prefix of 1,024 tokens",
        },
    )
    requests: int = field(
        default=0, metadata={"group": _LOAD, "help": "requests of a case; 0: four for each stream, at least 8"}
    )
    max_tokens: int = field(
        default=128, metadata={"group": _LOAD, "help": "output of each request; 0: what the prompts' file says"}
    )
    prompts: Path | None = field(
        default=None,
        metadata={"group": _LOAD, "help": "JSONL file with messages or prompt, and max_tokens; default: 290 chats"},
    )
    repeats: int = field(default=3, metadata={"group": _LOAD, "help": "how often each case is run; medians are shown"})
    seed: int = field(default=0, metadata={"group": _LOAD, "help": "which prompts are drawn"})

    slo_ttft_ms: float | None = field(
        default=None, metadata={"group": _RESULT, "help": "goodput counts requests whose first token came in time"}
    )
    slo_tpot_ms: float | None = field(
        default=None, metadata={"group": _RESULT, "help": "and whose time per further token is at most this"}
    )
    output: Path | None = field(default=None, metadata={"group": _RESULT, "help": "write everything there, as JSON"})
    plot: Path | None = field(
        default=None, metadata={"group": _RESULT, "help": "draw a picture there (.png, .svg); needs matplotlib"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.url:
            self.check_url(self.url)
        if self.model and self.url:
            raise ValueError("--url names a running server: leave MODEL out")
        if self.http and not self.model:
            raise ValueError("--http needs MODEL; for a running server give its --url")
        if self.requests < 0 or self.max_tokens < 0:
            raise ValueError("--requests and --max-tokens must not be negative")
        if not 1 <= self.repeats <= 1000:
            raise ValueError(f"--repeats must be from 1 to 1000, not {self.repeats}")


def main(argv: Sequence[str]) -> int:
    """Measure and print; `argv[0]` is the command's name. Return 1 if a request failed or nothing could be measured."""
    config = server_options.load(
        BenchConfig, argv[1:], prog="octavo bench", description="Measures a server as its clients see it."
    )
    try:
        for module in ("aiohttp", "psutil") if config.model else ("aiohttp",):
            if importlib.util.find_spec(module) is None:
                raise CommandError(f"{module} is missing: pip install {module}")
        if config.plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise CommandError("--plot needs matplotlib: pip install matplotlib")
        return asyncio.run(_measure(config))
    except (CommandError, ValueError) as error:
        print(f"octavo bench: {error}", file=sys.stderr)
        return 1


async def _measure(config: BenchConfig) -> int:
    from octavo.services.bench import report
    from octavo.services.bench.cases import Plan, check_case, run_case
    from octavo.services.bench.outcomes import Objective

    for case in config.case:
        check_case(case)
    limits = [math.inf if value is None else value / 1000 for value in (config.slo_ttft_ms, config.slo_tpot_ms)]
    plan = Plan(config.requests, config.max_tokens, config.seed, config.prompts, Objective(*limits))
    runs: dict[str, list[Run]] = {case: [] for case in config.case}
    settings = {name: str(value) for name, value in vars(config).items() if name != "api_key"}
    facts: dict[str, object] = {"settings": settings}
    async with AsyncExitStack() as stack:
        server, address, url = None, "", config.url and config.check_url(config.url)
        if config.model:
            from octavo.services.bench.server import ServerError

            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="octavo-bench-")))
            server, address, url = _octavo(config, folder / "server.log")
            try:
                await stack.enter_async_context(server)
            except ServerError as error:
                log = (folder / "server.log").read_text(errors="replace").strip().splitlines()
                raise CommandError(f"{error}: {log[-1] if log else 'it said nothing'}") from None
        over_http = bool(config.url or config.http)
        transport = await _http(config, url) if over_http else await _grpc(config, address)
        await stack.enter_async_context(transport)
        # Every case once, then again: a machine that slows down then slows every case down.
        for repeat in range(config.repeats):
            for case in config.case:
                runs[case].append(await run_case(case, repeat, transport, plan, server.cpu_seconds if server else _nan))
                _say_errors(runs[case][-1])
                if sys.stderr.isatty():
                    rate = runs[case][-1].output_rate
                    print(f"{case}, {repeat + 1} of {config.repeats}: {rate:,.0f} tokens/s", file=sys.stderr)
        if server is not None:
            facts |= {"ready_s": server.ready_s, "peak_memory_bytes": server.peak_memory}
    print(report.table(runs))
    if server is not None:
        print(f"\nready after {server.ready_s:.2f} s; at most {server.peak_memory / 2**20:,.0f} MiB in all processes")
    if config.output is not None:
        config.output.write_text(json.dumps(report.document(runs, **facts), indent=1) + "\n", encoding="utf-8")
    if config.plot is not None:
        report.plot(runs, config.plot)
    return 1 if any(run.failed for repeats in runs.values() for run in repeats) else 0


def _octavo(config: BenchConfig, log: Path) -> tuple[Server, str, str]:
    """Return a server of our own, its gRPC address and its URL."""
    from octavo.services.bench.server import Server

    (grpc,), (http,) = (addresses.take_free("127.0.0.1:0", 1) for _ in range(2))
    command = [sys.executable, "-P", "-m", "octavo.services.cli", "serve", config.model]
    command += [f"--grpc-address={grpc}", f"--http-address={http}", *config.serve_flag]
    return Server(command, f"http://{http}/health", log), grpc, f"http://{http}"


async def _grpc(config: BenchConfig, address: str) -> Transport:
    """Return what sends requests, once the server has said that it is there. Raises CommandError.

    address  of a server of our own; empty: the one of the settings
    """
    from octavo.services.bench.transports import GrpcTransport
    from octavo.services.client import OctavoError

    client = GrpcTransport.client(address) if address else config.client(**GrpcTransport.OPTIONS)
    try:
        models = await client.models()
        wanted = [m for m in models if not config.served_model or config.served_model in (m.name, *m.aliases)]
        if len(wanted) != 1:
            what = (
                f"there is no model {config.served_model}" if config.served_model else "say which with --served-model"
            )
            raise CommandError(f"{what}: the server has {', '.join(model.name for model in models) or 'none'}")
    except (OctavoError, CommandError) as error:
        await client.close()
        raise CommandError(config.explain(error)) from None
    return GrpcTransport(client, wanted[0].name)


async def _http(config: BenchConfig, url: str) -> Transport:
    """Return what sends requests, once the server has said that it is there. Raises CommandError."""
    import aiohttp

    from octavo.services.bench.transports import OpenAITransport

    key, tls = config.token(), config.ssl_context()
    headers = {"authorization": f"Bearer {key}"} if key else {}
    connector = aiohttp.TCPConnector(ssl=True if tls is None else tls)
    model = config.served_model
    try:
        async with (
            aiohttp.ClientSession(connector=connector, headers=headers) as session,
            session.get(f"{url}/v1/models") as response,
        ):
            if not model:
                response.raise_for_status()
                names = [str(each["id"]) for each in (await response.json())["data"]]
                if len(names) != 1:
                    raise CommandError(f"say which with --served-model: the server has {', '.join(names) or 'none'}")
                model = names[0]
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise CommandError(config.explain_http(error, url)) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{url}/v1/models does not say which models there are: {error}") from None
    return OpenAITransport(url, model, headers=headers, tls=tls)


def _nan() -> float:
    return math.nan


def _say_errors(run: Run) -> None:
    if run.failed:
        print(f"{run.case}: {run.failed} of {run.requests} failed: {'; '.join(run.errors)}", file=sys.stderr)
