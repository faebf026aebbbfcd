"""Families of metrics, and Prometheus' text format for them.

Our own, because prometheus_client appends `_total` to counters, which TGI's names lack, and takes a lock an
observation. Everything runs on the event loop: plain numbers, one bisect an observation.
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
    """A number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def add(self, amount: float = 1) -> None:
        self.value += amount


@dataclass(frozen=True, slots=True)
class _Family:
    kind: str
    help: str
    series: dict[str, Callable[[], Value]]  # how to read each, by its labels as written


class Registry:
    """All families by name, in the order in which they were added."""

    def __init__(self) -> None:
        self._shown: dict[str, tuple[_Family, str]] = {}  # with the labels that this name adds to all series

    def add(self, kind: str, name: str, help: str, read: Callable[[], Value], **labels: str) -> None:
        """Add a series that is kept elsewhere; the same name and labels replace."""
        family, _ = self._shown.setdefault(name, (_Family(kind, help, {}), ""))
        family.series[_written(labels)] = read

    def set_series(self, name: str, value: float, **labels: str) -> None:
        """Give a family this one series in the place of all that it has."""
        series = self._shown[name][0].series
        series.clear()
        series[_written(labels)] = lambda: value

    def counter(self, name: str, help: str, **labels: str) -> Counter:
        """Add a counter; it is shown from now on, so rates have a zero."""
        made = Counter()
        self.add("counter", name, help, lambda: made.value, **labels)
        return made

    def histogram(self, name: str, help: str, bounds: tuple[float, ...], **labels: str) -> Histogram:
        """Add a histogram."""
        made = Histogram(bounds)
        self.add("histogram", name, help, lambda: made, **labels)
        return made

    def alias(self, name: str, of: str, **labels: str) -> None:
        """Show a family under a second name, each series with these labels besides its own."""
        self._shown[name] = (self._shown[of][0], _written(labels))

    def render(self) -> bytes:
        """Return the exposition."""
        lines: list[str] = []
        for name, (family, added) in self._shown.items():
            lines += (f"# HELP {name} {family.help}", f"# TYPE {name} {family.kind}")
            for own, read in family.series.items():
                lines += _samples(name, ",".join(filter(None, (added, own))), read())
        lines.append("")
        return "\n".join(lines).encode(errors="replace")


def _samples(name: str, labels: str, value: Value) -> Iterator[str]:
    braces = f"{{{labels}}}" if labels else ""
    if not isinstance(value, Histogram):
        yield f"{name}{braces} {_number(value)}"
        return
    head = f'{name}_bucket{{{labels}{"," if labels else ""}le="'
    count = 0
    for bound, count in zip(_bounds(value.bounds), accumulate(value.counts), strict=True):
        yield f'{head}{bound}"}} {count}'
    yield f"{name}_sum{braces} {_number(value.total)}"
    yield f"{name}_count{braces} {count}"


@lru_cache(maxsize=16)  # written once: there are thousands, and the loop waits while we render
def _bounds(bounds: tuple[float, ...]) -> list[str]:
    return [*map(_number, bounds), "+Inf"]


def _written(labels: dict[str, str]) -> str:
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    return ",".join(f'{name}="{value.translate(escapes)}"' for name, value in labels.items())


def _number(value: float) -> str:
    return repr(value).removesuffix(".0")
