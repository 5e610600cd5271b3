"""Streams whose clients read too slowly: what was not read is bounded, and so is the patience.

A candidate with more than MAX_UNREAD tokens that its client has not taken is paused: it is ended at
its scheduler, which frees its blocks for others, and goes on like a lost one, from the tokens that
are known, once the client has read. Nothing else is needed to pause, and the cache makes it cheap.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from octavo.services.gateway.schedulers.request_stream import RequestStream

MAX_UNREAD = 256
"""Tokens of a candidate. A token is at most 172 bytes here, with 20 alternatives: so this is below 64 KiB."""
PATIENCE_S = 30.0


@dataclass
class Verdicts:
    """What is to be done about streams."""

    pause: list[RequestStream] = field(default_factory=list)
    go_on: list[RequestStream] = field(default_factory=list)
    cut_off: list[RequestStream] = field(default_factory=list)


class SlowReaders:
    """Watches all streams, from the outside, a few times a second."""

    def __init__(self) -> None:
        self._paused: dict[RequestStream, tuple[int, float]] = {}  # rounds of its handler, and since when

    def check(self, streams: Iterable[RequestStream], now: float) -> Verdicts:
        """Return what changes now; `now` is a time of the event loop."""
        verdicts = Verdicts()
        seen = self._paused
        self._paused = {}
        for stream in streams:
            known = seen.get(stream)
            if stream.is_reading or stream.ended:
                if known is not None:
                    verdicts.go_on.append(stream)
            elif known is not None:
                rounds, since = known
                since = since if rounds == stream.num_rounds else now
                self._paused[stream] = stream.num_rounds, since
                if now - since >= PATIENCE_S:
                    verdicts.cut_off.append(stream)
            elif any(len(each.token_ids) - each.num_read > MAX_UNREAD for each in stream.candidates):
                self._paused[stream] = stream.num_rounds, now
                verdicts.pause.append(stream)
        return verdicts
