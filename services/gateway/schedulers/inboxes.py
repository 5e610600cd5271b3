"""The requests that are out at one scheduler, by handle: what it sends goes to their inboxes."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable

from octavo.inference.v1 import generation_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.gateway.schedulers.request_stream import CandidateInbox, Place, RequestStream


class StepColumns:
    """The log probability columns of a step, which have entries for some of its rows only."""

    def __init__(self, step: scheduler_pb2.StepOutputs, rows: Iterable[tuple[int, int | None]]) -> None:
        """`rows`: tokens of each row, and how many alternatives each of them has; None if it has no entry.

        Raises ValueError if the columns have other entries than these rows: then no entry's owner is known, and
        nothing of them may be given to anybody.
        """
        entries = [(count, count * width) for count, width in rows if width is not None]
        tokens, alternatives = sum(count for count, _ in entries), sum(count for _, count in entries)
        found = len(step.logprobs), len(step.ranks), len(step.candidate_token_ids), len(step.candidate_logprobs)
        wanted = tokens, tokens, alternatives, alternatives
        if found != wanted:
            raise ValueError(f"columns of log probabilities have {found} entries, their rows {wanted}")
        self._step = step
        self._tokens = slice(0, 0)
        self._alternatives = slice(0, 0)

    def next(self, count: int, width: int) -> None:
        """Go to the next row that has entries: `count` tokens with `width` alternatives each."""
        self._tokens = slice(self._tokens.stop, self._tokens.stop + count)
        self._alternatives = slice(self._alternatives.stop, self._alternatives.stop + count * width)

    def append_to(self, candidate: CandidateInbox) -> None:
        """Copy this row's entries."""
        step, logprobs = self._step, candidate.logprobs
        logprobs.chosen.extend(step.logprobs[self._tokens])
        logprobs.ranks.extend(step.ranks[self._tokens])
        logprobs.candidate_token_ids.extend(step.candidate_token_ids[self._alternatives])
        logprobs.candidate_logprobs.extend(step.candidate_logprobs[self._alternatives])


_MAX_RETIRED = 65_536  # some 10 MB
_RETIRED_S = 60.0  # nothing of a scheduler is on its way for so long


class PeerInboxes:
    """Owner of which request is meant by a handle. What comes for others is ignored."""

    def __init__(self) -> None:
        self._streams: dict[int, RequestStream] = {}  # by handle
        # Alternatives for each token, and since when, of requests with log probabilities that are out no more: what
        # was on its way when they ended still has entries in the columns, which are skipped.
        self._retired: OrderedDict[int, tuple[int, float]] = OrderedDict()

    def __contains__(self, handle: int) -> bool:
        return handle in self._streams

    @property
    def streams(self) -> list[RequestStream]:
        """The requests that are out."""
        return list(dict.fromkeys(self._streams.values()))

    def get(self, handle: int) -> RequestStream | None:
        """Return the request under a handle."""
        return self._streams.get(handle)

    def add(
        self, handle: int, stream: RequestStream, candidates: Iterable[CandidateInbox], place: Place | None = None
    ) -> None:
        """Put candidates of a request under a handle; `place` is whose inboxes these are."""
        for candidate in candidates:
            candidate.handle, candidate.place = handle, place
        self._streams[handle] = stream

    def retire(self, handle: int, stream: RequestStream) -> None:
        """Take nothing more for a handle, though something may still be on its way."""
        self._streams.pop(handle, None)
        if stream.wants_logprobs:
            now = time.monotonic()
            self._retired[handle] = stream.submit.logprobs, now
            oldest = next(iter(self._retired.values()))[1]
            while len(self._retired) > _MAX_RETIRED or oldest < now - _RETIRED_S:
                self._retired.popitem(last=False)
                oldest = next(iter(self._retired.values()))[1]

    def take(self, handle: int) -> tuple[RequestStream, list[CandidateInbox]] | None:
        """Remove and return what is out under a handle."""
        stream = self._streams.get(handle)
        if stream is None:
            return None
        self.retire(handle, stream)
        return stream, take_candidates(stream, handle)

    def take_all(self) -> list[tuple[RequestStream, list[CandidateInbox]]]:
        """Remove and return everything."""
        everything = [(stream, take_candidates(stream, handle)) for handle, stream in self._streams.items()]
        self._streams.clear()
        self._retired.clear()
        return everything

    def on_step(self, step: scheduler_pb2.StepOutputs) -> None:
        """Hand out the tokens of a step. IndexError or ValueError: they do not fit their contract."""
        for row in step.prompt_logprobs:
            self._on_prompt(row)
        if step.logprobs or step.token_counts or step.candidate_indexes:
            self._on_general_rows(step)
        else:
            streams = self._streams
            for handle, token_id in zip(step.handles, step.token_ids, strict=True):
                stream = streams.get(handle)
                if stream is not None:
                    candidate = stream.candidates[0]
                    if candidate.handle == handle and candidate.finished is None:
                        candidate.token_ids.append(token_id)
                        stream.wake()
        if step.vector_handles:
            self._on_vectors(step)
        for finished in step.finished:
            self._on_finished(finished)

    def _on_prompt(self, row: scheduler_pb2.PromptLogprobs) -> None:
        """Take log probabilities of a prompt. A scheduler that goes on with a request repeats some."""
        stream = self._streams.get(row.handle)
        if stream is not None:
            stream.add_prompt_logprobs(row.position, row.columns)
            stream.wake()

    def _on_vectors(self, step: scheduler_pb2.StepOutputs) -> None:
        columns = (step.vector_handles, step.vector_candidate_indexes, step.vector_sizes)
        vectors, end = step.vectors, 0  # the field is copied whenever it is read
        for handle, index, size in zip(*columns, strict=True):
            start, end = end, end + 4 * size
            stream = self._streams.get(handle)
            if stream is not None:
                candidate = stream.candidates[index]
                if candidate.handle == handle and candidate.finished is None:
                    candidate.vector = vectors[start:end]
                    self._on_finished(scheduler_pb2.Finished(handle=handle, candidate_index=index))

    def _on_general_rows(self, step: scheduler_pb2.StepOutputs) -> None:
        num_rows = len(step.handles)
        counts = step.token_counts or [1] * num_rows
        indexes = step.candidate_indexes or [0] * num_rows
        widths = [self._width(handle) for handle in step.handles]
        columns = StepColumns(step, zip(counts, widths, strict=True))
        at = 0
        for handle, index, count, width in zip(step.handles, indexes, counts, widths, strict=True):
            start, at = at, at + count
            if width is not None:
                columns.next(count, width)
            stream = self._streams.get(handle)
            if stream is None:
                continue
            candidate = stream.candidates[index]
            if candidate.handle == handle and candidate.finished is None:
                candidate.token_ids.extend(step.token_ids[start:at])
                if stream.wants_logprobs:
                    columns.append_to(candidate)
                stream.wake()

    def _width(self, handle: int) -> int | None:
        """Return how many alternatives each token of a handle has in the columns; None if it has no entry there."""
        stream = self._streams.get(handle)
        if stream is None:
            width, _ = self._retired.get(handle, (None, 0.0))
            return width
        return stream.submit.logprobs if stream.wants_logprobs else None

    def _on_finished(self, finished: scheduler_pb2.Finished) -> None:
        stream = self._streams.get(finished.handle)
        if stream is None:
            return
        candidate = stream.candidates[finished.candidate_index]
        if candidate.handle != finished.handle or candidate.finished is not None:
            return
        candidate.finished = finished
        candidate.handle = 0
        if not any(other.handle == finished.handle for other in stream.candidates):
            self.retire(finished.handle, stream)
        stream.wake_at_end()

    def on_progress(self, progress: scheduler_pb2.Progress) -> None:
        """Hand out signs of life."""
        for handle, phase, position, done in zip(
            progress.handles, progress.phases, progress.queue_positions, progress.prefill_tokens_done, strict=True
        ):
            stream = self._streams.get(handle)
            if stream is not None:
                stream.progress = generation_pb2.Progress(
                    phase=generation_pb2.Progress.Phase.Name(phase),
                    queue_position=position,
                    prefill_tokens_done=done,
                )
                stream.wake()


def take_candidates(stream: RequestStream, handle: int) -> list[CandidateInbox]:
    """Return the candidates of a stream that are out under a handle, which is taken from them."""
    taken = [candidate for candidate in stream.candidates if candidate.handle == handle]
    for candidate in taken:
        candidate.handle = 0
    return taken
