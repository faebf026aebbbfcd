"""Slopes of attention with linear biases: Press et al., Train Short, Test Long, arXiv 2108.12409."""

from __future__ import annotations


def alibi_slopes(num_heads: int, largest: float = 8.0) -> tuple[float, ...]:
    """Return each head's slope: a geometric series down to 2^-largest.

    Where the number of heads is no power of two, the heads beyond one take every second of the series of
    twice as many.
    """
    power = 1 << (num_heads.bit_length() - 1)
    series = [2 ** (-largest * (head + 1) / power) for head in range(power)]
    between = [2 ** (-largest * (2 * head + 1) / (2 * power)) for head in range(num_heads - power)]
    return (*series, *between)
