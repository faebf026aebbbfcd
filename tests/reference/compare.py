"""The tolerances between a kernel and its float64 reference, and a record of measured errors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Distance:
    """A relative error that was compared with a limit."""

    error: float
    limit: float  # 0: bitwise equal

    @property
    def share(self) -> float:
        """The error as a share of its limit: infinite if the limit is 0 or the error is NaN."""
        if self.error == 0:
            return 0.0
        share = self.error / self.limit if self.limit > 0 else math.inf
        return math.inf if math.isnan(share) else share


Values = Tensor | npt.NDArray[Any]

_measured: ContextVar[list[Distance] | None] = ContextVar("measured", default=None)


@contextlib.contextmanager
def measured() -> Iterator[list[Distance]]:
    """Collect all comparisons made inside the context, in the list yielded."""
    found: list[Distance] = []
    token = _measured.set(found)
    try:
        yield found
    finally:
        _measured.reset(token)


def note(error: float, limit: float) -> None:
    """Record a result's error before it is compared with the limit."""
    found = _measured.get()
    if found is not None:
        found.append(Distance(error, limit))


def assert_close(
    actual: Values, expected: Values, *, length: int, dtype: torch.dtype = torch.float32
) -> None:
    """Compare `actual` with a float64 `expected` of sums of `length` terms, rounded to `dtype`.

    Rounding errors add up like a random walk: the whole tensor may be off by 2 sqrt(length) units of dtype,
    the worst element by 8 sqrt(length) units of the largest. NaN never passes.
    """
    unit = torch.finfo(dtype).eps * math.sqrt(length)
    assert_within(actual, expected, whole=2 * unit, worst=8 * unit)


def assert_within(actual: Values, expected: Values, *, whole: float, worst: float) -> None:
    """Limit the relative error of the whole tensor and the worst element's error relative to the largest."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    if expected.numel() == 0:
        return
    assert torch.isfinite(expected).all(), "the reference is not finite"
    error = (actual.double() - expected).abs()
    for what, reached, limit in (
        ("relative", error.norm() / expected.norm().clamp_min(1e-30), whole),
        ("worst", error.max() / expected.abs().max().clamp_min(1e-30), worst),
    ):
        note(float(reached), limit)
        assert reached <= limit, f"{what} error {float(reached):.3g} is over {limit:.3g}"


def assert_equal(actual: Values, expected: Values) -> None:
    """Require equal values; NaN never passes."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    is_equal = torch.equal(actual, expected)
    if not is_equal:
        error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
        note(float(error), 0.0)
    assert is_equal, "the values are not equal"
    note(0.0, 0.0)


def assert_same_bits(actual: Values, expected: Values) -> None:
    """Require the same float32 bytes, so that 0 differs from -0 and NaN equals itself."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape
    assert torch.equal(actual.contiguous().view(torch.int32), expected.contiguous().view(torch.int32))
