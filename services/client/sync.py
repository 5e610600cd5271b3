"""The client for programs that are not asynchronous: the same calls, each waiting for its answer."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import queue
import threading
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from octavo.inference.v1 import generation_pb2, load_pb2, model_pb2
from octavo.services.client.batch import BatchResult
from octavo.services.client.calls import check_not_forked
from octavo.services.client.client import Client
from octavo.services.client.embeddings import Embeddings, EmbedOptions, Labelled, Ranked
from octavo.services.client.errors import ClientClosedError
from octavo.services.client.request import BatchItem, MessageLike, RequestOptions
from octavo.services.client.stream import Result, Stream

T = TypeVar("T")


class SyncClient:
    """`with SyncClient("127.0.0.1:50051") as client: print(client.generate("Hello", max_new_tokens=16).text)`.

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
        check_not_forked()
        self._loop = asyncio.new_event_loop()
        self._finishing: set[asyncio.Task[None]] = set()
        # What starts work looks at `_is_closed`, and `close` sets it. The garbage collector can end a stream at any
        # point of a thread, so also where the thread has the lock already.
        self._lock = threading.RLock()
        self._is_closed = False
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._loop.run_forever, name="octavo-client", daemon=True)
        self._thread.start()

        async def connect() -> Client:
            return Client(address, credentials=credentials, token=token, timeout_s=timeout_s, resume_for_s=resume_for_s)

        try:
            self._client = self._run(connect())
        except BaseException:
            self._stop_loop()
            raise

    def __repr__(self) -> str:
        return f"<SyncClient{' (closed)' if self._is_closed else ''}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Calls of other threads that still run, and all later ones, raise ClientClosedError.

        Nothing happens the second time.
        """
        if os.getpid() != self._pid:
            return  # a fork has neither the connections nor the thread
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            closing = asyncio.run_coroutine_threadsafe(self._close(), self._loop)
        try:
            closing.result()
        finally:
            self._stop_loop()

    async def _close(self) -> None:
        """End the client and everything that runs on the loop, so that whoever waits for it is told."""
        await self._client.close()
        while others := asyncio.all_tasks() - {asyncio.current_task()}:  # the end of one may start another
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_asyncgens()

    def stream(self, prompt: str | None = None, **options: Unpack[RequestOptions]) -> SyncStream:
        """Start to generate; iterate over the result. Arguments are those of Client.stream."""
        return SyncStream(self._client.stream(prompt, **options), self._run, self._finish)

    def generate(self, prompt: str | None = None, **options: Unpack[RequestOptions]) -> Result:
        """Generate and return the whole output. Arguments are those of Client.stream."""
        return self._run(self._client.generate(prompt, **options))

    def batch(
        self, items: Iterable[BatchItem], *, ordered: bool = False, timeout_s: float | None = None
    ) -> Iterator[BatchResult]:
        """Generate for many requests over one call; see Client.batch.

        `items` are read in a thread of their own: they may wait, and may call this client.
        """

        async def start() -> AsyncIterator[BatchResult]:
            return self._client.batch(reader, ordered=ordered, timeout_s=timeout_s)

        with contextlib.closing(_Reader(items)) as reader:
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

    def score(self, queries: str | Sequence[str], documents: Sequence[str], *, model: str = "") -> list[float]:
        """Return how well each document answers its query; see Client.score."""
        return self._run(self._client.score(queries, documents, model=model))

    def classify(self, texts: str | Sequence[str | tuple[str, str]], *, model: str = "") -> list[Labelled]:
        """Return the labels of each text, or pair of texts."""
        return self._run(self._client.classify(texts, model=model))

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
        """Run a coroutine in the thread; if the caller is interrupted, cancel it. Raises what it does."""
        try:
            check_not_forked()
            assert threading.current_thread() is not self._thread, "the client's thread waits for itself"
            with self._lock:
                if self._is_closed:
                    raise ClientClosedError
                future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except BaseException:
            work.close()
            raise
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise ClientClosedError from None  # nothing else cancels what a caller waits for
        except BaseException:
            future.cancel()
            raise

    def _finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Run what cleans up after an iteration; the garbage collector ends an abandoned one, in any thread."""
        if threading.current_thread() is self._thread:
            self._finishing.add(task := self._loop.create_task(work))
            task.add_done_callback(self._finishing.discard)
        elif os.getpid() != self._pid:
            work.close()  # a fork has the parent's calls, and no thread that could end them
        else:
            with contextlib.suppress(ClientClosedError):  # closing the client has ended the call
                self._run(work)

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _Reader(AsyncIterator[BatchItem]):
    """Reads an iterable in a thread of its own, an item when one is asked for; a context of `contextlib.closing`.

    The thread is a daemon: items that never come keep no program from ending.
    """

    def __init__(self, items: Iterable[BatchItem]) -> None:
        self._items = items
        self._asked: queue.SimpleQueue[asyncio.Future[BatchItem] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def __anext__(self) -> BatchItem:
        if self._thread is None:
            self._thread = threading.Thread(target=self._read, name="octavo-items", daemon=True)
            self._thread.start()
        future: asyncio.Future[BatchItem] = asyncio.get_running_loop().create_future()
        self._asked.put(future)
        return await future

    def close(self) -> None:
        """Have the thread end when its item has come."""
        self._asked.put(None)

    def _read(self) -> None:
        items: Iterator[BatchItem] | None = None
        while (future := self._asked.get()) is not None:
            item: Any = None
            failure: Exception | None = None
            try:
                items = iter(self._items) if items is None else items
                item = next(items)
            except StopIteration:
                failure = StopAsyncIteration()
            except Exception as error:
                failure = error
            except BaseException as error:  # in a task it would end the loop, and with it every other call
                failure = RuntimeError(f"the items ended with {error!r}")
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                future.get_loop().call_soon_threadsafe(_settle, future, item, failure)


def _settle(future: asyncio.Future[T], value: T, failure: Exception | None) -> None:
    if future.done():  # nobody waits any more
        return
    if failure is None:
        future.set_result(value)
    else:
        future.set_exception(failure)


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
        self._finish(self._leave())

    def cancel(self) -> None:
        """End the request; iteration ends without an error."""
        self._finish(self._leave())

    async def _leave(self) -> None:
        async with self.stream:
            pass
