"""JSON within bounds on how long one call of the library holds the GIL.

`json` parses and writes in C, which lets nothing else of the process run. So what has many values in it is read by its
parser in Python, and written piece by piece: that takes longer, in a thread, and stops nobody.
"""

from __future__ import annotations

import json
import json.decoder
import json.scanner
from collections.abc import Callable
from typing import Any, Final

# What a structural character stands for takes the parser in C, in nanoseconds at most: a number, a list, an object
# (its closing brace is not counted), a name in an object that is growing.
_MARKS: Final = ((",", 70), ("[", 80), ("{", 100), (":", 400))
_MAX_NS: Final = 20_000_000
_MAX_QUICK_VALUES: Final = 30_000
_ITEMS_AT_ONCE: Final = 8
_SCALARS_AT_ONCE: Final = 4096
_MAX_DIGITS: Final = 300  # of a number, in a long text: reading one of 4,000 digits takes 0.1 ms
_SHORT: Final = 100_000
_STRIDE: Final = 128

to_json = json.JSONEncoder(separators=(",", ":")).encode
# ASCII, so that a client which ends lines of an event stream at U+2028 does not break an event in two.


def count_marks(data: str | bytes) -> int:
    """Return how many structural characters there are, those in texts included: at least as many as values."""
    return sum(_count(data, mark) for mark, _ in _MARKS)


def loads(data: str | bytes, **options: Any) -> Any:
    """Return the value that JSON stands for, as `json.loads` does. In a thread, if it is long."""
    is_quick = sum(_count(data, mark) * price for mark, price in _MARKS) <= _MAX_NS and not _has_long_number(data)
    return json.loads(data, cls=None if is_quick else _PatientDecoder, **options)


def dumps(value: Any, **options: Any) -> str:
    """Return a value as JSON, as `json.dumps` does. In a thread, if it is long."""
    if _is_quick(value):
        return json.dumps(value, **options)
    return "".join(json.JSONEncoder(**options).iterencode(value))


def to_json_in_pieces(value: Any) -> str:
    """Return JSON as `to_json` does. In a thread, if it is long."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{to_json(name)}:{to_json_in_pieces(each)}" for name, each in value.items()) + "}"
    if isinstance(value, str) and len(value) > _SHORT:
        return '"' + "".join(to_json(value[at : at + _SHORT])[1:-1] for at in range(0, len(value), _SHORT)) + '"'
    if not isinstance(value, list) or not value:
        return to_json(value)
    is_nested = isinstance(value[0], (dict, list))
    if is_nested and len(value) <= _ITEMS_AT_ONCE:
        return "[" + ",".join(map(to_json_in_pieces, value)) + "]"
    step = _ITEMS_AT_ONCE if is_nested else _SCALARS_AT_ONCE
    return "[" + ",".join(to_json(value[at : at + step])[1:-1] for at in range(0, len(value), step)) + "]"


def _count(data: str | bytes, mark: str) -> int:
    return data.count(mark) if isinstance(data, str) else data.count(mark.encode())


def _has_long_number(data: str | bytes) -> bool:
    """Return whether a long text has a number with very many digits in it, or text that looks like one."""
    # One of twice the stride fills the whole of the way from one of these places to the next.
    starts = range(0, len(data), _STRIDE) if len(data) > _SHORT else ()
    return any(data[at : at + _STRIDE].isdigit() for at in starts)


def _parse_int(digits: str) -> int:
    return int(_checked(digits))


def _parse_float(digits: str) -> float:
    return float(_checked(digits))


def _checked(digits: str) -> str:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number is written with {len(digits)} characters; send at most {_MAX_DIGITS}")
    return digits


def _is_quick(value: Any) -> bool:
    """Return whether there are so few values in a value that C code writes them at once."""
    left = _MAX_QUICK_VALUES
    pending = [value]
    while pending:
        each = pending.pop()
        if isinstance(each, (dict, list)):
            left -= len(each)
            if left < 0:
                return False
            pending.extend(each.values() if isinstance(each, dict) else each)
    return True


def _to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) < _MAX_QUICK_VALUES:
        return dict(pairs)
    made = {}
    for name, value in pairs:  # `dict` would do it in one go
        made[name] = value  # noqa: PERF403
    return made


class _PatientDecoder(json.JSONDecoder):
    """The decoder in Python, which lets other threads run between two values."""

    scan_once: Callable[[str, int], tuple[Any, int]]

    def __init__(self, **options: Any) -> None:
        super().__init__(object_pairs_hook=_to_dict, parse_int=_parse_int, parse_float=_parse_float, **options)
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]
