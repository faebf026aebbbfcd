"""The operators `linear` and `linear_add`: a product as rows, or added to the residual."""

from __future__ import annotations

from tgi_asgi.ops import calls
from tgi_asgi.ops.recorder import Kind, Value, recorder_of
from tgi_asgi.ops.weights import LinearWeight


def linear(a: Value, weight: LinearWeight) -> Value:
    """Return the rows `a @ W.T (+ bias)` [n_tokens, rows] float32 of the activation a [n_tokens, columns]."""
    recorder = recorder_of("linear", a=(a, Kind.ACTIVATION, weight.columns))
    return recorder.note(calls.Linear(recorder.value(Kind.ROWS, weight.rows), a, weight))


def linear_add(a: Value, weight: LinearWeight, x: Value, factor: float = 1.0) -> Value:
    """Add `factor * (a @ W.T (+ bias))` to the residual x [n_tokens, rows] in place, and return it."""
    recorder = recorder_of(
        "linear_add", a=(a, Kind.ACTIVATION, weight.columns), x=(x, Kind.RESIDUAL, weight.rows)
    )
    return recorder.note(calls.LinearAdd(recorder.added(x), a, weight, x, factor))
