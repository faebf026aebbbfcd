"""The KV cache of a CPU: a pool of fixed-size blocks. Only this file and the kernels know its layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from tgi_asgi import _C
from tgi_asgi.ops.layout import STRIP
from tgi_asgi.ops.states import StateLayer

MAX_HEAD_DIM = 512
MAX_LATENT_DIM = 640
_MOST_GROWTH = 1.2  # of a head that int8 pads to whole strips
_PRECISIONS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}


def kept_dim(head_dim: int, dtype: torch.dtype, name: str = "head_dim") -> int:
    """Return how many dims of a head the cache keeps: all that there are; int8 pads them to strips of 32.

    `name` is what a message calls them.

    Raises:
        ValueError: the cache cannot have this head size, or this dtype.
    """
    if dtype not in _PRECISIONS:
        raise ValueError(f"`dtype` must be float32, bfloat16 or int8, got {dtype}")
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"`{name}` must be even and at most {MAX_HEAD_DIM}, got {head_dim}")
    if dtype is not torch.int8:
        return head_dim
    padded = -(-head_dim // STRIP) * STRIP
    if padded > head_dim * _MOST_GROWTH:
        raise ValueError(f"an int8 cache would keep heads of {head_dim} as {padded}: take bfloat16")
    return padded


class HeadShape(Protocol):
    """The heads of one layer's keys and values; values have `value_dim` dims a head.

    Of latents (MLA) there is one head, and its values are its keys' first dims: kept once.
    """

    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...
    @property
    def is_latent(self) -> bool: ...


def kv_bytes_per_token(shape: HeadShape, dtype: torch.dtype) -> int:
    """Return what a token takes in the cache of a layer of this shape.

    Raises:
        ValueError: as `kept_dim`.
    """
    if shape.is_latent:
        return _kept_latent(shape, dtype)[0] * dtype.itemsize
    kept = kept_dim(shape.head_dim, dtype) + kept_dim(shape.value_dim, dtype, "value_dim")
    scales = kept // STRIP * 2 if dtype is torch.int8 else 0  # of float16, one a strip
    return shape.num_kv_heads * (kept * dtype.itemsize + scales)


def _kept_latent(shape: HeadShape, dtype: torch.dtype) -> tuple[int, int]:
    """Return the dims of a latent, and of the values in it.

    Raises:
        ValueError: the cache cannot have these, or not in this dtype.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"latents are kept as float32 or bfloat16, not as {dtype}")
    dims = shape.head_dim, shape.value_dim
    for dim, most in zip(dims, (MAX_LATENT_DIM, MAX_HEAD_DIM), strict=True):
        if dim % STRIP or not 0 < dim <= most:
            raise ValueError(f"a latent must be a multiple of {STRIP} up to {most} wide, got {dim}")
    return dims


def _kept(shape: HeadShape, dtype: torch.dtype) -> tuple[int, int]:
    """Return the dims of a head of keys and of values, as they are kept."""
    if shape.is_latent:
        return _kept_latent(shape, dtype)
    return kept_dim(shape.head_dim, dtype), kept_dim(shape.value_dim, dtype, "value_dim")


class KvCache(Protocol):
    """One layer's keys and values on some device."""

    @property
    def head_dim(self) -> int:
        """Dims of a head of keys, without padding."""

    @property
    def value_dim(self) -> int:
        """Dims of a head of values, without padding."""


# What one layer keeps of sequences. Opaque above `ops`.
Cache: TypeAlias = KvCache | StateLayer


@dataclass(frozen=True, slots=True)
class KvLayer:
    """One layer's keys and values: the `KvCache` of a CPU. Dims are without padding."""

    pool: KvPool
    index: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    is_latent: bool = False


class KvPool:
    """The memory of all layers; the system commits it as blocks are first written.

        pool = KvPool([CacheShape(3, 64, 64)] * 30, num_blocks=512, block_size=16, dtype=torch.bfloat16)
        q = ops.qkv(a, weight, pool.layers[0], rope)

    A block's keys and values of all layers of a group lie together; a step has a block table for each group,
    and any block may be any group's. Inside a layer [keys, values][KV head], in sub-blocks of 16 tokens, see
    KvLayerView in csrc/cpu/step/step.h.

    Args:
        shapes: of each layer.
        groups: of each layer; None: there is one.

    Raises:
        ValueError: a size or dtype that the kernels do not have.
        MemoryError: the system does not grant so much.

    Attributes:
        native: the same in the extension.
    """

    def __init__(
        self,
        shapes: Sequence[HeadShape],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        groups: Sequence[int] | None = None,
    ) -> None:
        self.num_blocks, self.block_size, self.dtype = num_blocks, block_size, dtype
        kept = [(each.num_kv_heads, *_kept(each, dtype)) for each in shapes]
        has_latents = any(each.is_latent for each in shapes)
        if has_latents and not all(each.is_latent for each in shapes):
            raise ValueError("a pool is of latents in all layers, or in none")
        self.native = _C.KvPool(
            layers=[(*shape, group) for shape, group in zip(kept, groups or [0] * len(kept), strict=True)],
            num_blocks=num_blocks, block_size=block_size, precision=_PRECISIONS[dtype],
            has_latents=has_latents,
        )  # fmt: skip
        self.layers = [
            KvLayer(self, index, each.num_kv_heads, each.head_dim, each.value_dim, each.is_latent)
            for index, each in enumerate(shapes)
        ]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (from, to), whichever group's they are, as if all at once.

        Raises:
            ValueError: a block is not there, is both, or is copied to twice; nothing has been copied.
        """
        self.native.copy(pairs)

    def supply(self, num_bytes: int) -> None:
        """Begin to have the system supply the pool's first bytes, in a thread, before they are written."""
        self.native.supply(num_bytes)

    def close(self) -> None:
        """End that thread. Idempotent."""
        self.native.close_supply()


def latents(operator: str, cache: Cache) -> KvLayer:
    """Return a cache of latents as what it is.

    Raises:
        TypeError: it is another.
    """
    if not isinstance(cache, KvLayer) or not cache.is_latent:
        raise TypeError(f"`{operator}` takes latents as `cache`, not {type(cache).__name__}")
    return cache


def keys_and_values(operator: str, cache: Cache) -> KvCache:
    """Return a cache of keys and values as what it is.

    Raises:
        TypeError: it is of states.
    """
    if isinstance(cache, StateLayer):
        raise TypeError(f"`{operator}` takes keys and values as `cache`, not {type(cache).__name__}")
    return cache
