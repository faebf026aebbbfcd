"""The norm operators: before a product, after one, and of the residual in place."""

from __future__ import annotations

from tgi_asgi.ops import calls
from tgi_asgi.ops.norm_weight import NormWeight
from tgi_asgi.ops.recorder import Kind, Value, recorder_of


def norm(x: Value, weight: NormWeight) -> Value:
    """Normalise the residual x [n_tokens, hidden], or rows, into an activation."""
    kind = Kind.ROWS if isinstance(x, Value) and x.kind is Kind.ROWS else Kind.RESIDUAL
    recorder = recorder_of("norm", x=(x, kind, weight.columns))
    return recorder.note(calls.Norm(recorder.value(Kind.ACTIVATION, x.columns), x, weight))


def norm_add(rows: Value, weight: NormWeight, x: Value, factor: float = 1.0) -> Value:
    """Add `factor * norm(rows)` to the residual x in place, and return it.

    rows: [n_tokens, hidden], from `linear`. OLMo 2 and Gemma 2 have this norm after a product.
    """
    recorder = recorder_of(
        "norm_add", rows=(rows, Kind.ROWS, weight.columns), x=(x, Kind.RESIDUAL, weight.columns)
    )
    return recorder.note(calls.NormAdd(recorder.added(x), rows, weight, x, factor))


def norm_residual(x: Value, weight: NormWeight) -> Value:
    """Replace the residual x [n_tokens, hidden] by its norm, and return it.

    BLOOM does this after its embedding.
    """
    recorder = recorder_of("norm_residual", x=(x, Kind.RESIDUAL, weight.columns))
    return recorder.note(calls.NormResidual(recorder.added(x), x, weight))
