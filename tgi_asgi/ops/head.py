"""The operator `head`: the final norm and the logits of the rows asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_asgi.ops.matmul import matmul
from tgi_asgi.ops.recorded import Recorded
from tgi_asgi.ops.weights import LinearWeight


def head(x: Tensor, rows: Tensor, norm_weight: Tensor, eps: float, weight: LinearWeight) -> Tensor:
    """Return logits [n_rows, vocab] float32 of rows [n_rows] int32 of the residual x [n_tokens, hidden].

    Raises:
        RuntimeError: a row is not in x.
    """
    if isinstance(x, Recorded):
        return x.program.record_head(norm_weight, eps, weight)
    normed = torch.empty(rows.shape[0], x.shape[1], dtype=torch.float32)
    torch.ops.tgi.rms_norm(x, norm_weight, eps, rows, normed)
    return matmul(normed, weight)
