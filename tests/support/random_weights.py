"""Random weights in each file format, and their values by the `gguf` package (ggml's arithmetic)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tgi_asgi.ops import FORMATS as TABLE
from tgi_asgi.ops import WeightSource
from tgi_asgi.ops.sources import decode
from tgi_asgi.ops.tensors import from_tensor

# Offsets of the fp16 numbers in a block: these get small normal values, all other bytes are random.
_HALVES = {
    "Q8_0": (0,),
    "Q8_1": (0, 2),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ1_S": (0,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
# Values of MXFP4's codes.
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
_EXPONENT = "MXFP4"  # its first byte is an E8M0 exponent
_SPREAD = "IQ1_M"  # the highest four bits of its last four words are an fp16 number, the lowest first
_MAX_ZERO = 128  # of INT4's zero points, which follow the scale
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTISED = (*_HALVES, _EXPONENT, _SPREAD)
FORMATS = (*_FLOATS, *QUANTISED)  # the GGUF formats that the CPU kernels multiply directly


def random_weight(format: str, rows: int, columns: int, seed: int) -> WeightSource:
    """Make a [rows, columns] weight of random bytes with valid scales."""
    rng = np.random.default_rng(seed)
    if format in _FLOATS:
        values = torch.from_numpy(rng.standard_normal((rows, columns)).astype(np.float32) / columns**0.5)
        return from_tensor(values.to(_FLOATS[format]))
    info = TABLE[format]
    blocks = rng.integers(0, 256, (rows * columns // info.block_columns, info.block_bytes), np.uint8)
    return _with_scales(blocks, rng, format, (rows, columns))


def same_codes(format: str, rows: int, columns: int, byte: int) -> WeightSource:
    """Make a quantised [rows, columns] weight of one repeated byte, with valid scales."""
    info = TABLE[format]
    blocks = np.full((rows * columns // info.block_columns, info.block_bytes), byte, np.uint8)
    return _with_scales(blocks, np.random.default_rng(0), format, (rows, columns))


def in_other_order(source: WeightSource, seed: int) -> WeightSource:
    """Return a source whose columns are those of the matrix in a random order, the same for the same seed."""
    return replace(source, order=np.random.default_rng(seed).permutation(source.shape[1]))


def _with_scales(
    blocks: NDArray[np.uint8], rng: np.random.Generator, format: str, shape: tuple[int, int]
) -> WeightSource:
    for offset in _HALVES.get(format, ()):
        scales = rng.uniform(1e-4, 4e-3, len(blocks)) * rng.choice([-1, 1], len(blocks))
        blocks[:, offset : offset + 2] = scales.astype(np.float16).view(np.uint8).reshape(-1, 2)
    if format == _EXPONENT:
        blocks[:, 0] = rng.integers(118, 122, len(blocks))
    if format == _SPREAD:
        scales = rng.uniform(1e-4, 4e-3, len(blocks)) * rng.choice([-1, 1], len(blocks))
        nibbles = (
            scales.astype(np.float16).view(np.uint16)[:, None] >> np.array([0, 4, 8, 12], np.uint16) & 15
        )
        blocks[:, 49::2] = blocks[:, 49::2] & 15 | (nibbles << 4).astype(np.uint8)
    if format.startswith("INT4"):
        blocks[:, 2] = rng.integers(0, _MAX_ZERO + 1, len(blocks))
    return WeightSource(blocks.reshape(-1), format, shape)


def decoded_values(source: WeightSource) -> Tensor:
    """Return a weight's values as float32, its columns in order."""
    if source.order is not None:
        values = torch.empty(source.shape)
        values[:, torch.from_numpy(source.order)] = decoded_values(replace(source, order=None))
        return values
    if source.format in _FLOATS:
        values = torch.from_numpy(source.data).view(_FLOATS[source.format])
        return values.view(source.shape).float()
    if source.format == "Q8_1":  # only used for products inside ggml; `gguf` does not decode it
        blocks = torch.from_numpy(source.data).view(-1, 36)
        scales = blocks[:, :2].contiguous().view(torch.float16).float()
        return (scales * blocks[:, 4:].view(torch.int8).float()).view(source.shape)
    try:
        import gguf
    except (
        ModuleNotFoundError
    ):  # a minimal GPU machine: the project's reader, which tests compare with `gguf`
        return torch.from_numpy(decode(source))
    kind = gguf.GGMLQuantizationType[source.format]
    # As one row, because `gguf` takes rows in groups of sixteen, each of which costs as much as all.
    decoded = gguf.quants.dequantize(source.data.reshape(1, -1), kind)
    return torch.from_numpy(decoded).view(source.shape)
