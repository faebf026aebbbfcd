"""Metric families and their Prometheus text format.

This replaces prometheus_client, which appends `_total` to counters, unlike TGI's names, and takes a lock per
observation. Everything runs on the event loop: plain numbers, one bisect per observation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from tgi_asgi.engine.stats import Histogram

CONTENT_TYPE = b"text/plain; charset=utf-8"

Value = float | Histogram


class Counter:
    """A monotonically increasing number."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def add(self, amount: float = 1) -> None:
        self.value += amount


@dataclass(frozen=True, slots=True)
class _Family:
    kind: str
    help: str
    series: dict[str, Callable[[], Value]]  # functions that read each series, by its rendered labels


class Registry:
    """All metric families by name, in the order in which they were added."""

    def __init__(self) -> None:
        self._shown: dict[str, tuple[_Family, str]] = {}  # with the labels that a name adds to its series

    def add(self, kind: str, name: str, help: str, read: Callable[[], Value], **labels: str) -> None:
        """Add a series whose value is kept elsewhere; replaces a series of the same name and labels.

        A summary shows only the count and sum of its histogram.
        """
        family, _ = self._shown.setdefault(name, (_Family(kind, help, {}), ""))
        family.series[_written(labels)] = read

    def set_series(self, name: str, value: float, **labels: str) -> None:
        """Replace all series of a family by this one."""
        series = self._shown[name][0].series
        series.clear()
        series[_written(labels)] = lambda: value

    def counter(self, name: str, help: str, **labels: str) -> Counter:
        """Add a counter; it is exposed at once, so that rates start from zero."""
        made = Counter()
        self.add("counter", name, help, lambda: made.value, **labels)
        return made

    def histogram(self, name: str, help: str, bounds: tuple[float, ...], **labels: str) -> Histogram:
        """Add a histogram."""
        made = Histogram(bounds)
        self.add("histogram", name, help, lambda: made, **labels)
        return made

    def alias(self, name: str, of: str, **labels: str) -> None:
        """Expose a family under a second name, adding these labels to each series."""
        self._shown[name] = (self._shown[of][0], _written(labels))

    def render(self) -> bytes:
        """Return the text exposition."""
        lines: list[str] = []
        for name, (family, added) in self._shown.items():
            lines += (f"# HELP {name} {family.help}", f"# TYPE {name} {family.kind}")
            for own, read in family.series.items():
                lines += _samples(family.kind, name, ",".join(filter(None, (added, own))), read())
        lines.append("")
        return "\n".join(lines).encode(errors="replace")


def _samples(kind: str, name: str, labels: str, value: Value) -> Iterator[str]:
    braces = f"{{{labels}}}" if labels else ""
    if not isinstance(value, Histogram):
        yield f"{name}{braces} {_number(value)}"
        return
    if kind == "histogram":
        head = f'{name}_bucket{{{labels}{"," if labels else ""}le="'
        for bound, count in zip(_bounds(value.bounds), accumulate(value.counts), strict=True):
            yield f'{head}{bound}"}} {count}'
    yield f"{name}_sum{braces} {_number(value.total)}"
    yield f"{name}_count{braces} {sum(value.counts)}"


@lru_cache(maxsize=16)  # cached: there are thousands, and rendering blocks the event loop
def _bounds(bounds: tuple[float, ...]) -> list[str]:
    return [*map(_number, bounds), "+Inf"]


def _written(labels: dict[str, str]) -> str:
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    return ",".join(f'{name}="{value.translate(escapes)}"' for name, value in labels.items())


def _number(value: float) -> str:
    return repr(value).removesuffix(".0")
