"""What a model's forward pass works on: one step's tokens, flat, and where their context lies."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tgi_asgi.ops import AttentionTables


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one step, sequence after sequence."""

    ids: Tensor  # [n_tokens] int32
    positions: Tensor  # [n_tokens] int32
    slots: Tensor  # [n_tokens] int64, where keys and values go: block * block_size + offset
    tables: AttentionTables
