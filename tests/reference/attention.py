"""Causal attention of each sequence in float64: slow and obvious."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(q: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None) -> Tensor:
    """Attend q [n, heads, dim], the last n positions, to key and value [context, kv_heads, dim].

    With a window, a query sees so many positions, its own the last. Returns [n, heads * dim].
    """
    n, heads, dim = q.shape
    context, group = key.shape[0], heads // key.shape[1]
    key, value = (part.double().repeat_interleave(group, dim=1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", q.double(), key) * scale
    query_position, position = torch.arange(context - n, context)[:, None], torch.arange(context)
    is_hidden = position > query_position
    if window is not None:
        is_hidden |= position <= query_position - window
    scores = scores.masked_fill(is_hidden, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).reshape(n, heads * dim)
