"""The order of weight rows in the CPU kernels' panels, and of the vectors that go with them.

A panel is 16 rows, a strip is two panels. docs/kernels.md has a drawing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.qkv_heads import QkvHeads

PANEL = 16
STRIP = 2 * PANEL
Order = npt.NDArray[np.int64]  # source row of each packed row; -1: a row of zeros


def round_up(count: int, multiple: int = STRIP) -> int:
    """Return a count rounded up to a multiple; by default to whole strips."""
    return -(-count // multiple) * multiple


def row_order(rows: int) -> Order:
    """Return rows in order, padded to whole strips."""
    order = np.full(round_up(rows), -1, np.int64)
    order[:rows] = np.arange(rows)
    return order


def head_order(
    num_heads: int,
    head_dim: int,
    rotary_dim: int | None,
    *,
    is_interleaved: bool = False,
    is_proportional: bool = False,
) -> Order:
    """Return the row order of consecutive heads, each padded to whole strips.

    In a rotated head (queries, keys), each strip holds 16 pairs of dims, the first of each pair in panel 0
    and the second in panel 1. The pairs that rotate together come first: i and i + rotary_dim / 2, or 2i and
    2i + 1 if interleaved, or i and i + head_dim / 2 if proportional. The other dims follow, paired
    arbitrarily. With rotary_dim None (values), dims are in order.
    """
    if rotary_dim is None:
        one = row_order(head_dim)
    else:
        half = rotary_dim // 2
        rotated, apart = (2 * np.arange(half), 1) if is_interleaved else (np.arange(half), half)
        if is_proportional:
            apart = head_dim // 2
        rest = np.setdiff1d(np.arange(head_dim), np.concatenate([rotated, rotated + apart]))
        first = np.concatenate([rotated, rest[::2]])
        second = np.concatenate([rotated + apart, rest[1::2]])
        num_pairs = round_up(head_dim) // 2
        pairs = np.full((2, num_pairs), -1, np.int64)
        pairs[0, : len(first)], pairs[1, : len(second)] = first, second
        one = pairs.reshape(2, -1, PANEL).swapaxes(0, 1).reshape(-1)  # [strip, position in the pair, 16]
    starts = np.arange(num_heads)[:, None] * head_dim
    return np.where(one >= 0, starts + one, -1).reshape(-1)


def interleaved_order(rows: int) -> Order:
    """Return alternating panels of gate and up: two strips give 32 outputs, one block of the next input."""
    panels = row_order(rows).reshape(-1, PANEL)
    return np.concatenate([panels, np.where(panels >= 0, panels + rows, -1)], axis=1).reshape(-1)


def ordered(vector: Floats, order: Order) -> Floats:
    """Return a bias or a norm's weight in the order of the packed rows, zero for padding rows."""
    found: Floats = np.where(order >= 0, vector[order], np.float32(0))
    return found


def padded(vector: Floats) -> Floats:
    """Return a vector [columns], or rows [n, columns], padded with zeros to a multiple of 32 columns."""
    return pad_columns(vector, -vector.shape[-1] % STRIP)


def pad_columns(rows: Floats, count: int, value: float = 0.0) -> Floats:
    """Return rows, or a vector, with `count` more columns of this value, contiguous; a copy if needed."""
    if count:
        widths = [(0, 0)] * (rows.ndim - 1) + [(0, count)]
        rows = np.pad(rows, widths, constant_values=value)
    return np.ascontiguousarray(rows)


def qkv_orders(heads: QkvHeads) -> list[Order]:
    """Return the row orders of q, and of k and v if they are computed."""
    rotated = [
        head_order(
            count, heads.head_dim, heads.rotary_dim, is_interleaved=heads.is_interleaved,
            is_proportional=heads.is_proportional,
        )
        for count in heads.counts[:2]
    ]  # fmt: skip
    return [*rotated, head_order(heads.num_kv_heads, heads.head_dim, None)] if heads.has_keys else rotated
