"""The rotary table that `qkv` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tgi_asgi.ops.arrays import Floats

_POSITIONS = 4096  # positions whose angles are computed at once


@dataclass(frozen=True, slots=True, eq=False)
class RopeTable:
    """Cosines and sines of every position; dim i is rotated with dim i + rotary_dim / 2.

    A head's dims from rotary_dim on are not rotated.
    """

    cos: Floats  # [max_positions, rotary_dim / 2] float32
    sin: Floats  # the same shape and dtype

    @property
    def rotary_dim(self) -> int:
        """Number of dims of a head that are rotated, which are its first."""
        return 2 * int(self.cos.shape[1])

    @classmethod
    def create(
        cls, inverse_frequencies: Sequence[float], max_positions: int, *, scale: float = 1.0
    ) -> RopeTable:
        """Build the table from one inverse frequency per pair, to which the model's scaling has been applied.

        Angles are rounded to float32, as in transformers: at position 1,500 the last bit of an angle is 1e-4,
        which shows in log-probabilities. `scale` multiplies both cosines and sines (YaRN's attention factor).
        """
        frequencies = np.array(inverse_frequencies, np.float32)
        cos = np.empty((max_positions, frequencies.size), np.float32)
        sin = np.empty_like(cos)
        for start in range(0, max_positions, _POSITIONS):  # float64 takes four times the table's memory
            stop = min(start + _POSITIONS, max_positions)
            positions = np.arange(start, stop, dtype=np.float32)
            angles = np.outer(positions, frequencies).astype(np.float64)  # [stop - start, rotary_dim / 2]
            cos[start:stop] = np.cos(angles) * scale
            sin[start:stop] = np.sin(angles) * scale
        return cls(cos, sin)

    @staticmethod
    def bytes_per_position(rotary_dim: int) -> int:
        """Return the bytes that a position occupies."""
        return rotary_dim // 2 * (4 + 4)
