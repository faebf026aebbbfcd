"""The KV cache: a pool of fixed-size blocks a layer. Only this file and the kernels know its layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_asgi._C import PageSupply
from tgi_asgi.ops.meta import meta_of, require

BLOCK_SIZES = (16, 32, 64)
_TILE = 16  # tokens whose keys lie side by side, one a vector lane
_STRIP = 32  # dims of a token that share a scale, with int8


@dataclass(frozen=True, slots=True)
class KvLayer:
    """One layer's keys and values. Opaque above `ops`.

    A view of the pool of all layers, in which all of a block lies together: blocks are handed out in order,
    so the memory that they have touched has no holes, however large its pages. A head's keys, or values, of
    a block are, in float32, [block / 16][head_dim][16 tokens], or [block][head_dim]. bfloat16 packs two of
    the reduced dimension into a word: [block / 16][head_dim / 2][16 tokens][2], or
    [block / 2][head_dim][2 tokens].

    int8 has a scale for each token and 32 dims: 16 tokens are codes, [head_dim / 4][16 tokens][4] of keys
    (plus 128), or [16 / 4][head_dim][4 tokens] of values, then float16 scales [head_dim / 32][16 tokens].
    Only the recorded step reads it.
    """

    pool: Tensor  # [num_blocks, 2 (keys, values), num_kv_heads, elements], contiguous in a block
    block_size: int
    head_dim: int

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return int(self.pool.shape[0])

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and of values."""
        return int(self.pool.shape[2])


def _head_elements(head_dim: int, dtype: torch.dtype) -> int:
    """Return what a token's keys, or values, of one head take: with int8, their float16 scales too."""
    return head_dim + head_dim // _STRIP * 2 if dtype is torch.int8 else head_dim


def kv_bytes_per_token(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Return what a token takes in the caches of all layers."""
    return 2 * num_layers * num_kv_heads * _head_elements(head_dim, dtype) * dtype.itemsize


def allocate_kv(
    num_layers: int, num_blocks: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> list[KvLayer]:
    """Make the pool of all layers; its memory is committed by the system as blocks are first written.

    Raises:
        ValueError: a size or dtype that the kernels do not have.
    """
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"`block_size` must be 16, 32 or 64, got {block_size}")
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise ValueError(f"`head_dim` must be a multiple of 16 up to 256, got {head_dim}")
    if dtype not in (torch.float32, torch.bfloat16, torch.int8):
        raise ValueError(f"`dtype` must be float32, bfloat16 or int8, got {dtype}")
    if dtype is torch.int8 and head_dim % _STRIP:
        raise ValueError(f"`head_dim` must be a multiple of {_STRIP} with int8, got {head_dim}")
    elements = block_size * _head_elements(head_dim, dtype)
    pool = torch.empty(num_blocks, num_layers, 2, num_kv_heads, elements, dtype=dtype)
    torch.ops.tgi.advise_huge_pages(pool)
    return [KvLayer(pool[:, layer], block_size, head_dim) for layer in range(num_layers)]


def supply_kv(layers: Sequence[KvLayer], num_bytes: int) -> PageSupply:
    """Begin to have the system supply the pool's first `num_bytes`, in a thread: see `PageSupply`."""
    memory = torch.empty(0, dtype=torch.uint8).set_(layers[0].pool.untyped_storage())
    return PageSupply(memory, num_bytes)


def copy_blocks(layers: Iterable[KvLayer], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy blocks (from, to) in every layer, as if all at once: no block is both."""
    if not pairs:
        return
    table = torch.tensor(pairs, dtype=torch.int64)  # [num_pairs, 2]
    source, target = table[:, 0], table[:, 1]
    for layer in layers:
        layer.pool[target] = layer.pool[source]


def kv_read(layer: KvLayer, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys and values [n, num_kv_heads, head_dim] at slots [n] = block * block_size + offset.

    For tests: slow, and the only other place that knows the layout.
    """
    key, value = _unpacked(layer)
    block, offset = slots // layer.block_size, slots % layer.block_size
    return key[block, :, offset], value[block, :, offset]


def kv_write(layer: KvLayer, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """Write keys and values [n, num_kv_heads, head_dim] at slots [n], in floats. For tests."""
    keys, values = _unpacked(layer)
    block, offset = slots // layer.block_size, slots % layer.block_size
    keys[block, :, offset] = key.to(keys.dtype)
    values[block, :, offset] = value.to(values.dtype)
    _pack(layer, keys, values)


def _pair(layer: KvLayer) -> int:
    return 2 if layer.pool.dtype is torch.bfloat16 else 1


def _unpacked(layer: KvLayer) -> tuple[Tensor, Tensor]:
    """Return copies of keys and values as [num_blocks, num_kv_heads, block_size, head_dim]."""
    if layer.pool.dtype is torch.int8:
        return _dequantised(layer, 0), _dequantised(layer, 1)
    blocks, heads, pair = layer.num_blocks, layer.num_kv_heads, _pair(layer)
    size, dim = layer.block_size, layer.head_dim
    key = layer.pool[:, 0].reshape(blocks, heads, size // _TILE, dim // pair, _TILE, pair)
    value = layer.pool[:, 1].reshape(blocks, heads, size // pair, dim, pair)
    return (
        key.permute(0, 1, 2, 4, 3, 5).reshape(blocks, heads, size, dim).clone(),
        value.permute(0, 1, 2, 4, 3).reshape(blocks, heads, size, dim).clone(),
    )


def _dequantised(layer: KvLayer, which: int) -> Tensor:
    """Return the keys (0) or values (1) of an int8 pool in float32, in the shape of `_unpacked`."""
    blocks, heads, dim = layer.num_blocks, layer.num_kv_heads, layer.head_dim
    strips, tiles = dim // _STRIP, blocks * heads * layer.block_size // _TILE
    parts = layer.pool[:, which].reshape(tiles, -1)
    codes, scales = parts[:, : _TILE * dim], parts[:, _TILE * dim :].contiguous()
    if which == 0:
        unsigned = codes.reshape(tiles, dim // 4, _TILE, 4).transpose(1, 2).view(torch.uint8)
        grid = unsigned.float() - 128
    else:
        grid = codes.reshape(tiles, _TILE // 4, dim, 4).transpose(2, 3).float()
    by_token = scales.view(torch.float16).reshape(tiles, strips, _TILE, 1).transpose(1, 2).float()
    return (grid.reshape(tiles, _TILE, strips, _STRIP) * by_token).reshape(blocks, heads, -1, dim)


def _pack(layer: KvLayer, key: Tensor, value: Tensor) -> None:
    """Write [num_blocks, num_kv_heads, block_size, head_dim] back."""
    blocks, heads, pair = layer.num_blocks, layer.num_kv_heads, _pair(layer)
    size, dim = layer.block_size, layer.head_dim
    tiles = key.view(blocks, heads, size // _TILE, _TILE, dim // pair, pair)
    pairs = value.view(blocks, heads, size // pair, pair, dim)
    layer.pool[:, 0] = tiles.permute(0, 1, 2, 4, 3, 5).reshape(blocks, heads, -1)
    layer.pool[:, 1] = pairs.permute(0, 1, 2, 4, 3).reshape(blocks, heads, -1)


@meta_of("advise_huge_pages")
def _advise_huge_pages_meta(memory: Tensor) -> None:
    require(memory.is_contiguous())
