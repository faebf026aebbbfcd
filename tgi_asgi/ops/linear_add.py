"""The operator `linear_add`: a product added to the residual."""

from __future__ import annotations

from torch import Tensor

from tgi_asgi.ops.matmul import matmul
from tgi_asgi.ops.recorded import Recorded
from tgi_asgi.ops.weights import LinearWeight


def linear_add(a: Tensor, weight: LinearWeight, x: Tensor) -> Tensor:
    """Add `a @ W.T (+ bias)` to the residual x [n_tokens, rows] float32 in place, and return x."""
    if isinstance(a, Recorded):
        return a.program.record_linear_add(a, weight, x)
    x += matmul(a, weight)
    return x
