"""The operator `delta_rule`: recurrent states per head, corrected token by token.

Source: Yang, Kautz and Hatamizadeh, Gated Delta Networks, arXiv 2412.06464, section 3.
"""

from __future__ import annotations

from tgi_asgi.ops import calls
from tgi_asgi.ops.kv import Cache
from tgi_asgi.ops.recorder import Kind, Value, recorder_of
from tgi_asgi.ops.recurrent_weights import DeltaRuleWeight
from tgi_asgi.ops.states import states_of


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
