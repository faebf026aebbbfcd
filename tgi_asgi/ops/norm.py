"""The operator `norm`: RMSNorm of the residual into the next product's activation."""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_asgi.ops.meta import meta_of, require
from tgi_asgi.ops.recorded import Recorded


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise x [n_tokens, hidden] float32 to `x / rms(x) * weight`; weight [hidden] float32.

    The result is an activation: opaque, good for one product, and valid until the step ends.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, section 4.
    """
    if isinstance(x, Recorded):
        return x.program.record_norm(weight, eps)
    out = torch.empty_like(x)
    torch.ops.tgi.rms_norm(x, weight, eps, None, out)
    return out


@meta_of("rms_norm")
def _rms_norm_meta(x: Tensor, weight: Tensor, eps: float, rows: Tensor | None, out: Tensor) -> None:
    num_rows = x.shape[0] if rows is None else rows.shape[0]
    require(out.shape == (num_rows, weight.shape[0]))
