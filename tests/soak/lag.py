"""The lag of a server's event loop during a period, from the growth of its own histogram."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx

_BUCKET = 'tgi_event_loop_lag_seconds_bucket{le="'


@contextmanager
def reporting_lag(url: str, report: Callable[[str], None]) -> Iterator[None]:
    """Report p50, p99 and the maximum of the lag inside the context, excluding earlier lag."""
    before = _counts(url)
    yield
    try:
        after = _counts(url)
    except httpx.TransportError:
        report("loop lag unknown, for the server has ended")
        return
    counts = {bound: count - before[bound] for bound, count in after.items()}
    p50, p99, most = (_below_ms(counts, share) for share in (0.5, 0.99, 1.0))
    num_ticks = counts[float("inf")]
    report(
        f"loop lag p50 <= {p50:.2f} ms, p99 <= {p99:.2f} ms, max <= {most:.2f} ms, {num_ticks} times measured"
    )


def _counts(url: str) -> dict[float, int]:
    """Return how often the loop was at most this many seconds late, by ascending bound."""
    lines = httpx.get(f"{url}/metrics", timeout=60, verify=False).text.splitlines()
    buckets = (line.removeprefix(_BUCKET) for line in lines if line.startswith(_BUCKET))
    return {float(bound): int(count) for bound, _, count in (bucket.partition('"} ') for bucket in buckets)}


def _below_ms(counts: dict[float, int], share: float) -> float:
    """Return the smallest bound in ms that at least this share of the observations does not exceed."""
    needed = share * counts[float("inf")]
    return next(bound for bound, count in counts.items() if count >= needed) * 1000
