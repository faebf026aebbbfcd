"""Cuts weights to a shard's part: rows of matrices that produce heads, inner values or logits, else columns.

Used by the modules that read weights, which know what a matrix is for; `shard.py` chooses the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tgi_asgi import ops
from tgi_asgi.models.shard import ModelCut


def rows_of(sources: Sequence[ops.WeightSource], parts: Sequence[range]) -> list[ops.WeightSource]:
    """Return, for each matrix or bias, a view of the rows of its part."""
    return [source.rows(part.start, part.stop) for source, part in zip(sources, parts, strict=True)]


def qkv_rows(cut: ModelCut, head_dim: int) -> list[range]:
    """Return a shard's rows of q, k and v."""
    return [of_heads(heads, head_dim) for heads in (cut.heads, cut.kv_heads, cut.kv_heads)]


def norms_of(norms: ops.HeadNorms, cut: ModelCut, head_dim: int) -> ops.HeadNorms:
    """Return the norms of a shard's heads, each of which has its own."""
    assert not norms.is_whole  # `unsplit` refuses the model
    rows = qkv_rows(cut, head_dim)
    query, key = (_norm_of(norm, part, head_dim) for norm, part in zip(
        (norms.query, norms.key), rows[:2], strict=True
    ))  # fmt: skip
    return replace(norms, query=query, key=key)


def of_heads(heads: range, width: int) -> range:
    """Return the rows or columns of these heads, each of which has `width` of them."""
    return range(heads.start * width, heads.stop * width)


def _norm_of(norm: ops.NormWeight, rows: range, head_dim: int) -> ops.NormWeight:
    """Return the shard's part of a norm with weights per head, or a norm shared by all heads unchanged."""
    if norm.columns == head_dim:
        return norm
    part = slice(rows.start, rows.stop)
    return replace(norm, weight=norm.weight[part], bias=None if norm.bias is None else norm.bias[part])
