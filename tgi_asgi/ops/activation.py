"""The operator `activation`: the residual, or columns of rows, as the input of products, without a norm."""

from __future__ import annotations

from tgi_asgi.ops import calls
from tgi_asgi.ops.layout import STRIP
from tgi_asgi.ops.values import Kind, Value, recorder_of


def activation(x: Value, columns: int | None = None) -> Value:
    """Return the residual or the rows x [n_tokens, columns], as they are now, as an activation.

    `columns`: so many of them, the first, in blocks of 32; None: all.

    Raises:
        ValueError: there are not so many, or not whole blocks.
    """
    kind = Kind.ROWS if isinstance(x, Value) and x.kind is Kind.ROWS else Kind.RESIDUAL
    recorder = recorder_of("activation", x=(x, kind, None))
    if columns is None:
        columns = x.columns
    elif not 0 < columns <= x.columns or columns % STRIP:
        raise ValueError(f"`columns` must be a multiple of {STRIP} up to {x.columns}, got {columns}")
    return recorder.note(calls.Activation(recorder.value(Kind.ACTIVATION, columns), x))
