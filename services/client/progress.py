"""What a stream has brought so far, the checks that nothing of it was lost, and the request for the rest."""

from __future__ import annotations

from octavo.inference.v1 import generation_pb2
from octavo.services.client.errors import ProtocolError


class _Candidate:
    def __init__(self, first_offset: int) -> None:
        self.next_offset = first_offset
        self.token_ids: list[int] = []
        self.finished: generation_pb2.CandidateFinished | None = None
        self.has_tail = False  # text that was held back to the end has come, in a delta without tokens


class Progress:
    """Holds a stream to its contract, over all calls it takes: tokens without a gap, exactly one ending."""

    def __init__(self, request: generation_pb2.Generation, wants_ids: bool) -> None:
        """`wants_ids`: the caller asked for token ids, so they have to come."""
        self._request = request
        self._wants_ids = wants_ids
        # Offsets of a continued output go on where it was interrupted.
        self._first_offset = len(request.continue_output.ids)
        self._candidates = [_Candidate(self._first_offset) for _ in range(request.candidate_count or 1)]
        self._next_event = 0
        self._resumed = False
        self.started: generation_pb2.Started | None = None
        self.completed: generation_pb2.Completed | None = None

    @property
    def finished(self) -> dict[int, generation_pb2.CandidateFinished]:
        """How each candidate ended, by its index."""
        return {index: each.finished for index, each in enumerate(self._candidates) if each.finished is not None}

    @property
    def cursors(self) -> list[generation_pb2.Cursor]:
        """How far each candidate has come."""
        return [
            generation_pb2.Cursor(candidate_index=index, next_token_offset=each.next_offset)
            for index, each in enumerate(self._candidates)
        ]

    def restart(self) -> None:
        """Expect a new call, which goes on where the last one broke."""
        self._next_event = 0
        self._resumed = True

    def rest(self, leave_out: int = 0) -> generation_pb2.Generation | None:
        """Return the request that continues the output; None if there is not enough known to ask so.

        leave_out: of the last tokens received, that are to be produced once more.
        """
        rest = generation_pb2.Generation()
        rest.CopyFrom(self._request)
        if self.started is None:
            return rest  # nothing has come: the rest is all of it
        (first, *others) = self._candidates
        received = first.next_offset - self._first_offset
        if others or len(first.token_ids) != received or leave_out > received:
            return None
        rest.sampling.CopyFrom(self.started.effective_sampling)  # the seed included
        rest.stop.CopyFrom(self.started.effective_stop)
        rest.continue_output.ids.extend(first.token_ids[: received - leave_out])
        return rest

    def take(self, event: generation_pb2.StreamEvent) -> bool:
        """Take the next event; return whether it is new to the caller. Raises ProtocolError if it cannot come here."""
        kind = event.WhichOneof("payload")
        if event.sequence_number != self._next_event:
            self._fail(f"event {event.sequence_number} came where {self._next_event} was due")
        if (kind == "started") != (self._next_event == 0):
            self._fail(f"event {event.sequence_number} is {kind}; Started comes first and once")
        if self.completed is not None:
            self._fail(f"{kind} came after Completed")
        self._next_event += 1
        match kind:
            case "started":
                is_new = self.started is None
                self.started = event.started
                return is_new
            case "delta":
                return self._take_delta(event.delta)
            case "candidate_finished":
                return self._take_finished(event.candidate_finished)
            case "completed":
                if missing := [index for index, each in enumerate(self._candidates) if each.finished is None]:
                    self._fail(f"Completed came before the end of candidate {missing[0]}")
                self.completed = event.completed
        return True

    def check_end(self) -> None:
        """Raise ProtocolError if the stream may not end here."""
        if self.completed is None:
            self._fail("the stream ended without Completed")

    def _take_delta(self, delta: generation_pb2.Delta) -> bool:
        index = delta.candidate_index
        if index >= len(self._candidates) or (self._candidates[index].finished is not None and not self._resumed):
            self._fail(f"a delta came for candidate {index}, which has ended or was not asked for")
        candidate = self._candidates[index]
        if not delta.token_count:
            is_repeated, candidate.has_tail = candidate.has_tail, True
            return not is_repeated
        if self._resumed and delta.token_offset + delta.token_count <= candidate.next_offset:
            return False  # the last token, produced once more: see `rest`
        if delta.token_offset != candidate.next_offset:
            self._fail(f"token {delta.token_offset} of candidate {index} came where {candidate.next_offset} was due")
        if self._wants_ids and len(delta.token_ids) != delta.token_count:
            self._fail(f"a delta of {delta.token_count} tokens has {len(delta.token_ids)} token ids")
        candidate.next_offset += delta.token_count
        candidate.token_ids.extend(delta.token_ids)
        if not self._wants_ids:
            delta.ClearField("token_ids")  # they were asked for in case the stream breaks
        return True

    def _take_finished(self, finished: generation_pb2.CandidateFinished) -> bool:
        index = finished.candidate_index
        known = index < len(self._candidates)
        if not known or (self._candidates[index].finished is not None and not self._resumed):
            self._fail(f"candidate {index} ended twice or was not asked for")
        candidate = self._candidates[index]
        if finished.output_tokens != candidate.next_offset:
            came = candidate.next_offset
            self._fail(f"candidate {index} ended with {finished.output_tokens} tokens, {came} arrived")
        is_new = candidate.finished is None
        candidate.finished = finished
        return is_new

    def _fail(self, message: str) -> None:
        raise ProtocolError(message, request_id=self.started.request_id if self.started else "")
