"""Counters, gauges, histograms and summaries, and Prometheus' text format for them.

Our own few classes, because prometheus_client appends `_total` to counters, which TGI's names lack, and takes
a lock an observation. Everything runs on the event loop: plain numbers, one bisect an observation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import ClassVar, Protocol, TypeVar

CONTENT_TYPE = b"text/plain; charset=utf-8"


class Series(Protocol):
    """One metric with one set of label values."""

    kind: ClassVar[str]

    def samples(self, name: str, label: str) -> Iterator[str]:
        """Yield the lines of the exposition."""


class Counter:
    """A number that only grows."""

    kind: ClassVar[str] = "counter"
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def add(self, amount: float = 1) -> None:
        self.value += amount

    def samples(self, name: str, label: str) -> Iterator[str]:
        yield f"{name}{_braces(label)} {_number(self.value)}"


class Gauge:
    """A number that goes up and down."""

    kind: ClassVar[str] = "gauge"
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def samples(self, name: str, label: str) -> Iterator[str]:
        yield f"{name}{_braces(label)} {_number(self.value)}"


class HistogramCounts(Protocol):
    """A histogram that is kept elsewhere: `counts` has one more entry than `bounds`."""

    @property
    def bounds(self) -> Sequence[float]: ...

    @property
    def counts(self) -> list[int]: ...

    @property
    def total(self) -> float: ...


class Histogram:
    """Counts of observations by upper bound (inclusive), and their sum."""

    kind: ClassVar[str] = "histogram"
    __slots__ = ("_heads", "bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._heads: list[str] = []  # of the bucket lines: made once, for the loop waits while we render
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def copy_from(self, other: HistogramCounts) -> None:
        """Take over a histogram that is kept elsewhere."""
        if self.bounds is not other.bounds:
            self.bounds, self._heads = other.bounds, []
        self.counts = other.counts[:]
        self.sum = other.total

    def samples(self, name: str, label: str) -> Iterator[str]:
        if not self._heads:
            comma = "," if label else ""
            bounds = [*map(_number, self.bounds), "+Inf"]
            self._heads = [f'{name}_bucket{{{label}{comma}le="{bound}"}} ' for bound in bounds]
        up_to = list(accumulate(self.counts))
        for head, count in zip(self._heads, up_to, strict=True):
            yield head + str(count)
        yield f"{name}_sum{_braces(label)} {_number(self.sum)}"
        yield f"{name}_count{_braces(label)} {up_to[-1]}"


class Summary:
    """The sum and number of observations, without quantiles."""

    kind: ClassVar[str] = "summary"
    __slots__ = ("count", "sum")

    def __init__(self) -> None:
        self.sum = 0.0
        self.count = 0

    def observe(self, value: float) -> None:
        self.sum += value
        self.count += 1

    def samples(self, name: str, label: str) -> Iterator[str]:
        yield f"{name}_sum{_braces(label)} {_number(self.sum)}"
        yield f"{name}_count{_braces(label)} {self.count}"


_Made = TypeVar("_Made", bound=Series)


class Registry:
    """All families by name, in the order in which they were added."""

    def __init__(self) -> None:
        self._families: dict[str, tuple[str, dict[str, Series]]] = {}

    def add(self, name: str, help: str, series: _Made, label: str = "") -> _Made:
        """Add a series, `label` being its `name="value"`; the same name and label replace."""
        self._families.setdefault(name, (help, {}))[1][label] = series
        return series

    def add_labelled(
        self, name: str, help: str, make: Callable[[], _Made], label: str, values: Sequence[str]
    ) -> dict[str, _Made]:
        """Add a series for each value of a label; all are exposed from the start, so rates have a zero."""
        return {value: self.add(name, help, make(), f'{label}="{value}"') for value in values}

    def render(self) -> bytes:
        """Return the exposition."""
        lines: list[str] = []
        for name, (help, series) in self._families.items():
            kind = next(iter(series.values())).kind
            lines += (f"# HELP {name} {help}", f"# TYPE {name} {kind}")
            for label, one in series.items():
                lines += one.samples(name, label)
        lines.append("")
        return "\n".join(lines).encode()


def _braces(label: str) -> str:
    return f"{{{label}}}" if label else ""


def _number(value: float) -> str:
    return repr(value).removesuffix(".0")
