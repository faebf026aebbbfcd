"""The heads that an attention layer projects its inputs to: sizes, and which dims are rotated together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QkvHeads:
    """The heads of queries, keys and values that one product computes.

        QkvHeads(num_heads=32, num_kv_heads=8, head_dim=128, rotary_dim=128)

    Dim i of a head is rotated with dim i + rotary_dim / 2, or dim 2i with 2i + 1 if `is_interleaved` (GPT-J,
    GLM), or dim i with i + head_dim / 2 if `is_proportional` (Gemma 4).

    Attributes:
        num_heads: Number of query heads.
        num_kv_heads: Number of heads of keys, and of values.
        rotary_dim: Number of dims of a head that are rotated: its first, or if `is_proportional` the first of
            both halves.
        has_keys: Whether the product also computes keys and values; else another layer's are read.

    Raises:
        ValueError: if `rotary_dim` or `head_dim` is not even, a head has fewer dims than are rotated, or its
            pairs would be both interleaved and proportional.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    is_interleaved: bool = False
    is_proportional: bool = False
    has_keys: bool = True

    def __post_init__(self) -> None:
        rotary_dim, head_dim = self.rotary_dim, self.head_dim
        if rotary_dim % 2 or not 0 < rotary_dim <= head_dim or head_dim % 2:
            raise ValueError(f"`rotary_dim` must be even and at most {head_dim}, got {rotary_dim}")
        if self.is_interleaved and self.is_proportional:
            raise ValueError("rotated pairs cannot be both interleaved and proportional")

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of heads of queries, and of keys and of values if they are computed."""
        return (self.num_heads, self.num_kv_heads, self.num_kv_heads)[: 3 if self.has_keys else 1]

    @property
    def rows(self) -> tuple[int, ...]:
        """Number of rows of the matrices of queries, and of keys and of values if they are computed."""
        return tuple(count * self.head_dim for count in self.counts)
