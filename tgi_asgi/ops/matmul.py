"""The product behind `qkv`, `linear_add`, `gate_up` and `head`; not an operator of the models."""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_asgi.ops.meta import meta_of, require
from tgi_asgi.ops.weights import LinearWeight


def matmul(a: Tensor, weight: LinearWeight) -> Tensor:
    """Return `a @ W.T (+ bias)` as [n_tokens, rows] float32."""
    out = torch.empty(a.shape[0], weight.rows, dtype=torch.float32)
    torch.ops.tgi.matmul(a, weight.matrix, weight.bias, out)
    return out


@meta_of("matmul")
def _matmul_meta(a: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    require(out.shape == (a.shape[0], weight.shape[0]))
