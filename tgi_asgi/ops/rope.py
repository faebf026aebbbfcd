"""The rotary table that `qkv` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RopeTable:
    """Cosines and sines of every position; dimension i is rotated with i + rotary_dim / 2.

    A head's dims from rotary_dim on are not rotated.
    """

    cos: Tensor  # [max_positions, rotary_dim / 2] float32
    sin: Tensor  # the same

    @property
    def rotary_dim(self) -> int:
        """Dims of a head that are rotated, its first."""
        return 2 * int(self.cos.shape[1])

    @classmethod
    def create(
        cls, inverse_frequencies: Sequence[float], max_positions: int, *, scale: float = 1.0
    ) -> RopeTable:
        """Build the table from one inverse frequency a pair, after whatever scaling the model asks for.

        Angles are rounded to float32 where transformers rounds them: at position 1,500 the last bit of an
        angle is 1e-4, which shows in log-probabilities. `scale` multiplies both (YaRN's attention factor).
        """
        frequencies = torch.tensor(inverse_frequencies, dtype=torch.float32)
        positions = torch.arange(max_positions, dtype=torch.float32)
        angles = torch.outer(positions, frequencies).double()  # [max_positions, rotary_dim / 2]
        return cls((angles.cos() * scale).float(), (angles.sin() * scale).float())

    @staticmethod
    def bytes_per_position(head_dim: int) -> int:
        """Return the most memory that a position takes while a table is built."""
        return head_dim // 2 * (8 + 8 + 4 + 4)
