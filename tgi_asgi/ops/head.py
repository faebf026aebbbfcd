"""The operator `head`: the final norm and the logits of the rows asked for."""

from __future__ import annotations

from torch import Tensor

from tgi_asgi.ops import calls
from tgi_asgi.ops.at_once import at_once
from tgi_asgi.ops.values import Kind, Operand, recorder_of
from tgi_asgi.ops.weights import LinearWeight


def head(
    x: Operand, norm: Tensor, eps: float, weight: LinearWeight, *, scale: float = 1.0, cap: float = 0.0
) -> Operand:
    """Return logits [n_rows, vocab] float32 of the residual x: of the rows that a step asks for, or of all.

    Logits are multiplied by `scale`, then capped to cap * tanh(logits / cap), unless `cap` is 0.
    """
    if isinstance(x, Tensor):
        return at_once(lambda _, x: head(x, norm, eps, weight, scale=scale, cap=cap), (x, Kind.RESIDUAL))
    recorder = recorder_of("head", x=(x, Kind.RESIDUAL, norm.numel()))
    if weight.columns != norm.numel():
        raise ValueError(f"`head` takes a weight of {norm.numel()} columns, not {weight.columns}")
    out = recorder.value(Kind.LOGITS, weight.rows)
    return recorder.note(calls.Head(out, x, norm, eps, weight, scale, cap))
