"""The operator `norm`: RMSNorm of the residual into the next product's activation."""

from __future__ import annotations

import torch
from torch import Tensor


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise x [n_tokens, hidden] float32 to `x / rms(x) * weight`; weight [hidden] float32.

    The result is an activation: opaque, good for one product, and valid until the step ends.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, section 4.
    """
    out = torch.empty_like(x)
    torch.ops.tgi.rms_norm(x, weight, eps, None, out)
    return out
