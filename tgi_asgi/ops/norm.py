"""The norm operators: before a product, after one, and in place."""

from __future__ import annotations

from tgi_asgi.ops import calls
from tgi_asgi.ops.layout import STRIP
from tgi_asgi.ops.norm_weight import NormWeight
from tgi_asgi.ops.recorder import Kind, Value, recorder_of


def norm(x: Value, weight: NormWeight) -> Value:
    """Normalise the residual x [n_tokens, hidden], or rows, into an activation."""
    recorder = recorder_of("norm", x=(x, _kind_of(x), weight.columns))
    return recorder.note(calls.Norm(recorder.value(Kind.ACTIVATION, x.columns), x, weight))


def norm_add(rows: Value, weight: NormWeight, x: Value, factor: float = 1.0, scale: float = 1.0) -> Value:
    """Replace the residual x, or rows, by `scale * (x + factor * norm(rows))`, and return it.

    rows: [n_tokens, hidden], from `linear`. OLMo 2 and Gemma 2 have this norm after a product.
    """
    recorder = recorder_of(
        "norm_add", rows=(rows, Kind.ROWS, weight.columns), x=(x, _kind_of(x), weight.columns)
    )
    return recorder.note(calls.NormAdd(recorder.added(x), rows, weight, x, factor, scale))


def norm_in_place(x: Value, weight: NormWeight, first_column: int | None = None) -> Value:
    """Replace the residual x [n_tokens, hidden], or rows, by its norm, and return it.

    BLOOM does this after its embedding. A norm that is narrower than rows normalises each group of their
    columns by itself (Gemma 4), or, with `first_column`, only the columns from there on (Jamba).

    Raises:
        ValueError: if groups of the norm's width, a multiple of 32, do not make up the columns of x, or rows
            lack the columns from `first_column` on.
    """
    kind, width = _kind_of(x), weight.columns
    recorder = recorder_of("norm_in_place", x=(x, kind, None if kind is Kind.ROWS else width))
    if first_column is not None:
        if not 0 <= first_column <= x.columns - width:
            raise ValueError(f"x has {x.columns} columns, not {width} from {first_column} on")
    elif x.columns != width and (x.columns % width or width % STRIP):
        raise ValueError(f"a norm of {width} columns cannot normalise {x.columns} in groups")
    return recorder.note(calls.NormInPlace(recorder.added(x), x, weight, first_column))


def _kind_of(x: object) -> Kind:
    """Return rows' kind for rows, else the residual's, which an error then names as expected."""
    return Kind.ROWS if isinstance(x, Value) and x.kind is Kind.ROWS else Kind.RESIDUAL
