"""What runs in the actors of the Ray Data operators: an octavo.LLM, and a batch of rows at a time for each thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pyarrow as pa

from octavo.services.client import BatchItem, BatchResult, ClientClosedError, OctavoError
from octavo.services.client.request import split_options
from octavo.services.offline.llm import LLM

_ATTEMPTS = 3  # servers that a row may lose


class Engine:
    """An octavo.LLM for several threads, started again if its server is gone as a whole.

    The thread that notices first closes the old one; the calls of the others then end with ClientClosedError.

    The server itself starts again what dies below it, so this is for a server that was killed, or gave up.
    """

    def __init__(self, model: str, options: Mapping[str, str | float | bool]) -> None:
        self._start: Callable[[], LLM] = lambda: LLM(model, verbose=True, **options)
        self._lock = threading.Lock()
        self._llm = self._start()

    @property
    def llm(self) -> LLM:
        """A running one."""
        with self._lock:
            if not self._llm.is_running:
                self._llm.close()
                self._llm = self._start()
            return self._llm


class Generator:
    """Adds columns to batches. See `generate` for the arguments."""

    def __init__(
        self,
        model: str,
        engine_options: Mapping[str, str | float | bool],
        column: str,
        prefix: str,
        options: Mapping[str, Any],
    ) -> None:
        self._engine = Engine(model, engine_options)
        self._column = column
        self._prefix = prefix
        self._options = options

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the batch with its results, row by row."""
        found: dict[int, BatchResult] = {}
        errors: dict[int, str] = {}
        items: dict[int, BatchItem] = {}
        for row, prompt in enumerate(table.column(self._column).to_pylist()):
            try:
                items[row] = generation_item(prompt, self._options)
            except (TypeError, ValueError) as error:
                errors[row] = str(error)
        for _ in range(_ATTEMPTS):
            left = [row for row in items if row not in found or is_lost(found[row])]
            if not left:
                break
            try:
                for result in self._engine.llm.client.batch(items[row] for row in left):
                    found[left[result.index]] = result
            except OctavoError as error:  # the server as a whole: its results so far stand
                errors |= {row: str(error) for row in left}
        results = [found.get(row) for row in range(table.num_rows)]
        return with_columns(table, self._prefix, generation_columns(results, errors))


class Embedder:
    """Adds columns to batches. See `embed` for the arguments."""

    def __init__(
        self,
        model: str,
        engine_options: Mapping[str, str | float | bool],
        column: str,
        prefix: str,
        options: Mapping[str, Any],
    ) -> None:
        self._engine = Engine(model, engine_options)
        self._column = column
        self._prefix = prefix
        self._options = options

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the batch with a vector for each row."""
        inputs = table.column(self._column).to_pylist()
        vectors: list[Any] = [None] * len(inputs)
        errors: list[str | None] = [None if each is not None else "there is no text" for each in inputs]
        self._fill(inputs, [row for row, error in enumerate(errors) if error is None], vectors, errors)
        columns = {
            "embedding": pa.array(vectors, pa.list_(pa.float32())),
            "error": pa.array(errors, pa.string()),
        }
        return with_columns(table, self._prefix, columns)

    def _fill(self, inputs: Sequence[Any], rows: Sequence[int], vectors: list[Any], errors: list[str | None]) -> None:
        """Fill in vectors or errors of rows: together, or each by itself where one of them is wrong."""
        if not rows:
            return
        try:
            found = self._embed([inputs[row] for row in rows])
        except (OctavoError, TypeError, ValueError) as error:
            if len(rows) == 1:
                errors[rows[0]] = str(error)
                return
            for row in rows:
                self._fill(inputs, [row], vectors, errors)
            return
        for row, vector in zip(rows, found, strict=True):
            vectors[row] = vector

    def _embed(self, inputs: list[Any]) -> Sequence[Any]:
        for attempt in range(_ATTEMPTS):
            try:
                return self._engine.llm.embed(inputs, **cast(Any, self._options))
            except OctavoError as error:
                is_lost = error.is_broken_call or isinstance(error, ClientClosedError)
                if not is_lost or attempt + 1 == _ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returns or raises")


def generation_item(prompt: Any, options: Mapping[str, Any]) -> BatchItem:
    """Return a prompt of a row as an item of a batch. Raises TypeError and ValueError for one that is none."""
    if prompt is None:
        raise ValueError("there is no prompt")
    if isinstance(prompt, str):
        kind = "prompt"
    elif prompt and isinstance(prompt[0], Mapping):
        kind = "messages"
    else:
        kind = "token_ids"
    item = cast(BatchItem, {**options, kind: prompt})
    checked = cast(Any, options if kind == "prompt" else item)
    split_options(prompt if kind == "prompt" else None, checked)
    return item


def is_lost(result: BatchResult) -> bool:
    """Return whether an item was lost with its server, and is no failure of its own."""
    return result.error is not None and result.error.is_broken_call


def generation_columns(results: Sequence[BatchResult | None], errors: Mapping[int, str]) -> dict[str, pa.Array]:
    """Return the new columns. A row without a result has an error."""
    good = [each.result if each else None for each in results]
    texts = [each.text if each else None for each in good]
    return {
        "text": pa.array(texts, pa.string()),
        "finish_reason": pa.array([each.finish_reason if each else None for each in good], pa.string()),
        "prompt_tokens": pa.array([each.usage.prompt_tokens if each else None for each in good], pa.int64()),
        "output_tokens": pa.array([each.usage.output_tokens if each else None for each in good], pa.int64()),
        "error": pa.array(
            [
                str(each.error) if each and each.error else None if each else errors[row]
                for row, each in enumerate(results)
            ],
            pa.string(),
        ),
    }


def with_columns(table: pa.Table, prefix: str, columns: Mapping[str, pa.Array]) -> pa.Table:
    """Return the table with columns added at its end. Raises ValueError if it has one of them."""
    for name, values in columns.items():
        if prefix + name in table.column_names:
            raise ValueError(f"the dataset has a column {prefix + name} already: choose a prefix")
        table = table.append_column(prefix + name, values)
    return table
