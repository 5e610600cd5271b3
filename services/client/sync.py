"""The client for programs that are not asynchronous: the same calls, each waiting for its answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from octavo.inference.v1 import generation_pb2, load_pb2, model_pb2
from octavo.services.client.batch import BatchResult
from octavo.services.client.client import Client
from octavo.services.client.embeddings import Embeddings, EmbedOptions, Ranked
from octavo.services.client.request import BatchItem, MessageLike, RequestOptions
from octavo.services.client.stream import Result, Stream

T = TypeVar("T")


class SyncClient:
    """`with SyncClient("127.0.0.1:50051") as client: print(client.generate("Hello").text)`.

    Arguments are those of Client, which runs on an event loop in a thread of its own. Any threads may call at once.
    """

    def __init__(
        self,
        address: str | Sequence[str] = "127.0.0.1:50051",
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str = "",
        timeout_s: float | None = None,
        resume_for_s: float = 30.0,
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._finishing: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="octavo-client", daemon=True)
        self._thread.start()

        async def connect() -> Client:
            return Client(address, credentials=credentials, token=token, timeout_s=timeout_s, resume_for_s=resume_for_s)

        try:
            self._client = self._run(connect())
        except BaseException:
            self._stop_loop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; calls that still run are cancelled. Nothing happens the second time."""
        if self._thread.is_alive():
            self._run(self._client.close())
            self._stop_loop()

    def stream(self, prompt: str | None = None, **options: Unpack[RequestOptions]) -> SyncStream:
        """Start to generate; iterate over the result. Arguments are those of Client.stream."""
        return SyncStream(self._client.stream(prompt, **options), self._run, self._finish)

    def generate(self, prompt: str | None = None, **options: Unpack[RequestOptions]) -> Result:
        """Generate and return the whole output. Arguments are those of Client.stream."""
        return self._run(self._client.generate(prompt, **options))

    def batch(
        self, items: Iterable[BatchItem], *, ordered: bool = False, timeout_s: float | None = None
    ) -> Iterator[BatchResult]:
        """Generate for many requests over one call; see Client.batch. `items` is read in the client's thread."""

        async def start() -> AsyncIterator[BatchResult]:
            return self._client.batch(items, ordered=ordered, timeout_s=timeout_s)

        results: Any = self._run(start())
        try:
            while (result := self._run(_following(results))) is not None:
                yield result
        finally:
            self._finish(_closed(results))

    def embed(
        self,
        inputs: str | Sequence[str | Sequence[int]],
        *,
        timeout_s: float | None = None,
        **options: Unpack[EmbedOptions],
    ) -> Embeddings:
        """Return a vector for each input; see Client.embed."""
        return self._run(self._client.embed(inputs, timeout_s=timeout_s, **options))

    def rerank(
        self, query: str, documents: Sequence[str], *, model: str = "", top_n: int | None = None
    ) -> list[Ranked]:
        """Return the documents by how well they answer the query, best first."""
        return self._run(self._client.rerank(query, documents, model=model, top_n=top_n))

    def cancel(self, request_id: str) -> generation_pb2.CancelGenerationResponse:
        """End a request by its id, whoever started it."""
        return self._run(self._client.cancel(request_id))

    def models(self) -> Sequence[model_pb2.Model]:
        """Return all models, by name."""
        return self._run(self._client.models())

    def tokenize(
        self,
        texts: str | Sequence[str] = (),
        *,
        model: str = "",
        messages: Sequence[MessageLike] | None = None,
        omit_special_tokens: bool = False,
    ) -> list[list[int]]:
        """Return the token ids of each text, then those of the chat, if one is given."""
        return self._run(
            self._client.tokenize(texts, model=model, messages=messages, omit_special_tokens=omit_special_tokens)
        )

    def detokenize(
        self, sequences: Sequence[Sequence[int]], *, model: str = "", keep_special_tokens: bool = False
    ) -> list[str]:
        """Return the text of each sequence of token ids."""
        return self._run(self._client.detokenize(sequences, model=model, keep_special_tokens=keep_special_tokens))

    def load(self) -> Sequence[load_pb2.SchedulerLoad]:
        """Return how busy each scheduler is."""
        return self._run(self._client.load())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the thread; if the caller is interrupted, cancel it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Run what cleans up after an iteration; the garbage collector ends an abandoned one, in any thread."""
        if self._loop.is_closed():
            work.close()  # closing the client has ended the call
        elif threading.current_thread() is self._thread:
            self._finishing.add(task := self._loop.create_task(work))
            task.add_done_callback(self._finishing.discard)
        else:
            self._run(work)

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _following(items: AsyncIterator[T]) -> T | None:
    """Return the next item, None after the last."""
    return await anext(items, None)


async def _closed(items: Any) -> None:
    """Close a generator; when the caller was interrupted, its last step may still be on the way out."""
    while items.ag_running:  # noqa: ASYNC110 - nobody else is told
        await asyncio.sleep(0)
    await items.aclose()


class SyncStream:
    """Iterates over the Deltas of one request; see Stream, which it wraps as `stream`."""

    def __init__(self, stream: Stream, run: Any, finish: Any) -> None:
        self.stream = stream
        self._run = run
        self._finish = finish

    def __iter__(self) -> Iterator[generation_pb2.Delta]:
        """Yield each Delta. Raises OctavoError if the call fails; after `cancel`, just ends."""
        deltas: Any = aiter(self.stream)
        try:
            while (delta := self._run(_following(deltas))) is not None:
                yield delta
        finally:
            self._finish(_closed(deltas))
            self._finish(self._leave())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._run(self._leave())

    def cancel(self) -> None:
        """End the request; iteration ends without an error."""
        self._run(self._leave())

    async def _leave(self) -> None:
        async with self.stream:
            pass
