"""`octavo.LLM`: a model in a Python program."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack, cast

from octavo.services.client import (
    BatchItem,
    BatchResult,
    GenerationOptions,
    OctavoError,
    Result,
    SyncClient,
    SyncStream,
)
from octavo.services.client.calls import check_not_forked
from octavo.services.client.embeddings import EmbedOptions
from octavo.services.client.request import MessageLike, RequestOptions
from octavo.services.offline.local_server import LocalServer

Prompt = str | Sequence[int]
"""Plain text, or token ids."""


class LLM:
    """Runs a model and generates with it.

        with LLM("demo") as llm:
            print(llm.generate("The capital of France is", max_new_tokens=16)[0].text)

    The work is done by a server of its own (`octavo serve`: scheduler, workers, gateway), which is started here and
    stops when the LLM is closed or this program ends. Prompts are batched there, whatever thread they come from. If a
    process of the server dies it is started again, and its work goes on.

    model    a folder, a .gguf file, a hub id, or "demo"
    verbose  pass on what the server says to stderr
    options  of `octavo serve`, with _ for -: `device="cpu"`, `kv_cache_memory="4GiB"`, `max_model_len=4096`

    Raises LocalServerError, with one line that says why, if the model cannot be served.
    """

    def __init__(self, model: str, *, verbose: bool = False, **options: str | float | bool) -> None:
        check_not_forked()  # before a server is started for nothing
        self._model = str(model)
        with contextlib.ExitStack() as stack:
            self._server = server = stack.enter_context(LocalServer(str(model), option_flags(options), verbose=verbose))
            self.client = stack.enter_context(SyncClient(server.address))
            """For everything else that the API can do."""
            self.server_pid = server.pid
            """The process that looks after the server's processes."""
            self._closing = stack.pop_all()

    def __repr__(self) -> str:
        return f"<LLM {self._model!r} at {self._server.address}{'' if self.is_running else ' (closed)'}>"

    @property
    def is_running(self) -> bool:
        """Whether the server has not ended. What dies below it is started again; it ends if that does not help."""
        return self._server.is_running

    def generate(self, prompts: Prompt | Iterable[Prompt], **options: Unpack[GenerationOptions]) -> list[Result]:
        """Return the continuation of each prompt, in order; without `max_new_tokens` it can fill the context.

        Raises OctavoError for the first prompt that fails, and ends the others; `generate_each` goes on.
        """
        return _all(self.generate_each(_several(prompts), ordered=True, **options))

    def generate_each(
        self, prompts: Iterable[Prompt], *, ordered: bool = False, **options: Unpack[GenerationOptions]
    ) -> Iterator[BatchResult]:
        """Yield a BatchResult for each prompt as it is done. `prompts` is read as there is room: it may be endless."""
        return self.client.batch((_item(prompt, options) for prompt in prompts), ordered=ordered)

    def stream(self, prompt: str | None = None, **options: Unpack[RequestOptions]) -> SyncStream:
        """Start to generate; iterate over the result: `for delta in llm.stream("Hello", max_new_tokens=16): ...`.

        For a chat give `messages`, for token ids `token_ids`, instead of the prompt.
        """
        return self.client.stream(prompt, **options)

    def chat(
        self,
        conversations: Sequence[MessageLike] | Iterable[Sequence[MessageLike]],
        **options: Unpack[GenerationOptions],
    ) -> list[Result]:
        """Return the answer to each conversation, or to the one. Raises what `generate` does.

        A conversation is a list of messages: `{"role": "user", "content": "Hello"}`.
        """
        several = list(conversations)
        if several and not isinstance(several[0], Sequence):
            several = [cast(Any, several)]
        return _all(self.chat_each(cast(Any, several), ordered=True, **options))

    def chat_each(
        self,
        conversations: Iterable[Sequence[MessageLike]],
        *,
        ordered: bool = False,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[BatchResult]:
        """Yield a BatchResult for each conversation as it is answered."""
        items = (cast(BatchItem, {**options, "messages": messages}) for messages in conversations)
        return self.client.batch(items, ordered=ordered)

    def embed(
        self, inputs: str | Sequence[str | Sequence[int]], **options: Unpack[EmbedOptions]
    ) -> Sequence[array[float]]:
        """Return a vector for each text: an array of float32. The model must be one for embeddings."""
        return self.client.embed(inputs, **options).vectors

    def close(self) -> None:
        """Stop the server. Calls of other threads raise ClientClosedError. Nothing happens the second time."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def option_flags(options: Mapping[str, str | float | bool]) -> list[str]:
    """Return options of `octavo serve`, given by name, as its command line has them."""
    return [_flag(*each) for each in options.items()]


def _flag(name: str, value: str | float | bool) -> str:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return flag if value else f"--no-{flag[2:]}"
    return f"{flag}={value}"


def _several(prompts: Prompt | Iterable[Prompt]) -> Iterable[Prompt]:
    if isinstance(prompts, str) or (isinstance(prompts, Sequence) and prompts and isinstance(prompts[0], int)):
        return [cast(Prompt, prompts)]
    return cast(Iterable[Prompt], prompts)


def _item(prompt: Prompt, options: GenerationOptions) -> BatchItem:
    return cast(BatchItem, {**options, ("prompt" if isinstance(prompt, str) else "token_ids"): prompt})


def _all(results: Iterator[BatchResult]) -> list[Result]:
    found: list[Result] = []
    with contextlib.closing(cast(Any, results)):
        for result in results:
            if result.error is not None:
                error: OctavoError = result.error
                error.add_note(f"prompt {result.index}")
                raise error
            assert result.result is not None, "neither a result nor an error"
            found.append(result.result)
    return found
