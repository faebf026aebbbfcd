"""Float64 references for a layer's operators: slow and plain."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tgi_asgi.ops import NormWeight


def double(values: npt.NDArray[np.float32]) -> Tensor:
    """Return an operator's vector or table as a float64 tensor."""
    return torch.from_numpy(values).double()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the root-mean-square norm of each row."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return the norm of each row around its mean."""
    apart = x.double() - x.double().mean(-1, keepdim=True)
    return apart / (apart.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double() + bias.double()


def norm(x: Tensor, weight: NormWeight) -> Tensor:
    """Return either norm; weights of several heads are stored one after the other."""
    parts = [
        None if part is None else double(part).view(-1, x.shape[-1]) for part in (weight.weight, weight.bias)
    ]
    assert parts[0] is not None
    scale = parts[0] if len(parts[0]) > 1 else parts[0][0]
    if parts[1] is None:
        return rms_norm(x, scale, weight.eps)
    return layer_norm(x, scale, parts[1] if len(parts[1]) > 1 else parts[1][0], weight.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, is_interleaved: bool = False) -> Tensor:
    """Rotate dimension i of x [n, heads, dim] with i + rotary / 2, by cos and sin [n, rotary / 2].

    With `is_interleaved`, dimensions 2i and 2i + 1 rotate together.
    """
    if is_interleaved:
        turned, rest = x.double().split([2 * cos.shape[1], x.shape[2] - 2 * cos.shape[1]], dim=-1)
        apart = torch.cat([turned[..., 0::2], turned[..., 1::2]], dim=-1)
        first, second = rotate(apart, cos, sin).chunk(2, dim=-1)
        return torch.cat([torch.stack([first, second], dim=-1).flatten(-2), rest], dim=-1)
    half = cos.shape[1]
    first, second, rest = x.double().split([half, half, x.shape[2] - 2 * half], dim=-1)
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def activate(x: Tensor, activation: str, alphas: tuple[float, float] | None = None) -> Tensor:
    """Apply one of `ops.ACTIVATIONS`; GELU is exact or in its tanh form."""
    x = x.double()
    if activation == "silu":
        return x / (1 + torch.exp(-x))
    if activation == "gelu":
        tail: Tensor = torch.special.erfc(-x / math.sqrt(2))
        return 0.5 * x * tail
    if activation in ("relu", "relu_squared"):
        positive = x.clamp(min=0)
        return positive.square() if activation == "relu_squared" else positive
    if activation == "xielu":
        assert alphas is not None
        return torch.where(x > 0, alphas[0] * x**2, alphas[1] * (torch.expm1(x) - x)) + 0.5 * x
    assert activation == "gelu_tanh"
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def linear(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `a @ W.T + bias`."""
    product = a.double() @ weight.double().T
    return product if bias is None else product + bias.double()
