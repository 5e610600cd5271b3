"""The quarantine finds the request that kills workers, and keeps it from killing more."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.requests.sequence import Request, Sequence, SequenceState

QUARANTINE_S = 600.0
MAX_QUARANTINED = 1024  # requests; the oldest is forgotten
MAX_BLAMES = 2
MARGIN = 2  # steps in flight: a sequence is past a crash once it is two tokens further


@dataclass(frozen=True, slots=True)
class QuarantinedRequest:
    """Until when a request is refused, and who was found out with it."""

    until: float
    request_id: str
    tenant: str


class Quarantine:
    """Bisects a batch that died.

    After a crash every sequence in the steps in flight is a suspect, and runs again in the company
    of at most half as many suspects; others run along. A suspect that gets past the point of the
    crash is cleared. If all suspects were of one request when a worker died, it is blamed, and runs
    alone: what ran along may have been the cause. If the worker dies again, it is the culprit.
    """

    def __init__(self) -> None:
        self._company: dict[Sequence, int] = {}  # the most suspects that may run together with it
        self._cleared_at: dict[Sequence, int] = {}  # length at which it is cleared
        self._quarantined: OrderedDict[bytes, QuarantinedRequest] = OrderedDict()  # oldest first

    def __bool__(self) -> bool:
        return bool(self._company)

    def crashed(self, in_flight: Iterable[Sequence], now: float) -> Request | None:
        """Learn that a worker died while it computed these; return the culprit if it is found."""
        computed = dict.fromkeys(in_flight)
        alive = [seq for seq in computed if seq.state is not SequenceState.FINISHED]
        suspects = [seq for seq in alive if seq in self._company] or alive
        for seq in suspects:
            self._company[seq] = max(1, len(suspects) // 2)
            self._cleared_at[seq] = max(len(seq.token_ids) + MARGIN, self._cleared_at.get(seq, 0))
        requests = list(dict.fromkeys(seq.request for seq in suspects))
        if len(requests) != 1:
            return None
        request = requests[0]
        # One that has ended meanwhile, quarantined perhaps, may have been what the worker died of.
        was_alone = all(seq.request is request for seq in computed)
        request.num_blames = min(request.num_blames + 1, MAX_BLAMES if was_alone else MAX_BLAMES - 1)
        if request.num_blames < MAX_BLAMES:
            return None
        submit = request.submit
        self._quarantined[request_key(submit)] = QuarantinedRequest(
            now + QUARANTINE_S, submit.request_id, submit.tenant
        )
        if len(self._quarantined) > MAX_QUARANTINED:
            self._quarantined.popitem(last=False)
        return request

    def may_run(self, seq: Sequence, running: Iterable[Sequence], can_run: Callable[[Sequence], bool]) -> bool:
        """Return whether `seq` may run beside those that run on a group, which `can_run` some and not others."""
        others = list(running)
        if self.is_blamed(seq) or any(map(self.is_blamed, others)):
            return all(other.request is seq.request for other in others)
        if not others and any(self.is_blamed(other) and can_run(other) for other in self._company):
            return False  # an empty group is for the one that has to be alone
        company = self._company.get(seq)
        if company is None:
            return True
        limits = [self._company[other] for other in others if other in self._company]
        return len(limits) < min(company, *limits) if limits else True

    def is_blamed(self, seq: Sequence) -> bool:
        """Return whether `seq` has to run alone, except for other candidates of its request."""
        return seq.request.num_blames > 0 and any(other in self._company for other in seq.request.sequences)

    def survived(self, computed: Iterable[Sequence]) -> None:
        """Learn that a step was answered: clear who got past the crash."""
        for seq in computed:
            if seq in self._company and len(seq.token_ids) >= min(self._cleared_at[seq], seq.max_len_here):
                self.forget(seq)
                seq.request.num_blames = 0

    def forget(self, seq: Sequence) -> None:
        """Let go of a sequence, cleared or ended."""
        self._company.pop(seq, None)
        self._cleared_at.pop(seq, None)

    def quarantined_s(self, submit: scheduler_pb2.Submit, now: float) -> float:
        """Return for how long a request like this one is still refused; 0 if it is not."""
        if not self._quarantined:
            return 0.0
        found = self._quarantined.get(request_key(submit))
        return max(0.0, found.until - now) if found else 0.0

    def quarantined(self, now: float) -> dict[bytes, QuarantinedRequest]:
        """Return what is refused now, by key, oldest first."""
        return {key: each for key, each in self._quarantined.items() if each.until > now}

    def lift(self, key: bytes) -> None:
        """Refuse a request no longer."""
        self._quarantined.pop(key, None)

    def check_invariants(self, unfinished: set[Sequence]) -> None:
        """Assert that only sequences that have not ended are suspects."""
        assert self._company.keys() <= unfinished
        assert self._company.keys() == self._cleared_at.keys()
        assert len(self._quarantined) <= MAX_QUARANTINED


def request_key(submit: scheduler_pb2.Submit) -> bytes:
    """Name what a request asks for, however much of its output is there already.

    The seed is left out: gateways draw one for each request that brings none, and whoever sends a
    request again would have another name each time.
    """
    what = scheduler_pb2.Submit(tenant=submit.tenant, adapter=submit.adapter, sampling=submit.sampling)
    what.sampling.ClearField("seed")
    what.prompt_token_ids.MergeFrom(submit.prompt_token_ids)
    return hashlib.sha256(what.SerializeToString(deterministic=True)).digest()
