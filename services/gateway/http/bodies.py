"""Bodies to and from JSON, within bounds on how long one call of the library holds the GIL, and on memory.

`json` parses and writes in C, which lets nothing else of the process run. So what has many values in it is read by
its parser in Python, and written piece by piece: that takes longer, in a thread, and stops nobody.
"""

from __future__ import annotations

import json
import json.decoder
import json.scanner
import re
from typing import Any, Final, NoReturn

from octavo.services.common.errors import Reason, ServingError

MAX_MARKS: Final = 1 << 21
"""Most structural characters of a body, those in its texts included: so many values take some 150 MB."""
# What a structural character stands for takes the parser in C, in nanoseconds at most: a number, a list, an object
# (its closing brace is not counted), a name in an object that is growing.
_PRICES: Final = ((b",", 70), (b"[", 80), (b"{", 100), (b":", 400))
_MAX_NS: Final = 20_000_000
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")
_ITEMS_AT_ONCE: Final = 8
_SCALARS_AT_ONCE: Final = 4096

# ASCII, so that a client which ends lines of an event stream at U+2028 does not break an event in two.
to_json = json.JSONEncoder(separators=(",", ":")).encode


def parse_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object in a body. Raises MALFORMED_REQUEST. In a thread, if it is long."""
    counts = [data.count(mark) for mark, _ in _PRICES]
    if sum(counts) > MAX_MARKS:
        raise _malformed(f"it has {sum(counts)} lists, objects and commas; send at most {MAX_MARKS}")
    is_quick = sum(count * price for count, (_, price) in zip(counts, _PRICES, strict=True)) <= _MAX_NS
    try:
        body = json.loads(data, parse_constant=_refuse_constant, cls=None if is_quick else _PatientDecoder)
    except RecursionError:
        raise _malformed("it is nested too deeply") from None
    except ValueError as error:  # broken JSON, or broken UTF-8
        raise _malformed(str(error)) from None
    if not isinstance(body, dict):
        raise _malformed("it must be a JSON object")
    if _SURROGATE.search(data):
        try:
            for piece in json.JSONEncoder(ensure_ascii=False).iterencode(body):
                piece.encode()
        except UnicodeEncodeError:
            raise _malformed("it has half of a surrogate pair in it; send whole characters") from None
    return body


class _PatientDecoder(json.JSONDecoder):
    """The decoder in Python, which lets other threads run between two values."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]


def to_json_in_pieces(value: Any) -> str:
    """Return JSON as `to_json` does, with no call of the library that takes long. In a thread, if it is long."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{to_json(name)}:{to_json_in_pieces(each)}" for name, each in value.items()) + "}"
    if not isinstance(value, list) or not value:
        return to_json(value)
    if isinstance(value[0], (dict, list)) and len(value) <= _ITEMS_AT_ONCE:
        return "[" + ",".join(map(to_json_in_pieces, value)) + "]"
    step = _ITEMS_AT_ONCE if isinstance(value[0], (dict, list)) else _SCALARS_AT_ONCE
    return "[" + ",".join(to_json(value[at : at + step])[1:-1] for at in range(0, len(value), step)) + "]"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _malformed(why: str) -> ServingError:
    return ServingError(Reason.MALFORMED_REQUEST, f"the body is not what it should be: {why}")
