"""Float64 references for selective-scan heads and the gated norm, token by token: slow and plain."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from tests.reference.layers import double
from tgi_asgi.ops import SelectiveScanWeight


def selective_scan(rows: Tensor, steps: Tensor, weight: SelectiveScanWeight) -> Tensor:
    """Return the results [n_tokens, heads * head_dim] float64 for a sequence from its first token on."""
    heads, groups, size = weight.num_heads, weight.num_groups, weight.state_size
    x, b, c = rows.double().split([weight.width, groups * size, groups * size], 1)
    state = torch.zeros(heads, weight.head_dim, size, dtype=torch.float64)
    out = []
    for token in range(len(rows)):
        raw = weight.dt_scale * steps[token].double() + double(weight.dt_bias)
        dt = softplus(raw).clamp(*weight.dt_limit)
        of_heads = x[token].view(heads, -1)
        write, read = (
            part[token].view(groups, size).repeat_interleave(heads // groups, 0) for part in (b, c)
        )
        decay = torch.exp(dt * double(weight.a))
        added = (dt[:, None] * of_heads)[:, :, None] * write[:, None, :]
        state = decay[:, None, None] * state + added
        out.append((state * read[:, None, :]).sum(-1) + double(weight.d)[:, None] * of_heads)
    return torch.stack(out).view(len(rows), -1)


def gated_norm(
    rows: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    group_width: int,
    eps: float,
    *,
    is_gate_first: bool,
    gate_scale: float = 1.0,
) -> Tensor:
    """Return norm(rows * silu(s * gate)) or norm(rows) * silu(s * gate), in float64."""
    x, passed = rows.double(), silu(gate_scale * gate.double())
    x = x * passed if is_gate_first else x
    if weight is not None:
        groups = x.view(len(x), -1, group_width)
        x = (groups / (groups.square().mean(-1, keepdim=True) + eps).sqrt()).view_as(x) * weight.double()
    return x if is_gate_first else x * passed
