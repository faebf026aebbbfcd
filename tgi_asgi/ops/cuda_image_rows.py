"""What images bring to a CUDA step: rows in place of tokens, and rows of the rotary table."""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.rope import RopeTable


class OwnAngles:
    """A rotary table with room behind it for rows that only one step has, at fixed addresses.

        first = angles.write(cosines, sines)   # a token turns by row i of them if its position is first + i

    Attributes:
        rope: The table.
        cos, sin: [positions + max_tokens, rotary_dim / 2] float32 on the device.
    """

    def __init__(self, rope: RopeTable, max_tokens: int, device: torch.device) -> None:
        self.rope = rope
        room = torch.zeros(max_tokens, rope.cos.shape[1], device=device)
        self.cos, self.sin = (
            torch.cat([torch.from_numpy(table).to(device), room]) for table in (rope.cos, rope.sin)
        )

    def write(self, cosines: Floats, sines: Floats) -> int:
        """Write rows [n, rotary_dim / 2] of the next step; return the number of the first.

        Steps that were launched before have read theirs by then: all are on one stream.
        """
        first = len(self.rope.cos)
        for table, values in ((self.cos, cosines), (self.sin, sines)):
            table[first : first + len(values)].copy_(torch.from_numpy(values), non_blocking=True)
        return first


def place_rows(x: Tensor, tokens: Tensor, rows: Tensor, level: int) -> None:
    """Bring images' rows [levels, n, hidden] of a level into the residual x, as `ops.image_rows` says."""
    if level == 0:
        x.index_copy_(0, tokens, rows[0])
    else:
        x.index_add_(0, tokens, rows[level])
