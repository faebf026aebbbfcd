"""The heads that an attention layer projects its inputs to: sizes, and which dims are rotated together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QkvHeads:
    """The heads of queries, keys and values that one product computes.

        QkvHeads(num_heads=32, num_kv_heads=8, head_dim=128, rotary_dim=128)

    Dim i of a head is rotated with dim i + rotary_dim / 2, or dim 2i with 2i + 1 if `is_interleaved` (GPT-J,
    GLM).

    Attributes:
        num_heads: Number of query heads.
        num_kv_heads: Number of heads of keys, and of values.
        rotary_dim: Number of dims of a head that are rotated, which are its first.

    Raises:
        ValueError: if `rotary_dim` or `head_dim` is not even, or a head has fewer dims than are rotated.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    is_interleaved: bool = False

    def __post_init__(self) -> None:
        rotary_dim, head_dim = self.rotary_dim, self.head_dim
        if rotary_dim % 2 or not 0 < rotary_dim <= head_dim or head_dim % 2:
            raise ValueError(f"`rotary_dim` must be even and at most {head_dim}, got {rotary_dim}")

    @property
    def counts(self) -> tuple[int, int, int]:
        """Number of heads of queries, of keys and of values."""
        return self.num_heads, self.num_kv_heads, self.num_kv_heads

    @property
    def rows(self) -> tuple[int, int, int]:
        """Number of rows of the matrices of queries, of keys and of values."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return queries, keys, keys
