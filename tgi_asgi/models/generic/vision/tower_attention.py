"""Attention of a vision tower on the kernels of texts' attention: every patch of an image sees every other.

A layer's keys and values are written once, to blocks that the next layer reuses. Queries may then attend in
pieces, on all threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tgi_asgi import ops
from tgi_asgi.models.config import CacheShape
from tgi_asgi.models.generic.attention import by_token
from tgi_asgi.ops.paged import PagedAttention

_BLOCK = 16


class TowerAttention:
    """Attention over one layer's keys at a time.

        if attention.takes(query, key, value, mask, kwargs):
            rows = attention.over(key, value, scale)(query)

    Args:
        dtype: Type of keys and values.
    """

    def __init__(self, dtype: ops.KvDtype) -> None:
        self._dtype = dtype
        self._pool: ops.KvPool | None = None
        self._shape: tuple[int, ...] = ()  # KV heads, dims of keys and of values, blocks
        self._num_keys = 0

    def takes(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, others: dict[str, Any]
    ) -> bool:
        """Return whether it computes the attention of these heads [1, n_heads, n_tokens, head_dim].

        `others` are further arguments of torch's attention in `transformers`. It must not be causal.
        """
        return (
            query.shape[0] == key.shape[0] == 1
            and query.dtype == key.dtype == value.dtype == torch.float32
            and query.shape[1] % key.shape[1] == 0
            and query.shape[2] <= key.shape[2]
            and query.shape[3] % 2 == value.shape[3] % 2 == 0
            and others.get("position_bias") is None
            and not others.get("dropout")
            and (mask is None or (mask.dtype == torch.bool and bool(mask.all())))
        )

    def over(self, key: Tensor, value: Tensor, scale: float) -> Callable[[Tensor], Tensor]:
        """Return a function of queries [1, n_heads, n, head_dim] that returns [1, n, n_heads, dims].

        Its first call stores the keys and values [1, n_kv_heads, n_keys, dims]; another layer's replace them.
        """
        stored = False

        def attend(query: Tensor) -> Tensor:
            nonlocal stored
            if not stored:
                self._store(key, value)
                stored = True
            return self._read(query, scale)

        return attend

    def _store(self, key: Tensor, value: Tensor) -> None:
        """Store a layer's keys and values [1, n_kv_heads, n_keys, dims]."""
        _, num_heads, self._num_keys, head_dim = key.shape
        num_blocks = -(-self._num_keys // _BLOCK)
        if self._shape[:3] != (num_heads, head_dim, value.shape[3]) or self._shape[3] < num_blocks:
            self._pool = None  # before another takes its memory
            shape = CacheShape(num_heads, head_dim, value.shape[3])
            self._pool = ops.KvPool([shape], num_blocks=num_blocks, block_size=_BLOCK, dtype=self._dtype)
            self._shape = (num_heads, head_dim, value.shape[3], num_blocks)
            self._paged = PagedAttention(max_context=num_blocks * _BLOCK)
        self._begin(self._num_keys)
        assert self._pool is not None
        self._paged.write(self._pool.layers[0], by_token(key), by_token(value))

    def _read(self, query: Tensor, scale: float) -> Tensor:
        assert self._pool is not None
        self._begin(query.shape[2])
        rows = self._paged.run(self._pool.layers[0], by_token(query), None, None, ops.AttentionSpec(scale))
        return rows[None]

    def forget(self) -> None:
        """Release the memory."""
        self._pool, self._shape = None, ()

    def _begin(self, num_tokens: int) -> None:
        """Set the tokens of the next call: the last of as many as there are keys, each of which sees all."""
        places = np.arange(self._num_keys - num_tokens, self._num_keys)
        blocks = np.arange(self._shape[3], dtype=np.int32)[None]
        batch = ops.FlatRows(
            ids=np.zeros(num_tokens, np.int32), positions=places, slots=places, query_start=[0, num_tokens],
            context_len=[self._num_keys], block_table=blocks,
        )  # fmt: skip
        self._paged.begin(batch, torch.full((num_tokens,), self._num_keys, dtype=torch.int32))
