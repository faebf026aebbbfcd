"""The KV cache of a CUDA device: each layer's pool of blocks, in the kernels' layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from tgi_asgi.ops.kv import KvDtype

HEAD_DIMS = (64, 80, 96, 128, 256)  # head sizes that the attention kernels are compiled for
MAX_GROUP = 16  # query heads per KV head


def dtype_name(dtype: torch.dtype) -> KvDtype:
    """Return the name of a type that a GPU computes or caches in."""
    return cast(KvDtype, str(dtype).removeprefix("torch."))


@dataclass(frozen=True, slots=True)
class CudaKvFormat:
    """How a device stores the keys and values of a model.

    Attributes:
        block_size: Number of tokens in a block.
        scales: Scales of keys and of values per layer, for an FP8 cache; None: all 1.
    """

    block_size: int
    dtype: torch.dtype
    scales: Sequence[tuple[float, float]] | None = None


@dataclass(slots=True)
class CudaKvLayer:
    """One layer's keys and values, the counterpart of the CPU's `KvLayer`."""

    pool: Tensor  # [num_blocks, 2 (key, value), num_kv_heads, block_size, head_dim]
    key_scale: float = 1.0  # keys and values are stored divided by their scales
    value_scale: float = 1.0

    def grow(self, pool: Tensor) -> None:
        """Replace the layer's memory by a larger pool's, for every holder; before graph capture only."""
        self.pool.set_(pool.untyped_storage(), 0, pool.shape, pool.stride())

    @property
    def head_dim(self) -> int:
        """Number of dims of a head."""
        return int(self.pool.shape[4])

    @property
    def value_dim(self) -> int:
        """Number of dims of a head of values."""
        return self.head_dim


def make_cuda_pools(
    stored: CudaKvFormat,
    num_layers: int,
    num_blocks: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device,
) -> list[Tensor]:
    """Make the pools of all layers, filled with zeros: a block that was never written must not hold NaN."""
    shape = (num_blocks, 2, num_kv_heads, stored.block_size, head_dim)
    return [torch.zeros(shape, dtype=stored.dtype, device=device) for _ in range(num_layers)]


def copy_cuda_blocks(layers: Sequence[CudaKvLayer], pairs: Sequence[tuple[int, int]]) -> None:
    """Copy blocks (from, to) in every layer, as if simultaneously: no block is both."""
    if not pairs:
        return
    host = torch.tensor(pairs, dtype=torch.int64)  # [num_pairs, 2]
    table = host.to(layers[0].pool.device, non_blocking=True)  # CUDA has copied it when the call returns
    for layer in layers:
        pool = layer.pool.view(torch.uint8)  # torch cannot index 8-bit floats
        pool[table[:, 1]] = pool[table[:, 0]]
