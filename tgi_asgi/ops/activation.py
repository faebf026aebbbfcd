"""The operator `activation`: the residual, or rows, as the input of products, without a norm."""

from __future__ import annotations

from tgi_asgi.ops import calls
from tgi_asgi.ops.values import Kind, Value, recorder_of


def activation(x: Value) -> Value:
    """Return the residual or the rows x [n_tokens, columns], as they are now, as an activation."""
    kind = Kind.ROWS if isinstance(x, Value) and x.kind is Kind.ROWS else Kind.RESIDUAL
    recorder = recorder_of("activation", x=(x, kind, None))
    return recorder.note(calls.Activation(recorder.value(Kind.ACTIVATION, x.columns), x))
