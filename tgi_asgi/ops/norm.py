"""The operators of norms: before a product, behind one, and of the residual itself."""

from __future__ import annotations

from tgi_asgi.ops import calls
from tgi_asgi.ops.norm_weight import NormWeight
from tgi_asgi.ops.values import Kind, Value, recorder_of


def norm(x: Value, weight: NormWeight) -> Value:
    """Normalise the residual x [n_tokens, hidden], or rows, to an activation."""
    kind = Kind.ROWS if isinstance(x, Value) and x.kind is Kind.ROWS else Kind.RESIDUAL
    recorder = recorder_of("norm", x=(x, kind, weight.columns))
    return recorder.note(calls.Norm(recorder.value(Kind.ACTIVATION, x.columns), x, weight))


def norm_add(rows: Value, weight: NormWeight, x: Value, factor: float = 1.0) -> Value:
    """Add `factor * norm(rows)` to the residual x in place, and return it.

    rows: [n_tokens, hidden], of `linear`: the norm behind a product that OLMo 2 and Gemma 2 have.
    """
    recorder = recorder_of(
        "norm_add", rows=(rows, Kind.ROWS, weight.columns), x=(x, Kind.RESIDUAL, weight.columns)
    )
    return recorder.note(calls.NormAdd(recorder.added(x), rows, weight, x, factor))


def norm_residual(x: Value, weight: NormWeight) -> Value:
    """Put the norm of the residual x [n_tokens, hidden] in its place, and return it.

    So BLOOM goes on from its embedding.
    """
    recorder = recorder_of("norm_residual", x=(x, Kind.RESIDUAL, weight.columns))
    return recorder.note(calls.NormResidual(recorder.added(x), x, weight))
