"""The operator `activation`: the residual as the input of products, without a norm."""

from __future__ import annotations

from torch import Tensor

from tgi_asgi.ops import calls
from tgi_asgi.ops.at_once import at_once
from tgi_asgi.ops.values import Kind, Operand, recorder_of


def activation(x: Operand) -> Operand:
    """Return the residual x [n_tokens, hidden] as it is now, as an activation."""
    if isinstance(x, Tensor):
        return at_once(lambda _, x: activation(x), (x, Kind.RESIDUAL))
    recorder = recorder_of("activation", x=(x, Kind.RESIDUAL, None))
    return recorder.note(calls.Activation(recorder.value(Kind.ACTIVATION, x.columns), x))
