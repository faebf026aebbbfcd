"""The operator `up`: the first half of an MLP without a gate."""

from __future__ import annotations

import math

from tgi_asgi.ops import calls
from tgi_asgi.ops.activation_names import ACTIVATIONS, XIELU
from tgi_asgi.ops.recorder import Kind, Value, recorder_of
from tgi_asgi.ops.weights import LinearWeight


def up(a: Value, weight: LinearWeight, activation: str, alphas: tuple[float, float] | None = None) -> Value:
    """Return the activation f(a @ W.T (+ bias)), [n_tokens, rows] of the weight.

    Args:
        alphas: xIELU's two parameters, for inputs above zero and below; no other function has any.

    Raises:
        ValueError: if `activation` is not one of `ACTIVATIONS`, or `alphas` are not finite, missing or
            superfluous.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {', '.join(ACTIVATIONS)}, got {activation}")
    if (alphas is None) != (activation != XIELU):
        raise ValueError(f"xielu and no other activation needs `alphas`, got {alphas} for {activation}")
    if alphas is not None and not all(map(math.isfinite, alphas)):
        raise ValueError(f"`alphas` must be finite, got {alphas}")
    recorder = recorder_of("up", a=(a, Kind.ACTIVATION, weight.columns))
    out = recorder.value(Kind.ACTIVATION, weight.rows)
    return recorder.note(calls.Up(out, a, weight, activation, alphas or (0.0, 0.0)))
