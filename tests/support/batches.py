"""Steps for operators and programs: which tokens of which sequences, and the blocks that hold them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tgi_asgi.ops import FlatRows

NOT_READ = 1 << 30  # fills block tables after a sequence's last block


def slots_of(blocks: Sequence[int], block_size: int, start: int, stop: int) -> Tensor:
    """Return the cache slots of positions [start, stop) of a sequence with these blocks."""
    positions = torch.arange(start, stop)
    return torch.tensor(blocks)[positions // block_size] * block_size + positions % block_size


def flat_rows(
    spans: Sequence[tuple[int, int]],
    blocks: Sequence[Sequence[int]],
    block_size: int,
    ids: Sequence[int] | None = None,
) -> FlatRows:
    """Return the step that computes positions [start, stop) of each sequence with these blocks."""
    positions = np.concatenate([np.arange(start, stop, dtype=np.int32) for start, stop in spans])
    slots = [slots_of(mine, block_size, *span).numpy() for mine, span in zip(blocks, spans, strict=True)]
    table = np.full((len(blocks), max(map(len, blocks))), NOT_READ, np.int32)
    for row, mine in zip(table, blocks, strict=True):
        row[: len(mine)] = mine
    return FlatRows(
        ids=np.zeros_like(positions) if ids is None else np.array(ids, np.int32), positions=positions,
        slots=np.concatenate(slots), query_start=np.cumsum([0] + [stop - start for start, stop in spans]),
        context_len=np.array([stop for _, stop in spans]), block_table=table,
    )  # fmt: skip


def random_blocks(contexts: Sequence[int], num_blocks: int, block_size: int) -> list[list[int]]:
    """Allocate distinct blocks in random order to sequences of these lengths."""
    free = torch.randperm(num_blocks).tolist()
    return [[free.pop() for _ in range(-(-context // block_size))] for context in contexts]
