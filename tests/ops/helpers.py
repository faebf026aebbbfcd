"""Weights for the operators' tests, made as a loader makes them."""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_asgi.ops import WeightSource


def source(tensor: Tensor) -> WeightSource:
    """Wrap a float32 tensor as a file would hold it."""
    return WeightSource(tensor.contiguous().view(torch.uint8).reshape(-1).numpy(), "F32", tuple(tensor.shape))


def random_source(*shape: int) -> tuple[Tensor, WeightSource]:
    """Return a random float32 tensor of this shape and its source."""
    tensor = torch.randn(shape)
    return tensor, source(tensor)
