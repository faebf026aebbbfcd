"""The operator `selective_scan`: state-space recurrence per head, applied to a sequence's tokens in order.

Source: Dao and Gu, Transformers are SSMs, arXiv 2405.21060, section 7 (Mamba-2).
"""

from __future__ import annotations

from tgi_asgi.ops import calls
from tgi_asgi.ops.kv import Cache
from tgi_asgi.ops.recorder import Kind, Value, recorder_of
from tgi_asgi.ops.recurrent_weights import SelectiveScanWeight
from tgi_asgi.ops.states import states_of


def selective_scan(
    rows: Value, steps: Value, weight: SelectiveScanWeight, cache: Cache, *, steps_column: int = 0
) -> Value:
    """Update the heads' states, held in `cache`, with each sequence's tokens; return the outputs.

    With dt = softplus(dt_scale * step + dt_bias): state = e^(dt * a) * state + dt * x * B; y = state . C + d
    * x. A token's bits do not depend on how its sequence was split into steps.

    Args:
        rows: Columns of x [heads, head_dim], B and C [groups, state_size], side by side.
        steps: Rows that hold each head's step, from column `steps_column` on.

    Returns:
        Rows y [n_tokens, heads * head_dim].

    Raises:
        TypeError: if `cache` holds keys and values.
        ValueError: if columns or states do not fit the weight.
    """
    layer = states_of("selective_scan", cache, weight.width * weight.state_size)
    recorder = recorder_of(
        "selective_scan", rows=(rows, Kind.ROWS, weight.columns), steps=(steps, Kind.ROWS, None)
    )
    if not 0 <= steps_column <= steps.columns - weight.num_heads:
        raise ValueError(
            f"`selective_scan` takes columns {steps_column} to {steps_column + weight.num_heads} of `steps`, "
            f"which has {steps.columns}"
        )
    out = recorder.value(Kind.ROWS, weight.width)
    return recorder.note(calls.SelectiveScan(out, rows, steps, weight, layer, steps_column))
