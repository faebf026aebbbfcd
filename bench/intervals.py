"""Medians and ratios over a few rounds, with bootstrap intervals.

The bootstrap resamples rounds (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13: the
percentile interval). A ratio is taken within a round, between two contenders measured within minutes of each
other, so speed differences of the machine between rounds do not widen the interval.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median over rounds, and the interval that contains the true one with probability `CONFIDENCE`."""

    median: float
    low: float
    high: float
    rounds: int

    def rounded(self) -> dict[str, float]:
        """Return it for a record, to four significant digits; a single round has no interval."""
        names = ("median", "low", "high") if self.rounds > 1 else ("median",)
        return {**{name: float(f"{getattr(self, name):.4g}") for name in names}, "rounds": self.rounds}


def estimate(values: Sequence[float], *, resamples: int = RESAMPLES) -> Estimate:
    """Return the median of values, one per round, with its bootstrap interval. Repeatable: the seed is fixed.

    Raises:
        ValueError: if there are no values.
    """
    if not values:
        raise ValueError("an estimate needs at least one value")
    chosen = np.random.default_rng(0).integers(0, len(values), (resamples, len(values)))
    medians = np.median(np.asarray(values, np.float64)[chosen], axis=1)
    low, high = np.quantile(medians, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Estimate(statistics.median(values), float(low), float(high), len(values))


def advantage(
    ours: Mapping[int, float], theirs: Mapping[int, float], *, is_lower_better: bool
) -> Estimate | None:
    """Return how many times better ours is (above 1: ours is better), paired by round.

    Args:
        ours, theirs: A figure by round. Rounds that one of them lacks do not count.
        is_lower_better: Whether the figure is a time or a size; the ratio is then theirs over ours.

    Returns:
        None if no round has both, or a divisor is zero.
    """
    above, below = (theirs, ours) if is_lower_better else (ours, theirs)
    rounds = sorted(ours.keys() & theirs.keys())
    if not rounds or any(below[index] <= 0 for index in rounds):
        return None
    return estimate([above[index] / below[index] for index in rounds])
