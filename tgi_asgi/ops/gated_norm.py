"""The operator `gated_norm`: a gate and an RMSNorm by groups of columns, in either order."""

from __future__ import annotations

import numpy as np

from tgi_asgi.ops import calls
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.recorder import Kind, Value, recorder_of


def gated_norm(
    rows: Value,
    gate: Value,
    weight: Floats | None,
    *,
    group_width: int,
    eps: float,
    is_gate_first: bool = True,
    gate_scale: float = 1.0,
) -> Value:
    """Return norm(rows * silu(s * gate)), or norm(rows) * silu(s * gate), [n_tokens, columns] as `rows`.

    Args:
        gate: Rows whose first columns are the gates.
        weight: float32 [columns], weight of the RMSNorm, which normalises each group of `group_width` columns
            separately; None: no norm.
        is_gate_first: Whether the gate comes before the norm (Mamba-2), not after it.
        gate_scale: s.

    Raises:
        ValueError: if a number of columns does not fit.
        TypeError: if `weight` is not float32.
    """
    recorder = recorder_of("gated_norm", rows=(rows, Kind.ROWS, None), gate=(gate, Kind.ROWS, None))
    columns = rows.columns
    if columns > gate.columns:
        raise ValueError(f"`gated_norm` takes {columns} columns of `gate`, which has {gate.columns}")
    if group_width < 1 or columns % group_width:
        raise ValueError(f"`group_width` must divide the {columns} columns, got {group_width}")
    if weight is not None and weight.shape != (columns,):
        raise ValueError(f"`weight` must have {columns} elements, got {list(weight.shape)}")
    if weight is not None and weight.dtype != np.float32:
        raise TypeError(f"`weight` must be float32, got {weight.dtype}")
    out = recorder.value(Kind.ROWS, columns)
    return recorder.note(
        calls.GatedNorm(out, rows, gate, weight, group_width, eps, is_gate_first, gate_scale)
    )
