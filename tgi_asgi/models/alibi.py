"""Slopes of attention with linear biases: Press et al., Train Short, Test Long, arXiv 2108.12409."""

from __future__ import annotations


def alibi_slopes(num_heads: int, largest: float = 8.0) -> tuple[float, ...]:
    """Return each head's slope: a geometric series down to 2^-largest.

    If the number of heads is not a power of two, the heads beyond the largest power of two below it use every
    second slope of the series for twice that power.
    """
    power = 1 << (num_heads.bit_length() - 1)
    series = [2 ** (-largest * (head + 1) / power) for head in range(power)]
    between = [2 ** (-largest * (2 * head + 1) / (2 * power)) for head in range(num_heads - power)]
    return (*series, *between)
