"""Attention over a `KvPool` for models that compute in torch: one call a layer, tensors in and out."""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_asgi import _C
from tgi_asgi.ops.attention_spec import AttentionSpec
from tgi_asgi.ops.kv import KvLayer


class PagedAttention:
    """Writes a batch's keys and values to the cache, and attends: what a generic model's layers share.

        attention = PagedAttention(max_context=8192)
        attention.begin(batch)                                   # once a step
        out = attention.run(pool.layers[i], q, k, v, spec)       # once a layer

    A row's bits depend on its own sequence only, as those of `ops.attention`. Memory for one layer's work is
    kept and serves all. Calls from several threads take turns, but a batch is everybody's.
    """

    def __init__(self, *, max_context: int) -> None:
        self._native = _C.PagedAttention(max_context=max_context)

    def begin(self, batch: _C.FlatRows, visible_until: Tensor | None = None) -> None:
        """Take the batch that the next calls of `run` are of.

        `visible_until` [num_tokens] int32 says for each token where the positions of its sequence end that
        it sees: its position + 1, or more where it sees tokens of this step behind it (an image's see each
        other). A window or a chunk still hides what lies before it.

        Raises:
            ValueError: lengths do not fit together, or a context is longer than `max_context`.
        """
        self._native.begin(batch, None if visible_until is None else visible_until.contiguous().numpy())

    def run(
        self, layer: KvLayer, q: Tensor, k: Tensor | None, v: Tensor | None, spec: AttentionSpec
    ) -> Tensor:
        """Write k and v to the batch's slots, attend q to the cache; return [n_tokens, num_heads, value_dim].

        q is [n_tokens, num_heads, head_dim], k [n_tokens, num_kv_heads, head_dim] and v [n_tokens,
        num_kv_heads, value_dim], float32, rotated already, of any strides (copied where a head's dims are not
        side by side). k and v None: attend to what another layer has written.

        Raises:
            ValueError: a shape does not fit, or the batch's blocks or slots are not in the pool.
            TypeError: a tensor is not float32.
        """
        out = torch.empty(q.shape[0], q.shape[1], layer.value_dim, dtype=torch.float32)
        self._native.run(
            layer.pool.native,
            layer.index,
            _array(q),
            None if k is None else _array(k),
            None if v is None else _array(v),
            out.numpy(),
            spec.native,
        )
        return out


def _array(heads: Tensor) -> _C.FloatArray:
    return (heads if heads.stride(-1) == 1 else heads.contiguous()).numpy()
