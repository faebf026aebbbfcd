"""The operator `channel_scan`: state-space recurrence per channel, applied to a sequence's tokens in order.

Source: Gu and Dao, Mamba, arXiv 2312.00752, algorithm 2.
"""

from __future__ import annotations

from tgi_asgi.ops import calls
from tgi_asgi.ops.kv import Cache
from tgi_asgi.ops.recorder import Kind, Value, recorder_of
from tgi_asgi.ops.recurrent_weights import ChannelScanWeight
from tgi_asgi.ops.states import states_of


def channel_scan(
    x: Value,
    steps: Value,
    parts: Value,
    gate: Value,
    weight: ChannelScanWeight,
    cache: Cache,
    *,
    parts_column: int = 0,
    gate_column: int = 0,
) -> Value:
    """Update the channels' states, held in `cache`, with each sequence's tokens; return the gated outputs.

    With dt = softplus(step): state = e^(dt * a) * state + dt * x * B; y = (state . C + d * x) * silu(gate).
    Unlike in `selective_scan`, each channel has steps of its own, and each number of its state decays at a
    rate of its own. A token's bits do not depend on how its sequence was split into steps.

    Args:
        x, steps: Rows [n_tokens, channels].
        parts: Rows that hold B and C, [state_size] each, from column `parts_column` on.
        gate: Rows that hold each channel's gate, from column `gate_column` on.

    Returns:
        Rows y [n_tokens, channels].

    Raises:
        TypeError: if `cache` holds keys and values.
        ValueError: if columns or states do not fit the weight.
    """
    channels, size = weight.a.shape
    layer = states_of("channel_scan", cache, weight.a.size)
    recorder = recorder_of(
        "channel_scan", x=(x, Kind.ROWS, channels), steps=(steps, Kind.ROWS, channels),
        parts=(parts, Kind.ROWS, None), gate=(gate, Kind.ROWS, None),
    )  # fmt: skip
    for name, rows, first, count in (
        ("parts", parts, parts_column, 2 * size), ("gate", gate, gate_column, channels),
    ):  # fmt: skip
        if not 0 <= first <= rows.columns - count:
            raise ValueError(
                f"`channel_scan` takes columns {first} to {first + count} of `{name}`, which has "
                f"{rows.columns}"
            )
    out = recorder.value(Kind.ROWS, channels)
    return recorder.note(
        calls.ChannelScan(out, x, steps, parts, gate, weight, layer, parts_column, gate_column)
    )
