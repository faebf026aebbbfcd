"""The operator `gate_up`: the first half of a gated MLP."""

from __future__ import annotations

from tgi_asgi.ops import calls
from tgi_asgi.ops.activation_names import GATED_ACTIVATIONS
from tgi_asgi.ops.recorder import Kind, Value, recorder_of
from tgi_asgi.ops.weights import GateUpWeight


def gate_up(a: Value, weight: GateUpWeight, activation: str = "silu") -> Value:
    """Return the activation f(a @ gate.T) * (a @ up.T), [n_tokens, intermediate].

    Source: Shazeer, GLU Variants Improve Transformer, equation 5 and following.

    Raises:
            ValueError: if `activation` is not one of `GATED_ACTIVATIONS`.
    """
    if activation not in GATED_ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {', '.join(GATED_ACTIVATIONS)}, got {activation}")
    recorder = recorder_of("gate_up", a=(a, Kind.ACTIVATION, weight.columns))
    out = recorder.value(Kind.ACTIVATION, weight.intermediate_size)
    return recorder.note(calls.GateUp(out, a, weight, activation))
