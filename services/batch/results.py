"""The file of results. It is its own journal: what it holds when a run is killed is not done again."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
import zlib
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.services.batch.lines import Line

_FIRST_FIELDS = re.compile(rb'\{"id": "batch_req_(\d+)", "custom_id": ("(?:[^"\\]|\\.)*"), "response": (null|\{)')
_MAX_RESULT_BYTES = 256 << 20
_STATUS = re.compile(rb'"response": \{"status_code": (\d+),')


class ResultsError(Exception):
    """The results cannot be kept. One line, which says what to change."""


@dataclass(frozen=True)
class Answer:
    """What a request came to.

    status       the HTTP status; 0 if it was never sent, and `body` says why
    body         the response's JSON object
    """

    status: int
    request_id: str
    body: dict[str, Any]

    @property
    def failed(self) -> bool:
        """It is not what was asked for."""
        return self.status != 200


class ResultFile:
    """Results in OpenAI's batch format, a line each; a context, in which no other run writes the file.

    A result is whole or is not there: the half line that a kill can leave is cut off when the file is opened. The line
    of the input that a result belongs to is the number in its `id`, so four bytes of memory for each line of the input
    are enough to know what is done.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_done = 0
        self.num_failed = 0
        self._marks = array("I")  # by line: 0, or a checksum of the custom_id of its result
        self._file: Any = None

    def __enter__(self) -> ResultFile:
        """Open the file, new or as an earlier run left it. Raises ResultsError."""
        try:
            self._file = self.path.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ResultsError(f"{self.path} is being written by another run: wait for it, or stop it") from None
        except OSError as error:
            raise ResultsError(f"cannot write {self.path}: {error.strerror}") from None
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.sync()
        self._file.close()

    def has(self, line: Line) -> bool:
        """Return whether a line's result is there. Raises ResultsError if it is another request's."""
        mark = self._marks[line.index] if line.index < len(self._marks) else 0
        if mark and mark != _mark(line.custom_id):
            raise ResultsError(
                f"{self.path} has a result for line {line.index + 1} of another custom_id than {line.custom_id!r}: "
                "it belongs to another input; choose another file for the results, or remove it"
            )
        return mark != 0

    def add(self, line: Line, answer: Answer) -> None:
        """Append a result. Raises ResultsError."""
        assert not self.has(line), f"line {line.index} has a result"
        response = {"status_code": answer.status, "request_id": answer.request_id, "body": answer.body}
        result = {
            "id": f"batch_req_{line.index}",
            "custom_id": line.custom_id,
            "response": response if answer.status else None,
            "error": None if answer.status else answer.body,
        }
        try:
            self._file.write(json.dumps(result).encode() + b"\n")
            self._file.flush()  # it survives this process; `sync` makes it survive the machine
        except OSError as error:
            raise ResultsError(f"cannot write {self.path}: {error.strerror}") from None
        self._count(line.index, line.custom_id, answer.failed)

    def sync(self) -> None:
        """Have everything on the disk."""
        os.fsync(self._file.fileno())

    def _read(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            raise ResultsError(f"{self.path} is no regular file: results are kept in one, to go on from")
        self._file.seek(0)
        end = 0
        while (data := self._file.readline(_MAX_RESULT_BYTES)).endswith(b"\n"):
            fields = _FIRST_FIELDS.match(data)
            if fields is None:
                raise ResultsError(f"{self.path} holds something else than results: choose another file")
            status = _STATUS.search(data, fields.start(3) - len(b'"response": '))
            self._count(int(fields[1]), json.loads(fields[2]), status is None or status[1] != b"200")
            end += len(data)
        if len(data) == _MAX_RESULT_BYTES:
            raise ResultsError(f"{self.path} holds something else than results: choose another file")
        self._file.truncate(end)
        self._file.seek(end)

    def _count(self, index: int, custom_id: str, failed: bool) -> None:
        if index >= len(self._marks):
            self._marks.extend([0] * (index + 1 - len(self._marks)))
        if self._marks[index]:
            raise ResultsError(f"{self.path} has two results for line {index + 1}: choose another file")
        self._marks[index] = _mark(custom_id)
        self.num_done += 1
        self.num_failed += failed


def _mark(custom_id: str) -> int:
    return zlib.crc32(custom_id.encode("utf-8", "surrogatepass")) | 1
