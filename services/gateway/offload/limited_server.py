"""A process that computes what may take too long or too much, in forks that are killed when it does.

It reads frames from stdin and writes frames to stdout. The first one sets it up and is answered with what came of
that. Each further one is a request with a number, answered in any order. It ends when stdin does.

A fork begins with all that was set up, so it takes some milliseconds. It has limits on processor time and memory, and
is killed when it is late.
"""

from __future__ import annotations

import contextlib
import enum
import gc
import os
import resource
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

REQUEST = struct.Struct(">II")  # bytes of the payload, number of the request
ANSWER = struct.Struct(">IIB")  # bytes of the payload, number of the request, Outcome
_SIZE = struct.Struct(">I")  # of a payload
_RESULT = struct.Struct(">I?")  # the same of a fork's answer, and whether the fork goes on
_SESSION_NICENESS = Path("/proc/self/autogroup")

SOCKET_BYTES = 1 << 20
_MAX_KEPT_MEMORY = 64 << 20  # by a fork that goes on


class Outcome(enum.IntEnum):
    """What came of a request."""

    DONE = 0
    TOO_LONG = 1
    TOO_LARGE = 2
    LATE = 3


@dataclass(frozen=True)
class Limits:
    """What a fork may use.

    cpu_s         processor time, for a request
    wall_s        time, for a request, where the processor is somebody else's most of the time
    memory        address space in bytes, beyond what the process has before
    niceness      of the forks, and of the session of the process
    max_requests  that a fork serves, one after the other; then it ends
    """

    cpu_s: float
    wall_s: float
    memory: int
    niceness: int = 0
    max_requests: int = 1


def pair() -> tuple[socket.socket, socket.socket]:
    """Return connected sockets with room for a long prompt: each time that one is full costs two switches."""
    both = socket.socketpair()
    for each in both:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)  # the system may allow less
    return both


Answer = Callable[[bytes], bytes]
"""What a fork computes. It may raise MemoryError and RecursionError."""


@dataclass
class _Fork:
    """A fork, at work on request `number`, or idle."""

    pid: int
    socket: socket.socket
    number: int | None = None
    started: float = 0.0
    answer: bytearray = field(default_factory=bytearray)
    is_late: bool = False


def serve(set_up: Callable[[bytes], tuple[Answer, bytes]], limits: Limits) -> None:
    """Serve until stdin ends. `set_up` takes the first frame; returns what forks do, and the answer to the frame."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the gateway decides when to end
    _weigh_little(limits.niceness)
    first = _read_frame(0)
    if first is None:
        sys.exit(0)
    answer, ready = set_up(first)
    signal.setitimer(signal.ITIMER_PROF, 0)  # where it has limited itself
    gc.collect()
    gc.freeze()  # forks need not copy what they do not change
    _write(1, ANSWER.pack(len(ready), 0, Outcome.DONE) + ready)
    _Server(answer, limits).run()


def limit(cpu_s: float, memory: int) -> None:
    """Limit this process; what passes a limit ends it or raises MemoryError. `cpu_s` begins now."""
    most = num_bytes() + memory
    _, allowed = resource.getrlimit(resource.RLIMIT_AS)
    if allowed != resource.RLIM_INFINITY:
        most = min(most, allowed)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)


def num_bytes() -> int:
    """Return how large the address space of this process is."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _weigh_little(niceness: int) -> None:
    """Let the session of this process weigh little beside others.

    Where Linux shares cores out among sessions first (sched_autogroup: on machines, not in containers), a niceness
    means nothing to the processes of other sessions.
    """
    if not niceness:
        return
    with contextlib.suppress(OSError):  # it leads its session already
        os.setsid()
    with contextlib.suppress(OSError):
        _SESSION_NICENESS.write_text(str(niceness))


class _Server:
    """Gives requests to forks, and watches the forks."""

    def __init__(self, answer: Answer, limits: Limits) -> None:
        self._answer = answer
        self._limits = limits
        self._data = bytearray()
        self._selector = selectors.DefaultSelector()
        self._selector.register(0, selectors.EVENT_READ)
        self._forks: dict[int, _Fork] = {}  # by the descriptor that their answers come from
        self._idle: list[_Fork] = []

    def run(self) -> None:
        """Serve until stdin ends."""
        if self._limits.max_requests > 1:
            self._idle.append(self._fork())
        while True:
            is_watching = len(self._idle) < len(self._forks)
            for key, _ in self._selector.select(0.1 if is_watching else None):
                if key.fd:
                    self._hear(key.fd)
                elif not self._read():
                    for fork in self._forks.values():
                        os.kill(fork.pid, signal.SIGKILL)
                    return
            self._watch()

    def _read(self) -> bool:
        """Begin the requests that are complete; False at the end of stdin."""
        data = os.read(0, SOCKET_BYTES)
        self._data += data
        while len(self._data) >= REQUEST.size:
            size, number = REQUEST.unpack_from(self._data)
            if len(self._data) < REQUEST.size + size:
                break
            payload = bytes(self._data[REQUEST.size : REQUEST.size + size])
            del self._data[: REQUEST.size + size]
            self._begin(number, payload)
        return bool(data)

    def _begin(self, number: int, payload: bytes) -> None:
        fork = self._idle.pop() if self._idle else self._fork()
        fork.number, fork.started = number, time.monotonic()
        with contextlib.suppress(ConnectionError):  # it has died: `_hear` is told
            fork.socket.sendall(_SIZE.pack(len(payload)) + payload)

    def _fork(self) -> _Fork:
        own, its = pair()
        pid = os.fork()
        if pid == 0:
            own.close()
            _in_fork(its, [fork.socket for fork in self._forks.values()], self._answer, self._limits)
        its.close()
        fork = self._forks[own.fileno()] = _Fork(pid, own)
        self._selector.register(own, selectors.EVENT_READ)
        return fork

    def _hear(self, fd: int) -> None:
        """Take a piece of an answer; pass it on when it is whole."""
        fork = self._forks[fd]
        try:
            data = fork.socket.recv(SOCKET_BYTES)
        except ConnectionError:
            data = b""
        if not data:
            self._bury(fork)
            return
        fork.answer += data
        if len(fork.answer) < _RESULT.size:
            return
        size, goes_on = _RESULT.unpack_from(fork.answer)
        if len(fork.answer) == _RESULT.size + size:
            self._tell(fork, Outcome.DONE, bytes(fork.answer[_RESULT.size :]))
            fork.answer = bytearray()
            if goes_on and not fork.is_late:  # else it was killed while it answered
                self._idle.append(fork)

    def _bury(self, fork: _Fork) -> None:
        """Forget a fork that has ended, and say what became of its request."""
        self._selector.unregister(fork.socket)
        del self._forks[fork.socket.fileno()]
        fork.socket.close()
        if fork in self._idle:
            self._idle.remove(fork)
        _, status = os.waitpid(fork.pid, 0)
        is_timed_out = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF
        self._tell(fork, Outcome.LATE if fork.is_late else Outcome.TOO_LONG if is_timed_out else Outcome.TOO_LARGE)

    def _tell(self, fork: _Fork, outcome: Outcome, payload: bytes = b"") -> None:
        if fork.number is not None:
            _write(1, ANSWER.pack(len(payload), fork.number, outcome) + payload)
            fork.number = None

    def _watch(self) -> None:
        now = time.monotonic()
        for fork in self._forks.values():
            if fork.number is not None and not fork.is_late and now - fork.started > self._limits.wall_s:
                fork.is_late = True
                os.kill(fork.pid, signal.SIGKILL)


def _in_fork(its: socket.socket, others: list[socket.socket], answer: Answer, limits: Limits) -> None:
    """Answer requests; does not return."""
    try:
        os.nice(limits.niceness)  # first of all: copying what it touches is work too
        for other in others:  # else these forks would not see that the process has ended
            other.close()
        quiet = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):  # the last words of native code are answered by the outcome
            os.dup2(quiet, standard)
        before = num_bytes()
        limit(limits.cpu_s, limits.memory)
        goes_on, num_left = True, limits.max_requests
        while goes_on:
            payload = _read_frame(its.fileno())
            if payload is None:
                break
            signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)
            result = answer(payload)
            signal.setitimer(signal.ITIMER_PROF, 0)
            num_left -= 1
            del payload
            goes_on = num_left > 0 and num_bytes() - len(result) - before <= _MAX_KEPT_MEMORY
            _write(its.fileno(), _RESULT.pack(len(result), goes_on) + result)
            del result
    except BaseException:
        os._exit(1)
    os._exit(0)


def _read_frame(fd: int) -> bytes | None:
    """Return the next frame of a size and bytes; None at the end."""
    header = _read_exactly(fd, _SIZE.size)
    return None if header is None else _read_exactly(fd, _SIZE.unpack(header)[0])


def _read_exactly(fd: int, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        piece = os.read(fd, size - len(data))
        if not piece:
            return None
        data += piece
    return bytes(data)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
