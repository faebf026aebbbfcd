"""The CPU's KV cache: a pool of fixed-size blocks. Only this file and the kernels know its layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from tgi_asgi import _C
from tgi_asgi.ops.layout import STRIP, round_up
from tgi_asgi.ops.states import StateLayer

MAX_HEAD_DIM = 512
MAX_LATENT_DIM = 640
_MAX_GROWTH = 1.2  # limit on how much int8's padding to whole strips may enlarge a head
# Types of keys and values; the last two are a GPU's.
KvDtype = Literal["float32", "bfloat16", "int8", "float16", "float8_e4m3fn"]
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def cached_head_dim(head_dim: int, dtype: KvDtype, name: str = "head_dim") -> int:
    """Return how many dims of a head the cache stores: all of them, which int8 pads to strips of 32.

    `name` is the head size's name in error messages.

    Raises:
        ValueError: if the cache does not support this head size or dtype.
    """
    if dtype not in _ITEM_BYTES:
        raise ValueError(f"`dtype` must be float32, bfloat16 or int8, got {dtype}")
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"`{name}` must be even and at most {MAX_HEAD_DIM}, got {head_dim}")
    if dtype != "int8":
        return head_dim
    padded = round_up(head_dim)
    if padded > head_dim * _MAX_GROWTH:
        raise ValueError(f"an int8 cache would pad heads of {head_dim} to {padded}: use bfloat16")
    return padded


class HeadShape(Protocol):
    """The KV heads of one layer; values have `value_dim` dims per head.

    A latent cache (MLA) has one head, whose values are the first dims of its keys and are stored once.
    """

    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...
    @property
    def is_latent(self) -> bool: ...


def kv_bytes_per_token(shape: HeadShape, dtype: KvDtype) -> int:
    """Return the bytes that a token occupies in the cache of a layer of this shape.

    Raises:
        ValueError: as for `cached_head_dim`.
    """
    if shape.is_latent:
        return _cached_latent_dims(shape, dtype)[0] * _ITEM_BYTES[dtype]
    kept = cached_head_dim(shape.head_dim, dtype) + cached_head_dim(shape.value_dim, dtype, "value_dim")
    scales = kept // STRIP * 2 if dtype == "int8" else 0  # float16, one per strip
    return shape.num_kv_heads * (kept * _ITEM_BYTES[dtype] + scales)


def _cached_latent_dims(shape: HeadShape, dtype: KvDtype) -> tuple[int, int]:
    """Return the number of dims of a latent, and of the values in it.

    Raises:
        ValueError: if the cache does not support these sizes or this dtype.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"latents are kept as float32 or bfloat16, not as {dtype}")
    dims = shape.head_dim, shape.value_dim
    for dim, most in zip(dims, (MAX_LATENT_DIM, MAX_HEAD_DIM), strict=True):
        if dim % STRIP or not 0 < dim <= most:
            raise ValueError(f"a latent must be a multiple of {STRIP} up to {most} wide, got {dim}")
    return dims


def _cached_dims(shape: HeadShape, dtype: KvDtype) -> tuple[int, int]:
    """Return the dims stored per head, of keys and of values."""
    if shape.is_latent:
        return _cached_latent_dims(shape, dtype)
    return cached_head_dim(shape.head_dim, dtype), cached_head_dim(shape.value_dim, dtype, "value_dim")


class KvCache(Protocol):
    """One layer's keys and values on some device."""

    @property
    def head_dim(self) -> int:
        """Dims of a head of keys, without padding."""

    @property
    def value_dim(self) -> int:
        """Dims of a head of values, without padding."""


# One layer's cached state of sequences. Opaque outside `ops`.
Cache: TypeAlias = KvCache | StateLayer


@dataclass(frozen=True, slots=True)
class KvLayer:
    """One layer's keys and values: the `KvCache` of a CPU. Dims exclude padding."""

    pool: KvPool
    index: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    is_latent: bool = False


class KvPool:
    """The KV memory of all layers; the system commits it as blocks are first written.

        pool = KvPool([CacheShape(3, 64, 64)] * 30, num_blocks=512, block_size=16, dtype="bfloat16")
        q = ops.qkv(a, weight, pool.layers[0], rope)

    A block is contiguous and holds the keys and values of all layers of one group. A step has a block table
    per group, and any block can belong to any group. Within a layer the layout is [keys, values][KV head], in
    sub-blocks of 16 tokens; see KvLayerView in csrc/cpu/step/kv_layer.h.

    Args:
        shapes: The layers' shapes.
        groups: Group of each layer; None: one group for all.

    Raises:
        ValueError: if the kernels do not support a size or the dtype.
        MemoryError: if the system does not grant the memory.

    Attributes:
        native: The extension's pool.
    """

    def __init__(
        self,
        shapes: Sequence[HeadShape],
        *,
        num_blocks: int,
        block_size: int,
        dtype: KvDtype,
        groups: Sequence[int] | None = None,
    ) -> None:
        self.num_blocks, self.block_size, self.dtype = num_blocks, block_size, dtype
        kept = [(each.num_kv_heads, *_cached_dims(each, dtype)) for each in shapes]
        has_latents = any(each.is_latent for each in shapes)
        if has_latents and not all(each.is_latent for each in shapes):
            raise ValueError("a pool must hold latents in all layers or in none")
        self.native = _C.KvPool(
            layers=[(*shape, group) for shape, group in zip(kept, groups or [0] * len(kept), strict=True)],
            num_blocks=num_blocks, block_size=block_size, precision=dtype,
            has_latents=has_latents,
        )  # fmt: skip
        self.layers = [
            KvLayer(self, index, each.num_kv_heads, each.head_dim, each.value_dim, each.is_latent)
            for index, each in enumerate(shapes)
        ]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (from, to) of any group, as if simultaneously.

        Raises:
            ValueError: if a block does not exist, is both source and destination, or is a destination twice.
                Nothing has been copied then.
        """
        self.native.copy(pairs)

    def supply(self, num_bytes: int) -> None:
        """Start a thread that has the system supply the pool's first bytes before they are written."""
        self.native.supply(num_bytes)

    def stop_supply(self) -> None:
        """End the thread of `supply`, if it still runs. Idempotent."""
        self.native.close_supply()


def latents(operator: str, cache: Cache) -> KvLayer:
    """Return the cache as a latent `KvLayer`.

    Raises:
        TypeError: if it is another kind of cache.
    """
    if not isinstance(cache, KvLayer) or not cache.is_latent:
        raise TypeError(f"`{operator}` takes latents as `cache`, not {type(cache).__name__}")
    return cache


def keys_and_values(operator: str, cache: Cache) -> KvCache:
    """Return the cache as a `KvCache`.

    Raises:
        TypeError: if it holds recurrent states.
    """
    if isinstance(cache, StateLayer):
        raise TypeError(f"`{operator}` takes keys and values as `cache`, not {type(cache).__name__}")
    return cache
