"""The operator `activation`: the residual as the input of products, without a norm."""

from __future__ import annotations

from tgi_asgi.ops import calls
from tgi_asgi.ops.values import Kind, Value, recorder_of


def activation(x: Value) -> Value:
    """Return the residual x [n_tokens, hidden] as it is now, as an activation."""
    recorder = recorder_of("activation", x=(x, Kind.RESIDUAL, None))
    return recorder.note(calls.Activation(recorder.value(Kind.ACTIVATION, x.columns), x))
