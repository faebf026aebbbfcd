"""The operator `qkv`: projections, norms of heads, rotary embedding, and the write into the KV cache."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from tgi_asgi.ops.kv import KvLayer
from tgi_asgi.ops.matmul import matmul
from tgi_asgi.ops.meta import meta_of, require
from tgi_asgi.ops.recorded import Recorded
from tgi_asgi.ops.rope import RopeTable
from tgi_asgi.ops.weights import QkvWeight


def qkv(
    a: Tensor, weight: QkvWeight, positions: Tensor, slots: Tensor, kv: KvLayer, rope: RopeTable
) -> Tensor:
    """Project the activation, rotate queries and keys, write keys and values to `kv`; return the queries.

    Where the weight has norms of heads, queries and keys are normalised before they are rotated.

    Args:
        a: [n_tokens, hidden], an activation.
        positions: [n_tokens] int32, each below the rope table's length.
        slots: [n_tokens] int64, block * block_size + offset in the pool of `kv`, which is mutated; no two
            tokens share one.

    Returns:
        q: [n_tokens, num_heads, head_dim] float32.

    Raises:
        RuntimeError: a position or slot is out of range; nothing is written then.
    """
    if isinstance(a, Recorded):
        return a.program.record_qkv(a, weight, kv, rope)
    product = matmul(a, weight.linear)  # [n_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
    if weight.norms is not None:
        _normalise_heads(product, weight)
    q = torch.empty(a.shape[0], weight.num_heads, weight.head_dim, dtype=torch.float32)
    torch.ops.tgi.rope_kv_write(product, positions, slots, rope.cos, rope.sin, kv.block_size, q, kv.pool)
    return q


def _normalise_heads(product: Tensor, weight: QkvWeight) -> None:
    """Normalise the queries and keys of [n_tokens, heads * head_dim], in place."""
    assert weight.norms is not None
    size, eps = (weight.head_dim,), weight.norms.eps
    heads = product.view(product.shape[0], -1, weight.head_dim)
    queries = heads[:, : weight.num_heads]
    keys = heads[:, weight.num_heads : -weight.num_kv_heads]
    queries.copy_(rms_norm(queries, size, weight.norms.query, eps))
    keys.copy_(rms_norm(keys, size, weight.norms.key, eps))


@meta_of("rope_kv_write")
def _rope_kv_write_meta(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    block_size: int,
    q: Tensor,
    kv: Tensor,
) -> None:
    require(qkv.shape == (q.shape[0], (q.shape[1] + 2 * kv.shape[2]) * q.shape[2]))
