"""The operator `heads_linear`: a separate product per head, as latent attention needs."""

from __future__ import annotations

from tgi_asgi.ops import calls
from tgi_asgi.ops.recorder import Kind, Value, recorder_of
from tgi_asgi.ops.weights import HeadsWeight


def heads_linear(a: Value, weight: HeadsWeight) -> Value:
    """Multiply each head's columns of the activation a [n_tokens, num_heads * columns] by its own matrix.

    Returns rows [n_tokens, num_heads * rows] float32.
    """
    columns = weight.num_heads * weight.columns
    recorder = recorder_of("heads_linear", a=(a, Kind.ACTIVATION, columns))
    out = recorder.value(Kind.ROWS, weight.num_heads * weight.rows)
    return recorder.note(calls.HeadsLinear(out, a, weight))
