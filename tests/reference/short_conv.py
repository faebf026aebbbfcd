"""Float64 reference for a short convolution, token by token: slow and plain."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.layers import double
from tgi_asgi.ops import ShortConvWeight


def short_conv(
    rows: Tensor, weight: ShortConvWeight, *, is_gated: bool = False, has_silu: bool = False
) -> Tensor:
    """Return the results [n_tokens, channels] float64 for a sequence from its first token on."""
    channels, num_taps = weight.taps.shape
    rows, taps = rows.double(), double(weight.taps)
    before, behind, x = (
        rows.split(channels, 1) if is_gated else (torch.ones(()), torch.ones(()), rows[:, :channels])
    )
    inputs = (before * x).expand(len(rows), channels)
    out = torch.zeros(len(rows), channels, dtype=torch.float64)
    for token in range(len(rows)):
        for tap in range(num_taps):
            at = token - (num_taps - 1 - tap)
            if at >= 0:
                out[token] += taps[:, tap] * inputs[at]
    if weight.bias is not None:
        out += double(weight.bias)
    return behind * (torch.nn.functional.silu(out) if has_silu else out)
