"""A CPU's KV pool in natural order: what the kernels' layout means, written anew from its description.

The layout is that of KvLayerView in csrc/cpu/step/step.h; the order of a key's dims is `ops.layout`'s.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi.ops import KvLayer, KvPool, layout

_SUB_BLOCK = 16  # tokens
_STRIP = 32


def poison(pool: KvPool) -> None:
    """Make every number of the pool NaN: floats, and the scales of int8."""
    pool.native.memory()[:] = 0xFF


def poisoned_pool(
    *,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    num_layers: int = 1,
    num_blocks: int = 8,
    block_size: int = 16,
) -> KvPool:
    """Make a pool of which nothing has been written."""
    pool = KvPool(
        num_layers=num_layers, num_blocks=num_blocks, num_kv_heads=num_kv_heads, head_dim=head_dim,
        block_size=block_size, dtype=dtype,
    )  # fmt: skip
    poison(pool)
    return pool


def read_kv(layer: KvLayer, slots: Tensor, rotary_dim: int | None = None) -> tuple[Tensor, Tensor]:
    """Return keys and values [n_slots, kv_heads, head_dim] float32, dims in the model's order.

    `rotary_dim` is that of the weight which wrote them; None: whole heads turn.
    """
    found = []
    for which in (0, 1):
        places = _Places(layer, slots, which)
        kept = _kept_dims(layer, which, rotary_dim)
        out = torch.empty(len(slots), layer.pool.num_kv_heads, layer.head_dim)
        out[..., torch.from_numpy(kept[kept >= 0])] = _numbers(layer, places, which)[..., kept >= 0]
        found.append(out)
    return found[0], found[1]


def write_kv(
    layer: KvLayer, slots: Tensor, keys: Tensor, values: Tensor, rotary_dim: int | None = None
) -> None:
    """Write keys and values [n_slots, kv_heads, head_dim], which the pool's dtype must hold.

    An int8 pool gets codes of the largest of each 32 dims, as the kernels make them.
    """
    for which, given in ((0, keys), (1, values)):
        kept = _kept_dims(layer, which, rotary_dim)
        rows = given.float()[..., torch.from_numpy(np.maximum(kept, 0))]
        rows[..., torch.from_numpy(kept < 0)] = 0
        _store(layer, _Places(layer, slots, which), which, rows)


# Where each token's numbers lie: views of a layer's memory, [block, head, sub-block, bytes].


def _part(layer: KvLayer, which: int) -> npt.NDArray[np.uint8]:
    pool = layer.pool
    memory = pool.native.memory()
    per_layer = memory.shape[1] // len(pool.layers)
    mine = memory[:, layer.index * per_layer : (layer.index + 1) * per_layer]
    sub_blocks = pool.block_size // _SUB_BLOCK
    view: npt.NDArray[np.uint8] = np.lib.stride_tricks.as_strided(
        mine,
        (pool.num_blocks, 2, pool.num_kv_heads, sub_blocks, per_layer // (2 * pool.num_kv_heads * sub_blocks)),
        (memory.strides[0], per_layer // 2, per_layer // (2 * pool.num_kv_heads),
         per_layer // (2 * pool.num_kv_heads * sub_blocks), 1),
    )  # fmt: skip
    return view[:, which]


class _Places:
    """Of each slot: the indices that pick its head's sub-block, and the token's number in that."""

    def __init__(self, layer: KvLayer, slots: Tensor, which: int) -> None:
        block, offset = np.divmod(slots.numpy(), layer.pool.block_size)
        heads = np.arange(layer.pool.num_kv_heads)
        self.part = _part(layer, which)
        self.index = (block[:, None], heads[None, :], (offset // _SUB_BLOCK)[:, None])
        self.token = (offset % _SUB_BLOCK)[:, None, None]


def _kept_dims(layer: KvLayer, which: int, rotary_dim: int | None) -> layout.Order:
    """Return which dim of a head each kept place has; -1: int8's padding."""
    if layer.pool.dtype is torch.int8:
        return layout.head_order(1, layer.head_dim, (rotary_dim or layer.head_dim) if which == 0 else None)
    if which == 1:
        return np.arange(layer.head_dim)
    is_paired = layer.pool.dtype is torch.bfloat16
    return layout.kept_dims(layer.head_dim, rotary_dim or layer.head_dim, is_paired=is_paired)


def _element_bytes(layer: KvLayer, which: int, token: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the first byte of each kept number of tokens [n, 1, 1] inside their sub-blocks."""
    size = layer.pool.dtype.itemsize
    group = {4: 1, 2: 2, 1: 4}[size]  # numbers that lie together: of keys dims, of values tokens
    num_kept = layer.pool.native.head_dim
    dim = np.arange(num_kept)[None, None, :]
    if which == 0:
        element = (dim // group * _SUB_BLOCK + token) * group + dim % group
    else:
        element = (token // group * num_kept + dim) * group + token % group
    found: npt.NDArray[np.int64] = element * size
    return found


def _scale_bytes(layer: KvLayer, token: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    num_kept = layer.pool.native.head_dim
    strips = np.arange(num_kept // _STRIP)[None, None, :]
    found: npt.NDArray[np.int64] = _SUB_BLOCK * num_kept + 2 * (strips * _SUB_BLOCK + token)
    return found


def _numbers(layer: KvLayer, at: _Places, which: int) -> Tensor:
    """Return the kept numbers [n, kv_heads, kept dims] as float32, in the cache's order."""
    dtype = layer.pool.dtype
    raw = torch.from_numpy(_gather(at, _element_bytes(layer, which, at.token), dtype.itemsize))
    if dtype is not torch.int8:
        return raw.view(dtype).squeeze(-1).float()
    codes = (raw ^ (0x80 if which == 0 else 0)).view(torch.int8).squeeze(-1).float()
    scales = torch.from_numpy(_gather(at, _scale_bytes(layer, at.token), 2)).view(torch.float16).squeeze(-1)
    return codes * scales.float().repeat_interleave(_STRIP, -1)


def _store(layer: KvLayer, at: _Places, which: int, rows: Tensor) -> None:
    dtype = layer.pool.dtype
    if dtype is torch.int8:
        strips = rows.unflatten(-1, (-1, _STRIP))
        scales = strips.abs().amax(-1) / 127
        codes = (strips / scales.clamp_min(1e-30)[..., None]).round().flatten(-2).to(torch.int8)
        _scatter(at, _scale_bytes(layer, at.token), scales.to(torch.float16)[..., None].view(torch.uint8))
        raw = codes[..., None].view(torch.uint8) ^ (0x80 if which == 0 else 0)
    else:
        raw = rows.to(dtype)[..., None].view(torch.uint8)
    _scatter(at, _element_bytes(layer, which, at.token), raw)


def _gather(at: _Places, first: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.uint8]:
    index = tuple(each[..., None, None] for each in at.index)
    return np.ascontiguousarray(at.part[(*index, first[..., None] + np.arange(size))])


def _scatter(at: _Places, first: npt.NDArray[np.int64], raw: Tensor) -> None:
    index = tuple(each[..., None, None] for each in at.index)
    at.part[(*index, first[..., None] + np.arange(raw.shape[-1]))] = raw.numpy()
