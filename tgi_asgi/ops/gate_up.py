"""The operator `gate_up`: the gated half of the MLP."""

from __future__ import annotations

import torch
from torch import Tensor

from tgi_asgi.ops.matmul import matmul
from tgi_asgi.ops.meta import meta_of, require
from tgi_asgi.ops.recorded import Recorded
from tgi_asgi.ops.weights import GateUpWeight

ACTIVATIONS = ("silu", "gelu_tanh")


def gate_up(a: Tensor, weight: GateUpWeight, activation: str = "silu") -> Tensor:
    """Return the activation f(a @ gate.T) * (a @ up.T), [n_tokens, intermediate].

    Source: Shazeer, GLU Variants Improve Transformer, equation 5 and following.

    Raises:
        ValueError: `activation` is not one of `ACTIVATIONS`.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {', '.join(ACTIVATIONS)}, got {activation}")
    if isinstance(a, Recorded):
        return a.program.record_gate_up(a, weight, activation)
    product = matmul(a, weight.linear)  # [n_tokens, 2 * intermediate]
    out = torch.empty(a.shape[0], weight.intermediate_size, dtype=torch.float32)
    torch.ops.tgi.act_mul(product, activation, out)
    return out


@meta_of("act_mul")
def _act_mul_meta(gate_up: Tensor, activation: str, out: Tensor) -> None:
    require(gate_up.shape == (out.shape[0], 2 * out.shape[1]))
