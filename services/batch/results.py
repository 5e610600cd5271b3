"""The file of results. It is its own journal: what it holds when a run is killed is not done again."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import stat
import zlib
from array import array
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.services.batch.lines import Line
from octavo.services.common import folders

_FIRST_FIELDS = re.compile(
    rb'\{"id": "batch_req_(?P<index>\d+)(?:_(?P<checksum>[0-9a-f]{8}))?", '
    rb'"custom_id": (?P<custom_id>"(?:[^"\\]|\\.)*"), "response": (?P<response>null|\{)'
)
_MAX_RESULT_BYTES = 256 << 20
_PAGE = 1024  # lines whose marks are kept together
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
    of the input that a result belongs to is the number in its `id`, followed by the line's checksum, so four bytes of
    memory for each line of the input are enough to know what is done.

    retry_failed  results that are failures are removed when the file is opened: their requests are to be sent again
    """

    def __init__(self, path: Path, *, retry_failed: bool = False) -> None:
        self.path = path
        self.num_done = 0
        self.num_failed = 0
        self._retry_failed = retry_failed
        # By line, in pages: 0, or a checksum of the request of its result.
        self._marks: defaultdict[int, array[int]] = defaultdict(lambda: array("I", bytes(4 * _PAGE)))
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
            if self._retry_failed and self.num_failed:
                self._remove_failed()
            if not self.num_done:
                folders.sync(self.path.resolve().parent)
        except OSError as error:
            self._file.close()
            raise ResultsError(f"cannot write {self.path}: {error.strerror}") from None
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.sync()
        with contextlib.suppress(OSError):  # of what could not be written, which was raised already
            self._file.close()

    def has(self, line: Line) -> bool:
        """Return whether a line's result is there. Raises ResultsError if it is another request's."""
        mark = self._marks[line.index // _PAGE][line.index % _PAGE] if line.index // _PAGE in self._marks else 0
        # Those of earlier versions have no checksum of the line.
        if mark and mark not in (_mark(line.custom_id, line.checksum), _mark(line.custom_id, 0)):
            raise ResultsError(
                f"{self.path} has a result for line {line.index + 1} of another request than {line.custom_id!r}: it "
                "belongs to another input, or to other defaults such as --max-tokens; choose another file for the "
                "results, or remove it"
            )
        return mark != 0

    def add(self, line: Line, answer: Answer) -> None:
        """Append a result. Raises ResultsError."""
        assert not self.has(line), f"line {line.index} has a result"
        response = {"status_code": answer.status, "request_id": answer.request_id, "body": answer.body}
        result = {
            "id": f"batch_req_{line.index}" + (f"_{line.checksum:08x}" if line.checksum else ""),
            "custom_id": line.custom_id,
            "response": response if answer.status else None,
            "error": None if answer.status else answer.body,
        }
        try:
            self._file.write(json.dumps(result).encode() + b"\n")
            self._file.flush()  # it survives this process; `sync` makes it survive the machine
        except OSError as error:
            raise ResultsError(f"cannot write {self.path}: {error.strerror}") from None
        self._count(line.index, _mark(line.custom_id, line.checksum), answer.failed)

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
            mark = _mark(json.loads(fields["custom_id"]), int(fields["checksum"] or b"0", 16))
            self._count(int(fields["index"]), mark, _failed(data, fields))
            end += len(data)
        if len(data) == _MAX_RESULT_BYTES:
            raise ResultsError(f"{self.path} holds something else than results: choose another file")
        self._file.truncate(end)
        self._file.seek(end)

    def _remove_failed(self) -> None:
        """Put a file without the failures in the place of this one."""
        target = self.path.resolve()
        kept = target.with_name(f".{target.name}.kept")
        old = self._file
        try:
            self._file = kept.open("w+b")
            fcntl.flock(self._file, fcntl.LOCK_EX)  # before anyone can find it under the other name
            old.seek(0)
            for data in old:
                fields = _FIRST_FIELDS.match(data)
                if fields and not _failed(data, fields):
                    self._file.write(data)
            self._file.flush()
            self.sync()
            shutil.copymode(target, kept)
            kept.replace(target)
            folders.sync(target.parent)
        except OSError as error:
            kept.unlink(missing_ok=True)
            raise ResultsError(f"cannot write {kept}: {error.strerror}") from None
        finally:
            old.close()
        self.num_done = self.num_failed = 0
        self._marks.clear()
        self._read()

    def _count(self, index: int, mark: int, failed: bool) -> None:
        page = self._marks[index // _PAGE]
        if page[index % _PAGE]:
            raise ResultsError(f"{self.path} has two results for line {index + 1}: choose another file")
        page[index % _PAGE] = mark
        self.num_done += 1
        self.num_failed += failed


def _failed(data: bytes, fields: re.Match[bytes]) -> bool:
    status = _STATUS.search(data, fields.start("response") - len(b'"response": '))
    return status is None or status[1] != b"200"


def _mark(custom_id: str, checksum: int) -> int:
    return zlib.crc32(custom_id.encode("utf-8", "surrogatepass"), checksum) | 1
