"""Attention over a `KvPool` for models that compute in torch: one call per layer, tensors in and out."""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_asgi import _C
from tgi_asgi.ops.attention_spec import AttentionSpec
from tgi_asgi.ops.kv import KvLayer
from tgi_asgi.ops.tensors import float_array


class PagedAttention:
    """Writes a batch's keys and values to the cache and attends; shared by the layers of a generic model.

        attention = PagedAttention(max_context=8192)
        attention.begin(batch)                                   # once per step
        out = attention.run(pool.layers[i], q, k, v, spec)       # once per layer

    As in `ops.attention`, a row's bits depend only on its own sequence. All layers share one layer's scratch
    memory. Calls from several threads are serialised, but all threads share the current batch.
    """

    def __init__(self, *, max_context: int) -> None:
        self._native = _C.PagedAttention(max_context=max_context)

    def begin(self, batch: _C.FlatRows, visible_until: Tensor | None = None) -> None:
        """Set the batch for the following calls of `run`.

        `visible_until` [num_tokens] int32 is, for each token, the end of the positions of its sequence that
        it sees: its position + 1, or more if it sees later tokens of this step (the tokens of an image see
        each other). A window or chunk still limits how far back a token sees.

        Raises:
            ValueError: if lengths do not match, or a context is longer than `max_context`.
        """
        self._native.begin(batch, None if visible_until is None else visible_until.contiguous().numpy())

    def run(
        self, layer: KvLayer, q: Tensor, k: Tensor | None, v: Tensor | None, spec: AttentionSpec
    ) -> Tensor:
        """Write k and v to the batch's slots, attend q to the cache; return [n_tokens, num_heads, value_dim].

        q is [n_tokens, num_heads, head_dim], k [n_tokens, num_kv_heads, head_dim] and v [n_tokens,
        num_kv_heads, value_dim], all float32 and already rotated, with any strides (copied unless a head's
        dims are contiguous). If k and v are None, q attends to what another layer has written.

        Raises:
            ValueError: if a shape does not fit, or the batch's blocks or slots are not in the pool.
            TypeError: if a tensor is not float32.
        """
        out = torch.empty(q.shape[0], q.shape[1], layer.value_dim, dtype=torch.float32)
        self._native.run(
            layer.pool.native,
            layer.index,
            float_array(q),
            None if k is None else float_array(k),
            None if v is None else float_array(v),
            out.numpy(),
            spec.native,
        )
        return out

    def write(self, layer: KvLayer, k: Tensor, v: Tensor) -> None:
        """Write k and v to the batch's slots, as `run` does, without attending.

        Raises:
            ValueError, TypeError: as for `run`.
        """
        self._native.write(layer.pool.native, layer.index, float_array(k), float_array(v))
