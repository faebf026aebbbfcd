"""Random weights in each file format, and what they mean by `formats.quants`: ggml's own arithmetic."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tgi_asgi.formats.gguf_types import GgufType
from tgi_asgi.formats.quants import dequantise
from tgi_asgi.ops import WeightSource
from tgi_asgi.ops.formats import BLOCKS

# Where a block has fp16 numbers: they are made small and normal, all other bytes are random.
_HALVES = {
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
FORMATS = tuple(BLOCKS)
QUANTISED = tuple(_HALVES)


def random_weight(format: str, rows: int, columns: int, seed: int) -> WeightSource:
    """Make a [rows, columns] weight of random bytes with sound scales."""
    rng = np.random.default_rng(seed)
    elements, size = BLOCKS[format]
    if format not in _HALVES:
        values = torch.from_numpy(rng.standard_normal((rows, columns)).astype(np.float32) / columns**0.5)
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[format]
        data = values.to(dtype).view(torch.uint8).reshape(-1).numpy()
        return WeightSource(data, format, (rows, columns))
    blocks = rng.integers(0, 256, (rows * columns // elements, size), np.uint8)
    for offset in _HALVES[format]:
        scales = rng.uniform(1e-4, 4e-3, len(blocks)) * rng.choice([-1, 1], len(blocks))
        blocks[:, offset : offset + 2] = scales.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return WeightSource(blocks.reshape(-1), format, (rows, columns))


def meaning(source: WeightSource) -> Tensor:
    """Return a weight as float32, decoded by the reader of files."""
    return torch.from_numpy(dequantise(source.data, GgufType[source.format], source.shape))
