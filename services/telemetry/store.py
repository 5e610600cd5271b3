"""Holds the values of a process's metrics: plain numbers, written where things happen, read by a scrape.

Recording takes no lock and formats nothing. Each value is written by one thread; a scrape, in another
one, may see a histogram in the middle of an observation, which the next scrape puts right.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

from octavo.services.telemetry.catalog import Metric

OTHER = "other"
"""Stands for every label value past a limit."""


class Value:
    """A counter or a gauge."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float = 1.0) -> None:
        """Count."""
        self.value += amount

    def set(self, value: float) -> None:
        """Replace a gauge's value."""
        self.value = value


class Histogram:
    """Counts observations by bucket; `counts` has one more for what is above all bounds."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Record a value, `count` times: a step has one gap for all its rows."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count


class _Nothing(Value):
    """Takes the place of every value where nobody asks for metrics."""

    def add(self, amount: float = 1.0) -> None:
        """Do nothing."""

    def set(self, value: float) -> None:
        """Do nothing."""


class _NoHistogram(Histogram):
    def observe(self, value: float, count: int = 1) -> None:
        """Do nothing."""


_NOTHING = _Nothing()
_NO_HISTOGRAM = _NoHistogram(())


class Store:
    """All values of the metrics it is made for; label values are remembered in the order they came."""

    def __init__(self, metrics: Iterable[Metric], *, model: str = "", enabled: bool = True) -> None:
        """`model`: the label `model_name` of the aliases. Not enabled: nothing is recorded."""
        self.model = model
        self.enabled = enabled
        self._values: dict[Metric, dict[tuple[str, ...], Value]] = {}
        self._histograms: dict[Metric, dict[tuple[str, ...], Histogram]] = {}
        for metric in metrics:
            if metric.kind == "histogram":
                self._histograms[metric] = {}
            else:
                self._values[metric] = {}

    def value(self, metric: Metric, *labels: str) -> Value:
        """Return a counter or gauge; hot paths keep it."""
        if not self.enabled:
            return _NOTHING
        children = self._values[metric]
        child = children.get(labels)
        if child is None:
            assert len(labels) == len(metric.labels), f"{metric.name} has the labels {metric.labels}, not {labels}"
            child = children[labels] = Value()
        return child

    def histogram(self, metric: Metric, *labels: str) -> Histogram:
        """Return a histogram; hot paths keep it."""
        if not self.enabled:
            return _NO_HISTOGRAM
        children = self._histograms[metric]
        child = children.get(labels)
        if child is None:
            assert len(labels) == len(metric.labels), f"{metric.name} has the labels {metric.labels}, not {labels}"
            child = children[labels] = Histogram(metric.buckets)
        return child

    def replace(self, metric: Metric, *labels: str) -> None:
        """Set an information metric: 1 for these labels, and no others are left."""
        if self.enabled:
            one = Value()
            one.set(1.0)
            self._values[metric] = {labels: one}

    def replace_all(self, metric: Metric, rows: Mapping[tuple[str, ...], float]) -> None:
        """Set a gauge for these labels, and no others are left."""
        if self.enabled:
            children = {labels: Value() for labels in rows}
            for labels, number in rows.items():
                children[labels].set(number)
            self._values[metric] = children

    def values(self) -> Iterable[tuple[Metric, dict[tuple[str, ...], Value]]]:
        """Return counters and gauges, each with a copy of its children."""
        return [(metric, children.copy()) for metric, children in self._values.items()]

    def histograms(self) -> Iterable[tuple[Metric, dict[tuple[str, ...], Histogram]]]:
        """Return histograms, each with a copy of its children."""
        return [(metric, children.copy()) for metric, children in self._histograms.items()]


class BoundedNames:
    """Lets the first names through, and calls all later ones `other`: what clients send must not become labels."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        """Return the label for a name."""
        known = self._known.get(name)
        if known is None:
            if len(self._known) >= self._limit:
                return OTHER
            known = self._known[name] = name
        return known
