"""Gathers the events of a stream into one answer, for calls that do not stream."""

from __future__ import annotations

from octavo.inference.v1 import generation_pb2
from octavo.services.gateway.requests.generation import GenerationRun

# A whole answer needs no wake-up for each token; its end is never held back.
_COALESCE_MS = 20


def ask_for_whole_answer(generation: generation_pb2.Generation) -> None:
    """Change a request, before it is admitted, into one whose answer can be whole."""
    generation.output.parsing.whole_tool_calls = True


async def whole_answer(
    run: GenerationRun, num_candidates: int, max_coalesce_ms: int = 0
) -> generation_pb2.GenerateResponse:
    """Return everything that an admitted request, as `ask_for_whole_answer` makes it, produces. Raises ServingError."""
    answer = _Answer(num_candidates)
    async for part in run.responses(max(_COALESCE_MS, max_coalesce_ms)):
        answer.add(part.event)
    return answer.response()


class _Answer:
    """Gathers the events of a stream into the answer of Generate."""

    def __init__(self, num_candidates: int) -> None:
        self._response = generation_pb2.GenerateResponse(
            candidates=[generation_pb2.Candidate(index=index) for index in range(num_candidates)]
        )
        self._texts: list[list[str]] = [[] for _ in range(num_candidates)]
        self._reasoning: list[list[str]] = [[] for _ in range(num_candidates)]

    def add(self, event: generation_pb2.StreamEvent) -> None:
        """Take the next event."""
        response = self._response
        kind = event.WhichOneof("payload")
        if kind == "delta":
            delta = event.delta
            candidate = response.candidates[delta.candidate_index]
            self._texts[delta.candidate_index].append(delta.text)
            self._reasoning[delta.candidate_index].append(delta.reasoning_text)
            candidate.tool_calls.extend(delta.tool_calls)  # whole ones: see `ask_for_whole_answer`
            candidate.token_ids.extend(delta.token_ids)
            if delta.HasField("logprobs"):
                candidate.logprobs.MergeFrom(delta.logprobs)  # appends to each column
        elif kind == "candidate_finished":
            response.candidates[event.candidate_finished.candidate_index].finished.CopyFrom(event.candidate_finished)
        elif kind == "started":
            response.started.CopyFrom(event.started)
        elif kind == "completed":
            response.completed.CopyFrom(event.completed)

    def response(self) -> generation_pb2.GenerateResponse:
        """Return the answer, once the last event is in."""
        for candidate in self._response.candidates:
            candidate.text = "".join(self._texts[candidate.index])
            candidate.reasoning_text = "".join(self._reasoning[candidate.index])
        return self._response
