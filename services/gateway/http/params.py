"""Reads the fields of a JSON object, as its table has them; what no table knows is refused."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from octavo.services.common.errors import FieldViolation, Reason, ServingError, invalid_field
from octavo.services.gateway.http.fields import Fields, Support

T = TypeVar("T")
UINT32_MAX = 2**32 - 1
_MAX_NAMES, _MAX_NAME = 8, 64  # that an error has of unknown fields
_KINDS: Mapping[str, tuple[type, str]] = {
    "string": (str, "a string"),
    "object": (dict, "an object"),
}
"""What a field that is ignored must be all the same, by its JSON Schema type."""


class Params:
    """The fields of an object. Null is the same as absent: readers return None for both."""

    def __init__(self, values: Mapping[str, Any], path: str = "", fields: Fields | None = None) -> None:
        """Check against the table what needs no reader.

        path: what precedes the fields' names in errors, such as "stream_options."; fields: the table, None: none.
        Raises MALFORMED_REQUEST for unknown fields, INVALID_FIELD for refused ones and ignored ones of a wrong type.
        """
        self._values = {name: value for name, value in values.items() if value is not None}
        self._path = path
        self._fields = fields
        if fields is None:
            return
        self._refuse([name for name in self._values if name not in fields])
        for name in list(self._values):
            field = fields[name]
            if field.support is Support.REFUSED:
                self.only(name, field.allowed, field.description)
            elif field.support is Support.IGNORED:
                kind = field.schema["type"]
                self._typed(name, *_KINDS[kind])

    def wrong(self, name: str, description: str) -> ServingError:
        """Return the error for a field."""
        return invalid_field(self._path + name, description)

    def take(self, name: str) -> Any:
        """Return a field of any type."""
        assert self._fields is None or name in self._fields, f"{name} is in no table"
        return self._values.pop(name, None)

    def text(self, name: str) -> str | None:
        """Return a string."""
        return self._typed(name, str, "a string")

    def boolean(self, name: str) -> bool | None:
        """Return true or false."""
        return self._typed(name, bool, "true or false")

    def integer(self, name: str, low: int = 0, high: int = UINT32_MAX) -> int | None:
        """Return a whole number that fits its field; the narrower limits are checked with the whole request."""
        value = self._typed(name, int, "a whole number")
        if value is not None and not low <= value <= high:
            raise self.wrong(name, f"must be from {low} up to {high}")
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

    def only(self, name: str, values: Iterable[Any], advice: str) -> None:
        """Read a field that may have these values only; `advice` says why not others."""
        value = self.take(name)
        if value is not None and not any(value is allowed or value == allowed for allowed in values):
            raise self.wrong(name, advice)

    def finish(self) -> None:
        """Refuse the fields that nobody has read."""
        assert self._fields is None or not self._values, (
            f"{sorted(self._values)} are in the table, and nobody reads them"
        )
        self._refuse(list(self._values))

    def refuse_rest(self, advice: str) -> None:
        """Refuse the fields that were not read because of another one."""
        for name in self._values:
            raise self.wrong(name, advice)

    def _refuse(self, unknown: list[str]) -> None:
        if unknown:
            shown = [self._path + name[:_MAX_NAME] for name in heapq.nsmallest(_MAX_NAMES, unknown)]
            names = ", ".join(shown)
            message = f"Unrecognized request argument{'s' if len(unknown) > 1 else ''} supplied: {names}"
            first = FieldViolation(shown[0], "is not known here; leave it out")
            raise ServingError(Reason.MALFORMED_REQUEST, message, violations=[first])

    def _typed(self, name: str, kind: type[T], wanted: str) -> T | None:
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):  # a bool is an int for Python
            raise self.wrong(name, f"must be {wanted}")
        return value


def are_token_ids(values: list[Any]) -> bool:
    """Return whether all values could be token ids."""
    return all(type(value) is int for value in values) and (
        not values or (min(values) >= 0 and max(values) <= UINT32_MAX)
    )
