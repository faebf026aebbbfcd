"""Sums of the engines' counters, so that `/metrics` of a cluster looks like that of one server."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tgi_asgi.engine.stats import EngineStats, Histogram

Snapshot = Mapping[str, Any]

_MAX_ABSENT = 16  # replicas that may come back; what a replica that stays away has counted is kept as a sum
_GAUGES = (
    "blocks_total", "blocks_used", "compute_threads", "max_adapters", "running", "states_kept",
    "waiting",
)  # fmt: skip


def snapshot(stats: EngineStats) -> dict[str, Any]:
    """Return an engine's counters as plain values, for sending."""
    values = {name: getattr(stats, name) for name in EngineStats.__slots__ if name != "adapters"}
    values["adapters"] = stats.adapters() if stats.adapters is not None else None
    return values


class Totals:
    """Keeps one `EngineStats` with the sum over all replicas.

    Counters never fall: the counts of a replica that is gone are kept. If it was only unreachable, its next
    counters replace them.
    """

    def __init__(self) -> None:
        self.stats = EngineStats()
        self._gone: Snapshot = snapshot(EngineStats())  # sum over the replicas that will not come back
        self._absent: dict[str, Snapshot] = {}  # by replica; longest absent first
        self._now: dict[str, Snapshot] = {}

    def update(self, replica: str, counters: Snapshot) -> None:
        """Store a replica's counters; `sum_up` adds them up."""
        self._absent.pop(replica, None)
        self._now[replica] = counters

    def retire(self, replica: str) -> None:
        """Record that a replica is gone, or cannot be reached."""
        counters = self._now.pop(replica, None)
        if counters is not None:
            self._absent[replica] = {**counters, **dict.fromkeys(_GAUGES, 0)}
        if len(self._absent) > _MAX_ABSENT:
            self._gone = _added([self._gone, self._absent.pop(next(iter(self._absent)))])

    def sum_up(self) -> None:
        """Write the sums to `stats`."""
        total = _added([self._gone, *self._absent.values(), *self._now.values()])
        for name, value in total.items():
            setattr(self.stats, name, value)
        adapters = [
            counters["adapters"] for counters in self._now.values() if counters.get("adapters") is not None
        ]
        self.stats.adapters = (lambda: _named(adapters)) if adapters else None


def _named(adapters: Iterable[tuple[list[str], list[str]]]) -> tuple[list[str], list[str]]:
    running, waiting = ({name for each in adapters for name in each[kind]} for kind in (0, 1))
    return sorted(running), sorted(waiting - running)


def _added(snapshots: list[Snapshot]) -> dict[str, Any]:
    names = [name for name in snapshots[0] if name != "adapters"]
    return {name: _sum([counters[name] for counters in snapshots if name in counters]) for name in names}


def _sum(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {key: _sum([value[key] for value in values]) for key in first}
    if isinstance(first, Histogram):
        total = Histogram(first.bounds)
        total.counts = [sum(counts) for counts in zip(*(value.counts for value in values), strict=True)]
        total.total = sum(value.total for value in values)
        return total
    return sum(values)
