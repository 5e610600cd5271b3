"""Reads the fields of a JSON object, as its table has them; what no table knows is ignored, or refused."""

from __future__ import annotations

import difflib
import heapq
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from octavo.services.common.errors import FieldViolation, Reason, ServingError, feature_disabled, invalid_field
from octavo.services.gateway.http.fields import Field, Fields, Support, endpoints_with

T = TypeVar("T")
UINT32_MAX = 2**32 - 1
_MAX_NAMES, _MAX_NAME = 8, 64  # that an error has of unknown fields
_MAX_IGNORED = 32  # different fields
_TYPO = 0.85  # how like a name of ours one must be to be taken for it
_BASE = re.compile(r"\w+")
_INDEX = re.compile(r"\[\d+\]")
_UNSAFE = re.compile(r"[^A-Za-z0-9_.\[\]=-]")  # in a header
_KINDS: Mapping[str, tuple[type, str]] = {
    "string": (str, "a string"),
    "object": (dict, "an object"),
    "array": (list, "a list"),
}
"""What a field that is ignored, or renamed, must be all the same, by its JSON Schema type."""
_MEANINGFUL = (Support.SUPPORTED, Support.REFUSED)


class Ignored:
    """The fields of one request that are ignored, each once, whatever list item it is in."""

    def __init__(self, *, refuses: bool = False) -> None:
        """`refuses`: nothing is ignored but what always is: hints and unknown fields are refused."""
        self.refuses = refuses
        self._names: dict[str, None] = {}

    def __contains__(self, name: str) -> bool:
        return _INDEX.sub("[]", name) in self._names

    @property
    def is_full(self) -> bool:
        """No further name is kept."""
        return len(self._names) >= _MAX_IGNORED

    @property
    def header(self) -> str:
        """The names, as a header has them; empty: nothing is ignored."""
        return ", ".join(_UNSAFE.sub("?", name[:_MAX_NAME]) for name in self._names)

    def add(self, name: str) -> None:
        """Ignore a field, of this name and path."""
        if not self.is_full:
            self._names[_INDEX.sub("[]", name)] = None


class Params:
    """The fields of an object. Null is the same as absent: readers return None for both."""

    def __init__(
        self, values: Mapping[str, Any], path: str = "", fields: Fields | None = None, ignored: Ignored | None = None
    ) -> None:
        """Check against the table what needs no reader.

        path     what precedes the fields' names in errors, such as "stream_options."
        fields   the table, None: none
        ignored  takes what is ignored; None: of no interest

        Raises MALFORMED_REQUEST for unknown fields, if they are refused, or look like others that are misspelt;
        INVALID_FIELD for refused ones and ignored ones of a wrong type.
        """
        self._values = {name: value for name, value in values.items() if value is not None}
        self._path = path
        self._fields = fields
        self._taken: set[str] = set()
        self._given: dict[str, str] = {}  # what the client calls a field that has several names
        self.ignored = Ignored() if ignored is None else ignored
        if fields is None:
            return
        self._ignore_unknown([name for name in self._values if name not in fields], fields)
        for name in list(self._values):
            field = fields[name]
            if field.alias_of:
                self._rename(name, field)
            elif field.support is Support.REFUSED or (field.support is Support.HINT and self.ignored.refuses):
                self.only(name, field.allowed, field.description)
            elif field.support is not Support.SUPPORTED:
                self._ignore(name, field)

    def inner(self, values: Mapping[str, Any], path: str, fields: Fields | None = None) -> Params:
        """Return the fields of an object in this one; `path` as in the constructor, from here on."""
        return Params(values, self._path + path, fields, self.ignored)

    def wrong(self, name: str, description: str) -> ServingError:
        """Return the error for a field."""
        base = _BASE.match(name)
        given = self._given.get(base[0], base[0]) + name[base.end() :] if base else name
        return invalid_field(self._path + given, description)

    def unsupported(self, name: str, feature: str, message: str) -> ServingError:
        """Return the error for a field that asks for what this server does not do."""
        return feature_disabled(feature, message, self._path + name)

    def take(self, name: str) -> Any:
        """Return a field of any type."""
        assert self._fields is None or name in self._fields, f"{name} is in no table"
        if self._fields is None:
            self._taken.add(name)
        return self._values.pop(name, None)

    def text(self, name: str) -> str | None:
        """Return a string."""
        return self._typed(name, str, "a string")

    def boolean(self, name: str) -> bool | None:
        """Return true or false."""
        return self._typed(name, bool, "true or false")

    def integer(self, name: str) -> int | None:
        """Return a whole number within the limits that its table has."""
        assert self._fields is not None, f"{name} has no limits"
        value = self._typed(name, int, "a whole number")
        schema = self._fields[name].schema
        if value is not None and not schema["minimum"] <= value <= schema["maximum"]:
            raise self.wrong(name, f"must be from {schema['minimum']} up to {schema['maximum']}")
        return value

    def number(self, name: str) -> float | None:
        """Return a number."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(name, "must be a number")
        try:
            return float(value)
        except OverflowError:
            raise self.wrong(name, "is too large") from None

    def token_ids(self, name: str) -> list[int] | None:
        """Return a list of numbers that could be token ids."""
        value = self._typed(name, list, "a list of token ids")
        if value is not None and not are_token_ids(value):
            raise self.wrong(name, "must be a list of token ids, which are whole numbers from 0")
        return value

    def object(self, name: str) -> dict[str, Any] | None:
        """Return a JSON object."""
        return self._typed(name, dict, "an object")

    def array(self, name: str) -> list[Any] | None:
        """Return a JSON array."""
        return self._typed(name, list, "a list")

    def texts(self, name: str) -> list[str] | None:
        """Return a list of strings, of at most as many as its table has."""
        value = self.array(name)
        self.check_size(name, value or ())
        if value is not None and not all(isinstance(text, str) for text in value):
            raise self.wrong(name, "must be a list of strings")
        return value

    def check_size(self, name: str, items: Collection[Any]) -> None:
        """Refuse more items than the table has, before they are looked at."""
        assert self._fields is not None, f"{name} has no limit"
        schema = self._fields[name].schema
        most = schema.get("maxItems") or schema["maxProperties"]
        if len(items) > most:
            raise self.wrong(name, f"has {len(items)} items; send at most {most}")

    def only(self, name: str, values: Iterable[Any], advice: str) -> None:
        """Read a field that may have these values only; `advice` says why not others."""
        value = self.take(name)
        if value is not None and not _is_among(value, values):
            raise self.wrong(name, advice)

    def finish(self) -> None:
        """Ignore, or refuse, the fields that nobody has read."""
        assert self._fields is None or not self._values, (
            f"{sorted(self._values)} are in the table, and nobody reads them"
        )
        self._ignore_unknown(list(self._values), self._taken)

    def refuse_rest(self, advice: str) -> None:
        """Refuse the fields that were not read because of another one."""
        for name in self._values:
            raise self.wrong(name, advice)

    def _rename(self, name: str, field: Field) -> None:
        """Give a field its other name."""
        value = self._values.pop(name)
        kind = _KINDS.get(field.schema.get("type", ""))
        if kind is not None and not isinstance(value, kind[0]):
            raise self.wrong(name, f"must be {kind[1]}")
        if field.alias_of not in self._values:
            self._given[field.alias_of] = name
        if not _is_among(value, field.allowed) and self._values.setdefault(field.alias_of, value) != value:
            raise self.wrong(name, f"differs from {field.alias_of}; send one of them")

    def _ignore(self, name: str, field: Field) -> None:
        """Ignore a field that the table says to ignore."""
        kind = _KINDS[field.schema["type"]] if field.support is Support.IGNORED else (object, "")
        value = self._typed(name, *kind)
        if not _is_among(value, field.allowed):
            self.ignored.add(self._path + name)

    def _ignore_unknown(self, unknown: list[str], known: Collection[str]) -> None:
        """Ignore fields, unless they are refused here or `known` ones seem to be meant."""
        if unknown and self.ignored.refuses:
            raise self._unrecognized(unknown)
        for name in unknown:
            if self._path + name not in self.ignored:
                if self.ignored.is_full:
                    raise self._unrecognized(unknown, f"; at most {_MAX_IGNORED} are ignored")
                if meant := self._meant(name, known):
                    raise self._unrecognized([name], f"; {meant}")
                self.ignored.add(self._path + name)
            del self._values[name]

    def _meant(self, name: str, known: Collection[str]) -> str:
        """Return advice about a field that means one of ours; empty: it means none."""
        if len(name) > _MAX_NAME:
            return ""
        if not self._path and (endpoints := endpoints_with(name)):
            return f"it is a field of {' and '.join(endpoints)}, not of this endpoint"
        read = known if self._fields is None else [each for each in known if self._fields[each].support in _MEANINGFUL]
        letters = _letters(name)
        for each in read:
            if _letters(each) == letters:
                return f"did you mean {each}?"
        near = difflib.get_close_matches(name, read, 1, _TYPO)
        return f"did you mean {near[0]}?" if near else ""

    def _unrecognized(self, unknown: list[str], advice: str = "") -> ServingError:
        """Return the error for fields that are not known."""
        shown = [self._path + name[:_MAX_NAME] for name in heapq.nsmallest(_MAX_NAMES, unknown)]
        names = ", ".join(shown)
        message = f"Unrecognized request argument{'s' if len(unknown) > 1 else ''} supplied: {names}{advice}"
        first = FieldViolation(shown[0], f"is not known here; {advice.removeprefix('; ') or 'leave it out'}")
        return ServingError(Reason.MALFORMED_REQUEST, message, violations=[first])

    def _typed(self, name: str, kind: type[T], wanted: str) -> T | None:
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):  # a bool is an int for Python
            raise self.wrong(name, f"must be {wanted}")
        return value


def _is_among(value: Any, values: Iterable[Any]) -> bool:
    return any(value is each or value == each for each in values)


def _letters(name: str) -> str:
    """Return a name as it is in all ways to write it: max_tokens, maxTokens, max-tokens."""
    return name.replace("_", "").replace("-", "").lower()


def are_token_ids(values: list[Any]) -> bool:
    """Return whether all values could be token ids."""
    return all(type(value) is int for value in values) and (
        not values or (min(values) >= 0 and max(values) <= UINT32_MAX)
    )
