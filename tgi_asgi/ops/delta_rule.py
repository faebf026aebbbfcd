"""The operator `delta_rule`: recurrent states per head, corrected token by token.

Source: Yang, Kautz and Hatamizadeh, Gated Delta Networks, arXiv 2412.06464, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from tgi_asgi.ops import calls
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.kv import Cache
from tgi_asgi.ops.states import check_heads, states_of
from tgi_asgi.ops.values import Kind, Value, recorder_of


@dataclass(frozen=True, eq=False, slots=True)
class DeltaRuleWeight:
    """The heads' parameters, float32 [num_heads] each.

    Attributes:
        head_dim: Dims of a head's values, a multiple of 16.
        num_key_heads: Number of heads of queries and keys, which divides `num_heads`: several heads share
            one.
        key_dim: Dims of keys and queries, up to 256.
        a: Negative; a state is multiplied by e^(a * softplus(step + dt_bias)).
        is_tiled: Whether head h uses key head h % num_key_heads; otherwise neighbouring heads share one.

    Raises:
        TypeError: if a vector is not float32.
        ValueError: if a vector does not have one element per head.
    """

    num_heads: int
    head_dim: int
    num_key_heads: int
    key_dim: int
    a: Floats
    dt_bias: Floats
    is_tiled: bool = False

    def __post_init__(self) -> None:
        check_heads(self.num_heads, a=self.a, dt_bias=self.dt_bias)

    @property
    def width(self) -> int:
        """Channels of all heads' values."""
        return self.num_heads * self.head_dim

    @property
    def columns(self) -> int:
        """Columns of queries, keys and values together."""
        return self.width + 2 * self.num_key_heads * self.key_dim

    @property
    def num_floats(self) -> int:
        """Number of floats in the heads' states."""
        return self.width * self.key_dim


def delta_rule(rows: Value, steps: Value, weight: DeltaRuleWeight, cache: Cache) -> Value:
    """Update the heads' states, held in `cache`, with each sequence's tokens; return the outputs.

    Queries and keys are divided by their lengths, and queries by sqrt(key_dim) as well. With decay = e^(a *
    softplus(step + dt_bias)) and rate = sigmoid(other step): state = decay * state; state += rate * (v -
    state . k) k; y = state . q. A token's bits do not depend on how its sequence was split into steps.

    Args:
        rows: Columns of q and k [key heads, key_dim] and v [heads, head_dim], side by side.
        steps: Columns of each head's step for its rate, followed by each head's step for its decay.

    Returns:
        Rows y [n_tokens, heads * head_dim].

    Raises:
        TypeError: if `cache` holds keys and values.
        ValueError: if columns or states do not fit the weight.
    """
    layer = states_of("delta_rule", cache, weight.num_floats)
    recorder = recorder_of(
        "delta_rule", rows=(rows, Kind.ROWS, weight.columns), steps=(steps, Kind.ROWS, 2 * weight.num_heads)
    )
    out = recorder.value(Kind.ROWS, weight.width)
    return recorder.note(calls.DeltaRule(out, rows, steps, weight, layer))
