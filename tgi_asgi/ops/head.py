"""The operator `head`: the final norm and the logits of the requested rows."""

from __future__ import annotations

from tgi_asgi.ops import calls
from tgi_asgi.ops.norm_weight import NormWeight
from tgi_asgi.ops.recorder import Kind, Value, recorder_of
from tgi_asgi.ops.weights import LinearWeight


def head(x: Value, norm: NormWeight, weight: LinearWeight, *, scale: float = 1.0, cap: float = 0.0) -> Value:
    """Return logits [n_rows, vocab] float32 of the rows of the residual x that a step requests.

    Logits are multiplied by `scale`, then capped to cap * tanh(logits / cap), unless `cap` is 0.

    Raises:
        ValueError: if the weight does not have the norm's columns.
    """
    recorder = recorder_of("head", x=(x, Kind.RESIDUAL, norm.columns))
    if weight.columns != norm.columns:
        raise ValueError(f"`head` takes a weight of {norm.columns} columns, not {weight.columns}")
    out = recorder.value(Kind.LOGITS, weight.rows)
    return recorder.note(calls.Head(out, x, norm, weight, scale, cap))
