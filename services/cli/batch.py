"""`octavo batch run`: a file of requests becomes a file of results."""

from __future__ import annotations

import asyncio
import difflib
import importlib.util
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.services.cli import server_options
from octavo.services.cli.errors import CommandError
from octavo.services.cli.server_options import AccessConfig

if TYPE_CHECKING:
    from octavo.services.batch.lines import Line
    from octavo.services.batch.results import Answer, ResultFile

_USAGE = "usage: octavo batch run [MODEL] --in FILE --out FILE [options]"
_SERVER = "server"
_DEFAULTS = "defaults of requests"
_SAY_S = 10.0
_MAX_NAMES = 100_000  # whose repetition is noticed: memory does not grow with the file


@dataclass(frozen=True, kw_only=True)
class BatchConfig(AccessConfig):
    """Settings of `octavo batch run`."""

    model: str = field(
        default="",
        metadata={
            "positional": True,
            "help": "start `octavo serve MODEL` for the run; without it the server at --url is used",
        },
    )
    input: Path | None = field(
        default=None,
        metadata={
            "help": "the requests: OpenAI's batch format, or a prompt or a request's body a line",
            "also": ("--in",),
            "metavar": "FILE",
        },
    )
    output: Path | None = field(
        default=None,
        metadata={
            "help": "the results, in OpenAI's batch format; those that a killed run left there are kept and not "
            "computed again",
            "also": ("--out",),
            "metavar": "FILE",
        },
    )
    ordered: bool = field(
        default=False, metadata={"help": "write results in the order of the requests instead of as they are done"}
    )
    retry_failed: bool = field(
        default=False, metadata={"help": "send requests again whose results of an earlier run are failures"}
    )
    window: int = field(default=256, metadata={"help": "most requests on their way at once"})
    give_up_s: float = field(
        default=300.0, metadata={"help": "stop when nothing at all was answered for so long; what is done is kept"}
    )

    url: str = field(
        default="http://127.0.0.1:8000", metadata={"group": _SERVER, "help": "a running server's HTTP API"}
    )
    serve_flag: tuple[str, ...] = field(
        default=(),
        metadata={
            "group": _SERVER,
            "help": "with MODEL: an option for `octavo serve`, such as --serve-flag=--device=cpu",
            "verbatim": True,
        },
    )

    served_model: str = field(
        default="", metadata={"group": _DEFAULTS, "help": "the model of requests that name none; default: the server's"}
    )
    max_tokens: int | None = field(default=None, metadata={"group": _DEFAULTS, "help": "most tokens of an answer"})
    temperature: float | None = field(
        default=None, metadata={"group": _DEFAULTS, "help": "0 takes the likeliest token"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, flag in (("input", "--in"), ("output", "--out")):
            if getattr(self, name) is None:
                raise ValueError(f"{flag} is missing: octavo batch run --in requests.jsonl --out results.jsonl")
        if not self.model:
            self.check_url(self.url)
        if self.window < 1 or self.give_up_s <= 0:
            raise ValueError("--window and --give-up-s must be positive")


def main(argv: Sequence[str]) -> int:
    """Run a batch; `argv[0]` is the command's name. Return 0 if all succeeded, 3 if some failed, 1 if it stopped."""
    if argv[1:2] in (["-h"], ["--help"]):
        print(f"{_USAGE}\n\n`octavo batch run --help` shows the options.")
        return 0
    if len(argv) < 2 or argv[1] != "run":
        near = difflib.get_close_matches(argv[1], ["run"]) if len(argv) > 1 else []
        print(f"octavo batch: unknown command {argv[1]!r}; did you mean `run`?" if near else _USAGE, file=sys.stderr)
        return 2
    config = server_options.load(
        BatchConfig, argv[2:], prog="octavo batch run", description="Answers the requests of a file."
    )
    from octavo.services.batch.results import ResultsError
    from octavo.services.batch.runner import GaveUpError
    from octavo.services.offline.local_server import LocalServerError

    try:
        if importlib.util.find_spec("aiohttp") is None:
            raise CommandError("aiohttp is missing: pip install aiohttp")
        assert config.input is not None, "checked"
        if not config.input.is_file():
            raise CommandError(f"there is no file {config.input}")
        return asyncio.run(_run(config))
    except (CommandError, ResultsError, GaveUpError, LocalServerError, OSError) as error:
        print(f"octavo batch: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("octavo batch: stopped; the same command goes on from here", file=sys.stderr)
        return 130


async def _run(config: BatchConfig) -> int:
    import aiohttp

    from octavo.services.batch.lines import read_lines
    from octavo.services.batch.results import ResultFile
    from octavo.services.batch.runner import BatchRun
    from octavo.services.offline.http_sender import HttpSender
    from octavo.services.offline.local_server import LocalServer

    assert config.input is not None, "checked"
    assert config.output is not None, "checked"
    async with AsyncExitStack() as stack:
        results = stack.enter_context(ResultFile(config.output, retry_failed=config.retry_failed))
        if config.model:
            url = stack.enter_context(LocalServer(config.model, config.serve_flag)).url
        else:
            url = config.check_url(config.url)
        send = await stack.enter_async_context(HttpSender(url, config.token(), config.ssl_context()))
        try:
            model = config.served_model or await send.only_model()
        except (aiohttp.ClientError, TimeoutError, OSError, LookupError, ValueError) as error:
            raise CommandError(f"{config.explain_http(error, url)}; or name a MODEL to start a server") from None
        defaults = {"model": model, "max_tokens": config.max_tokens, "temperature": config.temperature}
        given = {name: value for name, value in defaults.items() if value is not None}
        report = stack.enter_context(_reporting(config.input.stat().st_size, results))
        run = BatchRun(
            _named_once(read_lines(config.input, given)),
            results,
            send,
            window=config.window,
            ordered=config.ordered,
            give_up_s=config.give_up_s,
            on_result=report.add,
        )
        await run.run()
    print(report.summary())
    return 3 if results.num_failed else 0


def _named_once(lines: Iterator[Line]) -> Iterator[Line]:
    """Yield the lines; say so, once, if two of the first have the same custom_id."""
    seen: set[str] = set()
    for line in lines:
        if line.custom_id in seen:
            what = f"line {line.index + 1} has the custom_id {line.custom_id!r} of an earlier one"
            print(f"octavo batch: {what}: only the order can tell their results apart", file=sys.stderr)
            yield line
            break
        if len(seen) < _MAX_NAMES:
            seen.add(line.custom_id)
        yield line
    yield from lines


class _Report:
    """How far a run is: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, input_bytes: int, results: ResultFile, bar: Any) -> None:
        self._input_bytes = max(input_bytes, 1)
        self._results = results
        self._bar = bar
        self._task = bar.add_task("", total=self._input_bytes) if bar else None
        self._started = self._said = time.monotonic()
        self._read_before = -1  # bytes of the input that were done when the run began: they took no time of it
        self._read = 0
        self._tokens = 0
        self._num_new = 0

    def add(self, line: Line, answer: Answer) -> None:
        """Count a result."""
        if self._read_before < 0:
            self._read_before = line.end_offset
        self._read = max(self._read, line.end_offset)
        self._num_new += 1
        usage = answer.body.get("usage")
        if isinstance(usage, dict):
            self._tokens += usage.get("completion_tokens") or usage.get("total_tokens") or 0
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=self._read, description=self._state(now))
        elif now - self._said > _SAY_S:
            self._said = now
            print(f"octavo batch: {self._state(now)}, {self._left(now)}", file=sys.stderr, flush=True)

    def summary(self) -> str:
        """Return the last line."""
        seconds = time.monotonic() - self._started
        return (
            f"{self._results.path}: {self._results.num_done:,} results, {self._results.num_failed:,} of them failures; "
            f"{self._num_new:,} of this run, {self._tokens:,} tokens in {seconds:.1f} s, {self._rate(seconds)}"
        )

    def _state(self, now: float) -> str:
        failed = f", {self._results.num_failed:,} failed" if self._results.num_failed else ""
        return f"{self._results.num_done:,} done{failed}, {self._rate(now - self._started)}"

    def _rate(self, seconds: float) -> str:
        return f"{self._tokens / max(seconds, 1e-9):,.0f} tokens/s"

    def _left(self, now: float) -> str:
        share = (self._read - self._read_before) / max(self._input_bytes - self._read_before, 1)
        if share <= 0:
            return "time left unknown"
        left_s = (now - self._started) * (1 - share) / share
        return f"about {left_s / 60:.0f} min left" if left_s > 90 else f"about {left_s:.0f} s left"


@contextmanager
def _reporting(input_bytes: int, results: ResultFile) -> Iterator[_Report]:
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield _Report(input_bytes, results, None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns: list[Any] = [BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield _Report(input_bytes, results, bar)
