"""One rule for how far a kernel may be from its float64 reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def assert_close(
    actual: Tensor, expected: Tensor, *, length: int, dtype: torch.dtype = torch.float32
) -> None:
    """Hold `actual` to a float64 `expected` whose elements are sums of `length` terms rounded to `dtype`.

    Rounding errors add up like a random walk: the whole tensor may be off by 2 sqrt(length) units of dtype,
    the worst element by 8 sqrt(length) units of the largest. NaN never passes.
    """
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    if expected.numel() == 0:
        return
    assert torch.isfinite(expected).all(), "the reference is not finite"
    error = (actual.double() - expected).abs()
    unit = torch.finfo(dtype).eps * math.sqrt(length)
    whole, worst = float(error.norm() / expected.norm().clamp_min(1e-30)), float(error.max())
    assert whole <= 2 * unit, f"relative error {whole:.3g} is over {2 * unit:.3g}"
    limit = 8 * unit * float(expected.abs().max())
    assert worst <= limit, f"worst error {worst:.3g} is over {limit:.3g}"


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Hold two float32 tensors to the same bytes, so that 0 is not -0 and NaN equals itself."""
    assert actual.shape == expected.shape
    assert torch.equal(actual.contiguous().view(torch.int32), expected.contiguous().view(torch.int32))
