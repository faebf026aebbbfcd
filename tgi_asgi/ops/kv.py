"""The KV cache: a pool of fixed-size blocks a layer. Only this file and the kernels know its layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tgi_asgi.ops.meta import meta_of, require

BLOCK_SIZES = (16, 32, 64)
_TILE = 16  # tokens whose keys lie side by side, one a vector lane


@dataclass(frozen=True, slots=True)
class KvLayer:
    """One layer's keys and values. Opaque above `ops`.

    A (head, block) is contiguous in both. float32: keys [block / 16][head_dim][16 tokens], values
    [block][head_dim]. bfloat16 packs two of the reduced dimension into a word: keys
    [block / 16][head_dim / 2][16 tokens][2], values [block / 2][head_dim][2 tokens].
    """

    key: Tensor  # [num_kv_heads, num_blocks, block_size * head_dim]
    value: Tensor  # the same
    block_size: int
    head_dim: int

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return int(self.key.shape[1])

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and of values."""
        return int(self.key.shape[0])


def kv_bytes_per_token(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Return what a token takes in the caches of all layers."""
    return 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize


def allocate_kv(
    num_layers: int, num_blocks: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> list[KvLayer]:
    """Make the pools of all layers; their memory is committed by the system as blocks are first written.

    Raises:
        ValueError: a size or dtype that the kernels do not have.
    """
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"`block_size` must be 16, 32 or 64, got {block_size}")
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise ValueError(f"`head_dim` must be a multiple of 16 up to 256, got {head_dim}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"`dtype` must be float32 or bfloat16, got {dtype}")
    shape = (num_kv_heads, num_blocks, block_size * head_dim)

    def pool() -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        torch.ops.tgi.advise_huge_pages(tensor)
        return tensor

    return [KvLayer(pool(), pool(), block_size, head_dim) for _ in range(num_layers)]


def copy_blocks(layers: Iterable[KvLayer], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy blocks (from, to) in every layer, as if all at once: no block is both."""
    if not pairs:
        return
    table = torch.tensor(pairs, dtype=torch.int64)  # [num_pairs, 2]
    source, target = table[:, 0], table[:, 1]
    for layer in layers:
        layer.key[:, target] = layer.key[:, source]
        layer.value[:, target] = layer.value[:, source]


def kv_read(layer: KvLayer, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys and values [n, num_kv_heads, head_dim] at slots [n] = block * block_size + offset.

    For tests: slow, and the only other place that knows the layout.
    """
    key, value = _unpacked(layer)
    block, offset = slots // layer.block_size, slots % layer.block_size
    return key[:, block, offset].transpose(0, 1), value[:, block, offset].transpose(0, 1)


def kv_write(layer: KvLayer, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """Write keys and values [n, num_kv_heads, head_dim] at slots [n]. For tests."""
    keys, values = _unpacked(layer)
    block, offset = slots // layer.block_size, slots % layer.block_size
    keys[:, block, offset] = key.transpose(0, 1).to(keys.dtype)
    values[:, block, offset] = value.transpose(0, 1).to(values.dtype)
    _pack(layer, keys, values)


def _pair(layer: KvLayer) -> int:
    return 2 if layer.key.dtype is torch.bfloat16 else 1


def _unpacked(layer: KvLayer) -> tuple[Tensor, Tensor]:
    """Return copies of both pools as [num_kv_heads, num_blocks, block_size, head_dim]."""
    heads, blocks, pair = layer.num_kv_heads, layer.num_blocks, _pair(layer)
    size, dim = layer.block_size, layer.head_dim
    key = layer.key.view(heads, blocks, size // _TILE, dim // pair, _TILE, pair)
    value = layer.value.view(heads, blocks, size // pair, dim, pair)
    return (
        key.permute(0, 1, 2, 4, 3, 5).reshape(heads, blocks, size, dim).clone(),
        value.permute(0, 1, 2, 4, 3).reshape(heads, blocks, size, dim).clone(),
    )


def _pack(layer: KvLayer, key: Tensor, value: Tensor) -> None:
    """Write [num_kv_heads, num_blocks, block_size, head_dim] back."""
    heads, blocks, pair = layer.num_kv_heads, layer.num_blocks, _pair(layer)
    size, dim = layer.block_size, layer.head_dim
    tiles = key.view(heads, blocks, size // _TILE, _TILE, dim // pair, pair)
    layer.key.copy_(tiles.permute(0, 1, 2, 4, 3, 5).reshape(layer.key.shape))
    layer.value.copy_(
        value.view(heads, blocks, size // pair, pair, dim).permute(0, 1, 2, 4, 3).reshape(layer.value.shape)
    )


@meta_of("advise_huge_pages")
def _advise_huge_pages_meta(memory: Tensor) -> None:
    require(memory.is_contiguous())
