"""Rows of results: a value, its target, and whether it was met."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One result.

    value        what was measured, in `unit`; None if there is nothing to measure
    at_least, at_most  the target, in the same unit; neither: none
    passed       of checks that measure nothing; elsewhere it follows from the target
    note         what a reader wants to know beside it
    """

    section: str
    name: str
    value: float | None = None
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    passed: bool | None = None
    note: str = ""

    @property
    def verdict(self) -> bool | None:
        """Whether the target was met; None if there is none."""
        if self.value is None or (self.at_least is None and self.at_most is None):
            return self.passed
        low = self.at_least is None or self.value >= self.at_least
        return low and (self.at_most is None or self.value <= self.at_most)

    def to_json(self) -> str:
        """Return one line."""
        return json.dumps(asdict(self))


def from_json(line: str) -> Row:
    """Read what `to_json` wrote."""
    values: dict[str, Any] = json.loads(line)
    return Row(**values)


def table(rows: Sequence[Row], *, judged: bool) -> str:
    """Return the rows as text; with `judged` False targets are shown and not judged: the sizes are tiny."""
    lines = [("section", "what", "target", "measured", "", "note")]
    for row in rows:
        target = "" if row.at_least is None else f">= {_number(row.at_least)} {row.unit}"
        target = target if row.at_most is None else f"<= {_number(row.at_most)} {row.unit}"
        measured = "" if row.value is None else f"{_number(row.value)} {row.unit}"
        verdict = row.verdict if judged or row.value is None else None
        lines.append(
            (row.section, row.name, target, measured, {True: "pass", False: "FAIL", None: ""}[verdict], row.note)
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def failures(rows: Sequence[Row], *, judged: bool) -> int:
    """Count the rows that failed; with `judged` False only checks can."""
    return sum(1 for row in rows if row.verdict is False and (judged or row.value is None))


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
