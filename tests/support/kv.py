"""Read and write a CPU KV pool in natural order, with its layout implemented independently of the kernels.

KvLayerView in csrc/cpu/step/step.h describes the layout; `ops.layout` defines the order of a key's dims.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi.models.config import CacheShape
from tgi_asgi.ops import KvDtype, KvPool, StepLimits, cached_head_dim, layout
from tgi_asgi.ops.kv import KvLayer
from tgi_asgi.runner.groups import BlockNeeds
from tgi_asgi.runner.kv import KvSize

_Bytes = npt.NDArray[np.uint8]
_SUB_BLOCK = 16  # tokens
_STRIP = 32
_WORDS = {"float32": np.int32, "bfloat16": np.int16, "int8": np.uint8}
_TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def plain_size(num_blocks: int, dtype: KvDtype = "float32") -> KvSize:
    """Return the size of a pool of blocks of 16 tokens whose tables serve all layers."""
    needs = BlockNeeds((None,), block_size=16, max_step_tokens=4096)
    return KvSize(num_blocks, needs, bytes_per_token=1, dtype=dtype)


def plain_limits(*, max_sequences: int, max_tokens: int, max_context: int) -> StepLimits:
    """Return limits of steps with a row of logits per sequence."""
    return StepLimits(
        max_tokens=max_tokens, max_sequences=max_sequences, max_rows=max_sequences, max_context=max_context
    )


def poison(pool: KvPool) -> None:
    """Set every number of the pool to NaN: floats, and the scales of int8."""
    pool.native.memory()[:] = 0xFF


def poisoned_pool(
    *,
    num_kv_heads: int,
    head_dim: int,
    dtype: KvDtype,
    num_layers: int = 1,
    num_blocks: int = 8,
    block_size: int = 16,
    value_dim: int | None = None,
) -> KvPool:
    """Make a pool in which nothing has been written."""
    shape = CacheShape(num_kv_heads, head_dim, value_dim or head_dim)
    pool = KvPool([shape] * num_layers, num_blocks=num_blocks, block_size=block_size, dtype=dtype)
    poison(pool)
    return pool


def read_kv(
    layer: KvLayer, slots: Tensor, rotary_dim: int | None = None, *, is_interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Return keys and values [n_slots, kv_heads, head_dim] float32, dims in the model's order.

    `rotary_dim` is that of the weight that wrote them; None means that whole heads are rotated.
    """
    found = []
    for which in (0, 1):
        kept = _kept_dims(layer, which, rotary_dim, is_interleaved=is_interleaved)
        out = torch.empty(len(slots), layer.num_kv_heads, layer.head_dim)
        out[..., torch.from_numpy(kept[kept >= 0])] = _load(layer, slots, which)[..., kept >= 0]
        found.append(out)
    return found[0], found[1]


def write_kv(
    layer: KvLayer, slots: Tensor, keys: Tensor, values: Tensor, rotary_dim: int | None = None
) -> None:
    """Write keys and values [n_slots, kv_heads, head_dim], rounded to the pool's dtype.

    In an int8 pool, the largest value of each 32 dims sets the scale of their codes, as in the kernels.
    """
    for which, given in ((0, keys), (1, values)):
        kept = _kept_dims(layer, which, rotary_dim)
        rows = given.float()[..., torch.from_numpy(np.maximum(kept, 0))]
        rows[..., torch.from_numpy(kept < 0)] = 0
        _store(layer, slots, which, rows)


def cached_dims(
    head_dim: int,
    rotary_dim: int | None,
    *,
    is_paired: bool,
    is_interleaved: bool = False,
    is_proportional: bool = False,
) -> layout.Order:
    """Return, for each position of a head in a float cache or query, the dim that it holds.

    The order is that of the packed rows without padding; bfloat16 (`is_paired`) stores both dims of a pair in
    one word.
    """
    one = layout.head_order(
        1, head_dim, rotary_dim, is_interleaved=is_interleaved, is_proportional=is_proportional
    )
    strips = one.reshape(-1, 2, layout.PANEL)
    places = (strips.swapaxes(1, 2) if is_paired else strips).reshape(-1)
    return places[places >= 0]


def _kept_dims(
    layer: KvLayer, which: int, rotary_dim: int | None, *, is_interleaved: bool = False
) -> layout.Order:
    """Return the head dim stored at each place of the cache; -1 marks int8's padding."""
    if layer.pool.dtype == "int8":
        return layout.head_order(
            1, layer.head_dim, (rotary_dim or layer.head_dim) if which == 0 else None,
            is_interleaved=is_interleaved,
        )  # fmt: skip
    if which == 1:
        return np.arange(layer.head_dim)
    is_paired = layer.pool.dtype == "bfloat16"
    return cached_dims(
        layer.head_dim, rotary_dim or layer.head_dim, is_paired=is_paired, is_interleaved=is_interleaved
    )


def _sub_blocks(layer: KvLayer, which: int) -> _Bytes:
    """Return the bytes of a layer's keys or values as a view [block, kv_head, sub-block, bytes]."""
    pool = layer.pool
    memory = pool.native.memory()
    sizes = (pool.num_blocks, len(pool.layers), 2, layer.num_kv_heads, pool.block_size // _SUB_BLOCK, -1)
    view: _Bytes = memory.reshape(*sizes)[:, layer.index, which]
    return view


def _element_words(layer: KvLayer, which: int) -> npt.NDArray[Any]:
    """Return the stored numbers as integers, a view [block, kv_head, sub-block, token, dim / g, g].

    For values, the last axis has length 1.
    """
    num_kept = cached_head_dim(layer.head_dim, layer.pool.dtype)
    words = np.dtype(_WORDS[layer.pool.dtype])
    group = 4 // words.itemsize  # numbers in a word: dims for keys, tokens for values
    flat = _sub_blocks(layer, which)[..., : _SUB_BLOCK * num_kept * words.itemsize].view(words)
    if which == 0:
        return flat.reshape(*flat.shape[:3], num_kept // group, _SUB_BLOCK, group).swapaxes(3, 4)
    by_token = flat.reshape(*flat.shape[:3], _SUB_BLOCK // group, num_kept, group)
    return by_token.swapaxes(4, 5)[..., None]  # [..., tokens / g, g, dim, 1]


def _picked(layer: KvLayer, slots: Tensor, which: int) -> tuple[npt.NDArray[Any], tuple[Any, ...]]:
    """Return the view above and the index that selects [n_slots, kv_heads, dims, 1 or g] from it."""
    words = _element_words(layer, which)
    block, offset = np.divmod(slots.numpy()[:, None], layer.pool.block_size)
    heads = np.arange(layer.num_kv_heads)[None, :]
    token = offset % _SUB_BLOCK
    places = (token,) if which == 0 else np.divmod(token, words.shape[4])
    return words, (block, heads, offset // _SUB_BLOCK, *places)


def _scales(layer: KvLayer, slots: Tensor, which: int) -> tuple[npt.NDArray[Any], tuple[Any, ...]]:
    """Return an int8 layer's scales as a view, and the index that selects [n_slots, kv_heads, strips]."""
    codes = _SUB_BLOCK * cached_head_dim(layer.head_dim, layer.pool.dtype)
    halves = _sub_blocks(layer, which)[..., codes:].view(np.float16)
    view = halves.reshape(*halves.shape[:3], -1, _SUB_BLOCK).swapaxes(3, 4)
    block, offset = np.divmod(slots.numpy()[:, None], layer.pool.block_size)
    heads = np.arange(layer.num_kv_heads)[None, :]
    return view, (block, heads, offset // _SUB_BLOCK, offset % _SUB_BLOCK)


def _load(layer: KvLayer, slots: Tensor, which: int) -> Tensor:
    """Return the stored numbers [n_slots, kv_heads, stored dims] as float32, in the cache's order."""
    dtype = layer.pool.dtype
    words, index = _picked(layer, slots, which)
    raw = torch.from_numpy(np.ascontiguousarray(words[index])).flatten(-2)
    if dtype != "int8":
        return raw.view(_TORCH[dtype]).float()
    codes = (raw ^ (0x80 if which == 0 else 0)).view(torch.int8).float()  # key codes are stored + 128
    scales, at = _scales(layer, slots, which)
    return codes * torch.from_numpy(scales[at].astype(np.float32)).repeat_interleave(_STRIP, -1)


def _store(layer: KvLayer, slots: Tensor, which: int, rows: Tensor) -> None:
    dtype = layer.pool.dtype
    words, index = _picked(layer, slots, which)
    if dtype == "int8":
        strips = rows.unflatten(-1, (-1, _STRIP))
        largest = strips.abs().amax(-1) / 127
        codes = (strips / largest.clamp_min(1e-30)[..., None]).round().flatten(-2).to(torch.int8)
        raw = codes.view(torch.uint8) ^ (0x80 if which == 0 else 0)
        scales, at = _scales(layer, slots, which)
        scales[at] = largest.numpy()
    else:
        raw = rows.to(_TORCH[dtype]).view(torch.int16 if dtype == "bfloat16" else torch.int32)
    words[index] = raw.unflatten(-1, (-1, words.shape[-1])).numpy()
