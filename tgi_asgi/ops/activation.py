"""The operator `activation`: the residual, or columns of rows, as the input of products, without a norm."""

from __future__ import annotations

from tgi_asgi.ops import calls
from tgi_asgi.ops.recorder import Kind, Value, recorder_of


def activation(x: Value, columns: int | None = None) -> Value:
    """Return the residual or rows x [n_tokens, columns], as they are now, as an activation.

    `columns` is how many of the first columns to take; None: all.

    Raises:
        ValueError: if x has fewer columns.
    """
    kind = Kind.ROWS if isinstance(x, Value) and x.kind is Kind.ROWS else Kind.RESIDUAL
    recorder = recorder_of("activation", x=(x, kind, None))
    if columns is None:
        columns = x.columns
    elif not 0 < columns <= x.columns:
        raise ValueError(f"`columns` must be in 1..{x.columns}, got {columns}")
    return recorder.note(calls.Activation(recorder.value(Kind.ACTIVATION, columns), x))
