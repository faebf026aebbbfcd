"""Turn ggml's blocks into float32, exactly as ggml's own dequantize_row_* do.

The arithmetic is float32 in ggml's order, so results are equal bit for bit. Used by `models/loading` where a
weight is wanted as floats, and by tests as the truth about a block; knows no file and no torch.
Layouts: ggml-common.h; formulas: ggml-quants.c.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.formats.gguf_types import GgufType

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_CHUNK_ELEMENTS = 1 << 20  # temporaries stay within the last-level cache and a few MB


def dequantise(raw: Bytes, type: GgufType, shape: Sequence[int]) -> Floats:
    """Decode a tensor of `shape` (rows first) from its flat bytes `raw`.

    Returns:
        A new float32 array of `shape`.

    Raises:
        ModelLoadError: the type is not one that this module decodes, or `raw` has another size.
    """
    decode = _DECODERS.get(type)
    if decode is None:
        known = ", ".join(kind.name for kind in _DECODERS)
        raise ModelLoadError(f"tensors of type {type.name} are not supported; supported are {known}")
    num_elements = math.prod(shape)
    num_blocks = num_elements // type.block_size
    if num_elements % type.block_size or raw.size != num_blocks * type.block_bytes:
        raise ModelLoadError(
            f"{type.name} data of shape {tuple(shape)} cannot take {raw.size} bytes; "
            f"a block of {type.block_size} elements takes {type.block_bytes}"
        )
    blocks = raw.reshape(num_blocks, type.block_bytes)
    out = np.empty((num_blocks, type.block_size), np.float32)
    step = _CHUNK_ELEMENTS // type.block_size
    for start in range(0, num_blocks, step):
        out[start : start + step] = decode(blocks[start : start + step])
    return out.reshape(tuple(shape))


def is_supported(type: GgufType) -> bool:
    """Say whether `dequantise` decodes this type."""
    return type in _DECODERS


def _typed(blocks: Bytes, dtype: Any) -> npt.NDArray[Any]:
    """Read a block's bytes as little-endian numbers (copied, so that they are aligned)."""
    return np.ascontiguousarray(blocks).view(np.dtype(dtype).newbyteorder("<"))


def _half(blocks: Bytes) -> Floats:
    return _typed(blocks, np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """[n, 16] bytes -> [n, 32]: all low nibbles, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _fifth_bits(packed: Bytes) -> Bytes:
    """[n, 4] bytes -> [n, 32]: bit j of the little-endian word, moved to place 4."""
    return np.left_shift(np.unpackbits(packed, axis=1, bitorder="little"), 4, dtype=np.uint8)


def _f32(blocks: Bytes) -> Floats:
    return _typed(blocks, np.float32)


def _bf16(blocks: Bytes) -> Floats:
    return (_typed(blocks, np.uint16).astype(np.uint32) << 16).view(np.float32)


def _q8_0(blocks: Bytes) -> Floats:
    return _half(blocks[:, :2]) * _typed(blocks[:, 2:], np.int8).astype(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    return _half(blocks[:, :2]) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks: Bytes) -> Floats:
    return _half(blocks[:, :2]) * _nibbles(blocks[:, 4:]) + _half(blocks[:, 2:4])


def _q5_0(blocks: Bytes) -> Floats:
    quants = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return _half(blocks[:, :2]) * (quants.astype(np.float32) - 16)


def _q5_1(blocks: Bytes) -> Floats:
    quants = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks[:, :2]) * quants + _half(blocks[:, 2:4])


def _k_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    """Q4_K and Q5_K's head (d, dmin, 12 bytes of 6-bit pairs) -> scales and minima, both [n, 8]."""
    d, dmin = _half(blocks[:, :2]), _half(blocks[:, 2:4])
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=1)
    return d * scales, dmin * minima


def _k_nibbles(packed: Bytes) -> Bytes:
    """[n, 128] bytes -> [n, 8, 32]: of each 32 bytes the low nibbles, then the high ones."""
    groups = packed.reshape(-1, 4, 1, 32)
    return np.concatenate([groups & 15, groups >> 4], axis=2).reshape(-1, 8, 32)


def _q4_k(blocks: Bytes) -> Floats:
    scales, minima = _k_scales(blocks)
    quants = _k_nibbles(blocks[:, 16:])
    return (scales[..., None] * quants - minima[..., None]).reshape(-1, 256)


def _q5_k(blocks: Bytes) -> Floats:
    scales, minima = _k_scales(blocks)
    fifth = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1  # [n, 8, 32]
    quants = _k_nibbles(blocks[:, 48:]) | fifth << 4
    return (scales[..., None] * quants - minima[..., None]).reshape(-1, 256)


def _q6_k(blocks: Bytes) -> Floats:
    packed, pairs = blocks[:, :128].reshape(-1, 2, 1, 64), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    low = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(-1, 2, 4, 32)
    high = (pairs >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3  # [n, 2, 4, 32]
    quants = (low | high << 4).astype(np.float32).reshape(-1, 16, 16) - 32
    scales = _half(blocks[:, 208:]) * _typed(blocks[:, 192:208], np.int8).astype(np.float32)
    values: Floats = scales[..., None] * quants
    return values.reshape(-1, 256)


_DECODERS: dict[GgufType, Callable[[Bytes], Floats]] = {
    GgufType.F32: _f32,
    GgufType.F16: _half,
    GgufType.BF16: _bf16,
    GgufType.Q4_0: _q4_0,
    GgufType.Q4_1: _q4_1,
    GgufType.Q5_0: _q5_0,
    GgufType.Q5_1: _q5_1,
    GgufType.Q8_0: _q8_0,
    GgufType.Q4_K: _q4_k,
    GgufType.Q5_K: _q5_k,
    GgufType.Q6_K: _q6_k,
}
