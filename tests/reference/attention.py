"""Causal attention of each sequence in float64: slow and obvious."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(q: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend q [n, heads, dim], the last n positions, to key and value [context, kv_heads, dim].

    Returns [n, heads * dim].
    """
    n, heads, dim = q.shape
    context, group = key.shape[0], heads // key.shape[1]
    key, value = (part.double().repeat_interleave(group, dim=1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", q.double(), key) * scale
    query_position = torch.arange(context - n, context)[:, None]
    scores = scores.masked_fill(torch.arange(context) > query_position, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).reshape(n, heads * dim)
