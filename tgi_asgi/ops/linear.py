"""The operators `linear` and `linear_add`: a product as rows, or added to the residual."""

from __future__ import annotations

from torch import Tensor

from tgi_asgi.ops import calls
from tgi_asgi.ops.at_once import at_once
from tgi_asgi.ops.values import Kind, Operand, recorder_of
from tgi_asgi.ops.weights import LinearWeight


def linear(a: Operand, weight: LinearWeight) -> Operand:
    """Return the rows `a @ W.T (+ bias)` [n_tokens, rows] float32 of the activation a [n_tokens, columns]."""
    if isinstance(a, Tensor):
        return at_once(lambda _, a: linear(a, weight), (a, Kind.ACTIVATION))
    recorder = recorder_of("linear", a=(a, Kind.ACTIVATION, weight.columns))
    return recorder.note(calls.Linear(recorder.value(Kind.ROWS, weight.rows), a, weight))


def linear_add(a: Operand, weight: LinearWeight, x: Operand, factor: float = 1.0) -> Operand:
    """Add `factor * (a @ W.T (+ bias))` to the residual x [n_tokens, rows] in place, and return it."""
    if isinstance(a, Tensor):
        return at_once(
            lambda _, a, x: linear_add(a, weight, x, factor), (a, Kind.ACTIVATION), (x, Kind.RESIDUAL)
        )
    recorder = recorder_of(
        "linear_add", a=(a, Kind.ACTIVATION, weight.columns), x=(x, Kind.RESIDUAL, weight.rows)
    )
    return recorder.note(calls.LinearAdd(recorder.added(x), a, weight, x, factor))
