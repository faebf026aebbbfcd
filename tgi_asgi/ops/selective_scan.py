"""The operator `selective_scan`: state spaces of heads, which a sequence's tokens go through one by one.

Source: Dao and Gu, Transformers are SSMs, arXiv 2405.21060, section 7 (Mamba-2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from tgi_asgi.ops import calls
from tgi_asgi.ops.kv import Cache
from tgi_asgi.ops.states import check_heads, states_of
from tgi_asgi.ops.values import Kind, Value, recorder_of


@dataclass(frozen=True, eq=False, slots=True)
class SelectiveScanWeight:
    """The heads' own numbers, float32 [num_heads] each.

    Attributes:
        head_dim: a multiple of 16.
        num_groups: of heads, which share B and C.
        a: negative: a state is multiplied by e^(dt * a).
        d: how much of x goes past the state.
        dt_bias: is added to `dt_scale` times a token's step before softplus, whose result is cut to
            `dt_limit`.

    Raises:
        TypeError: they are not float32.
        ValueError: they do not have an element a head.
    """

    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    a: Tensor
    d: Tensor
    dt_bias: Tensor
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
        """Those of x, B and C."""
        return self.width + 2 * self.num_groups * self.state_size


def selective_scan(
    rows: Value, steps: Value, weight: SelectiveScanWeight, cache: Cache, *, steps_column: int = 0
) -> Value:
    """Take each sequence's tokens through its heads' states, which `cache` keeps.

    With dt = softplus(dt_scale * step + dt_bias): state = e^(dt * a) * state + dt * x * B; y = state . C +
    d * x. A token's bits do not depend on how its sequence was cut into steps.

    Args:
        rows: x [heads, head_dim], B and C [groups, state_size], side by side.
        steps: rows that have each head's step, from `steps_column` on.

    Returns:
        Rows y [n_tokens, heads * head_dim].

    Raises:
        TypeError: `cache` is of keys and values.
        ValueError: columns or states do not fit the weight.
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
