"""What a layer's operators compute, in float64: slow and obvious."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of each row."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn dimension i of x [n, heads, dim] with i + rotary / 2, by cos and sin [n, rotary / 2]."""
    half = cos.shape[1]
    first, second, rest = x.double().split([half, half, x.shape[2] - 2 * half], dim=-1)
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def activate(x: Tensor, activation: str) -> Tensor:
    """SiLU, or GELU in its tanh form."""
    x = x.double()
    if activation == "silu":
        return x / (1 + torch.exp(-x))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def linear(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a @ W.T + bias`."""
    product = a.double() @ weight.double().T
    return product if bias is None else product + bias.double()
