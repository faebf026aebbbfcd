"""The operator `selective_scan`: state-space recurrence per head, applied to a sequence's tokens in order.

Source: Dao and Gu, Transformers are SSMs, arXiv 2405.21060, section 7 (Mamba-2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tgi_asgi.ops import calls
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.kv import Cache
from tgi_asgi.ops.states import check_heads, states_of
from tgi_asgi.ops.values import Kind, Value, recorder_of


@dataclass(frozen=True, eq=False, slots=True)
class SelectiveScanWeight:
    """The heads' parameters, float32 [num_heads] each.

    Attributes:
        head_dim: Dims of a head, a multiple of 16.
        num_groups: Number of groups of heads; the heads of a group share B and C.
        a: Negative; a state is multiplied by e^(dt * a).
        d: Factor with which x bypasses the state.
        dt_bias: Added to `dt_scale` times a token's step before softplus, whose result is clamped to
            `dt_limit`.

    Raises:
        TypeError: if a vector is not float32.
        ValueError: if a vector does not have one element per head.
    """

    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    a: Floats
    d: Floats
    dt_bias: Floats
    dt_limit: tuple[float, float] = (0.0, math.inf)
    dt_scale: float = 1.0

    def __post_init__(self) -> None:
        check_heads(self.num_heads, a=self.a, d=self.d, dt_bias=self.dt_bias)

    @property
    def width(self) -> int:
        """Channels of all heads."""
        return self.num_heads * self.head_dim

    @property
    def columns(self) -> int:
        """Columns of x, B and C together."""
        return self.width + 2 * self.num_groups * self.state_size


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
