"""The operator `delta_rule`: states of heads that are corrected token by token.

Source: Yang, Kautz and Hatamizadeh, Gated Delta Networks, arXiv 2412.06464, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tgi_asgi.ops import calls
from tgi_asgi.ops.kv import Cache
from tgi_asgi.ops.states import check_heads, states_of
from tgi_asgi.ops.values import Kind, Value, recorder_of


@dataclass(frozen=True, eq=False, slots=True)
class DeltaRuleWeight:
    """The heads' own numbers, float32 [num_heads] each.

    Attributes:
        head_dim: of values, a multiple of 16.
        num_key_heads: divides the heads: several have one key and query.
        key_dim: of keys and queries, up to 256.
        a: negative: a state is multiplied by e^(a * softplus(step + dt_bias)).
        is_tiled: head h has the key of h % num_key_heads; else neighbours have one.

    Raises:
        TypeError: they are not float32.
        ValueError: they do not have an element a head.
    """

    num_heads: int
    head_dim: int
    num_key_heads: int
    key_dim: int
    a: Tensor
    dt_bias: Tensor
    is_tiled: bool = False

    def __post_init__(self) -> None:
        check_heads(self.num_heads, a=self.a, dt_bias=self.dt_bias)

    @property
    def width(self) -> int:
        """Channels of all heads' values."""
        return self.num_heads * self.head_dim

    @property
    def columns(self) -> int:
        """Those of queries, keys and values."""
        return self.width + 2 * self.num_key_heads * self.key_dim

    @property
    def num_floats(self) -> int:
        """What the heads' states are."""
        return self.width * self.key_dim


def delta_rule(rows: Value, steps: Value, weight: DeltaRuleWeight, cache: Cache) -> Value:
    """Take each sequence's tokens through its heads' states, which `cache` keeps.

    With queries and keys divided by their lengths, queries by sqrt(key_dim) as well, decay =
    e^(a * softplus(step + dt_bias)) and rate = sigmoid(other step): state = decay * state; state +=
    rate * (v - state . k) k; y = state . q. A token's bits do not depend on how its sequence was cut into
    steps.

    Args:
        rows: q and k [key heads, key_dim] and v [heads, head_dim], side by side.
        steps: of each head that of its rate, then of each that of its decay.

    Returns:
        Rows y [n_tokens, heads * head_dim].

    Raises:
        TypeError: `cache` is of keys and values.
        ValueError: columns or states do not fit the weight.
    """
    layer = states_of("delta_rule", cache, weight.num_floats)
    recorder = recorder_of(
        "delta_rule", rows=(rows, Kind.ROWS, weight.columns), steps=(steps, Kind.ROWS, 2 * weight.num_heads)
    )
    out = recorder.value(Kind.ROWS, weight.width)
    return recorder.note(calls.DeltaRule(out, rows, steps, weight, layer))
