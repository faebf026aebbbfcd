"""Float64 reference for channels with a state each, token by token: slow and plain."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from tests.reference.layers import double
from tgi_asgi.ops import ChannelScanWeight


def channel_scan(x: Tensor, steps: Tensor, parts: Tensor, gate: Tensor, weight: ChannelScanWeight) -> Tensor:
    """Return the results [n_tokens, channels] float64 for a sequence from its first token on."""
    a, d = double(weight.a), double(weight.d)
    x, dt, (b, c) = x.double(), softplus(steps.double()), parts.double().chunk(2, 1)
    state = torch.zeros_like(a)
    out = []
    for token in range(len(x)):
        state = torch.exp(dt[token, :, None] * a) * state
        state = state + (dt[token] * x[token])[:, None] * b[token]
        out.append((state * c[token]).sum(-1) + d * x[token])
    return torch.stack(out) * silu(gate.double())
