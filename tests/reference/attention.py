"""Float64 reference for attention of one sequence: slow and plain."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None = None,
    *,
    chunk: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    visible_until: Tensor | None = None,
) -> Tensor:
    """Attend q [n, heads, dim], the last n positions, to key [context, kv_heads, dim] and value.

    A query sees positions up to its own, or those before visible_until [n]. A window limits it to the last
    `window` positions including its own, `chunk` to those of its own chunk. Returns [n, heads * value_dim].
    """
    n, heads, _ = q.shape
    context, group = key.shape[0], heads // key.shape[1]
    key, value = (part.double().repeat_interleave(group, dim=1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", q.double(), key) * scale
    query_position, position = torch.arange(context - n, context)[:, None], torch.arange(context)
    end = query_position + 1 if visible_until is None else visible_until[:, None]
    is_hidden = position >= end
    if window is not None:
        is_hidden |= position <= query_position - window
    if chunk is not None:
        is_hidden |= position < query_position // chunk * chunk
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if slopes is not None:
        scores = scores + slopes.double()[:, None, None] * (position - query_position)
    scores = scores.masked_fill(is_hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(heads, n, 1)], dim=-1)
    weights = scores.softmax(-1)[..., :context]
    return torch.einsum("hqk,khd->qhd", weights, value).reshape(n, -1)
