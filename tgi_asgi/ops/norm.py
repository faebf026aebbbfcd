"""The operators `norm` and `norm_add`: RMSNorm before a product, and after one."""

from __future__ import annotations

from torch import Tensor

from tgi_asgi.ops import calls
from tgi_asgi.ops.values import Kind, Value, recorder_of


def norm(x: Value, weight: Tensor, eps: float) -> Value:
    """Normalise the residual x [n_tokens, hidden] to the activation `x / rms(x) * weight`.

    weight: [hidden] float32. Source: Zhang and Sennrich, Root Mean Square Layer Normalization, section 4.
    """
    recorder = recorder_of("norm", x=(x, Kind.RESIDUAL, weight.numel()))
    return recorder.note(calls.Norm(recorder.value(Kind.ACTIVATION, x.columns), x, weight, eps))


def norm_add(rows: Value, weight: Tensor, eps: float, x: Value, factor: float = 1.0) -> Value:
    """Add `factor * rows / rms(rows) * weight` to the residual x in place, and return it.

    rows: [n_tokens, hidden], of `linear`: the norm behind a product that OLMo 2 and Gemma 2 have.
    """
    recorder = recorder_of(
        "norm_add", rows=(rows, Kind.ROWS, weight.numel()), x=(x, Kind.RESIDUAL, weight.numel())
    )
    return recorder.note(calls.NormAdd(recorder.added(x), rows, weight, eps, x, factor))
