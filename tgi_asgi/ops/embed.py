"""The operator `embed`: token ids to the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_asgi.ops.meta import meta_of, require
from tgi_asgi.ops.recorded import Recorded
from tgi_asgi.ops.weights import LinearWeight


def embed(ids: Tensor, weight: LinearWeight) -> Tensor:
    """Gather the rows of `weight` at ids [n_tokens] int32: the residual x [n_tokens, hidden] float32.

    Raises:
        RuntimeError: an id is not a row of the weight.
    """
    if isinstance(ids, Recorded):
        return ids.program.record_embed(weight)
    x = torch.empty(ids.shape[0], weight.columns, dtype=torch.float32)
    torch.ops.tgi.embed(ids, weight.matrix, x)
    return x


@meta_of("embed")
def _embed_meta(ids: Tensor, table: Tensor, out: Tensor) -> None:
    require(out.shape == (ids.shape[0], table.shape[1]))
