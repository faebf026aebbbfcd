"""The rotary table that `qkv` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_POSITIONS = 4096  # positions whose angles are computed at once


@dataclass(frozen=True, slots=True, eq=False)
class RopeTable:
    """Cosines and sines of every position; dim i is rotated with dim i + rotary_dim / 2.

    A head's dims from rotary_dim on are not rotated.
    """

    cos: Tensor  # [max_positions, rotary_dim / 2] float32
    sin: Tensor  # the same shape and dtype

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
        frequencies = torch.tensor(inverse_frequencies, dtype=torch.float32)
        cos = torch.empty(max_positions, frequencies.numel())
        sin = torch.empty_like(cos)
        for start in range(0, max_positions, _POSITIONS):  # float64 takes four times the table's memory
            stop = min(start + _POSITIONS, max_positions)
            positions = torch.arange(start, stop, dtype=torch.float32)
            angles = torch.outer(positions, frequencies).double()  # [stop - start, rotary_dim / 2]
            cos[start:stop] = angles.cos() * scale
            sin[start:stop] = angles.sin() * scale
        return cls(cos, sin)

    @staticmethod
    def bytes_per_position(rotary_dim: int) -> int:
        """Return the bytes that a position occupies."""
        return rotary_dim // 2 * (4 + 4)
