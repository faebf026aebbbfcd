"""The operator `act_mul`: rows times the activation function of a gate."""

from __future__ import annotations

from tgi_asgi.ops import calls
from tgi_asgi.ops.activation_names import GATED_ACTIVATIONS
from tgi_asgi.ops.layout import STRIP
from tgi_asgi.ops.recorder import Kind, Value, recorder_of


def act_mul(gate: Value, rows: Value, activation: str = "silu", first_column: int = 0) -> Value:
    """Return f(gate) * rows[:, first_column : first_column + n] as an activation [n_tokens, n].

    gate: rows [n_tokens, n], from `linear`; rows: [n_tokens, at least first_column + n].

    Raises:
        ValueError: if `activation` is not one of `GATED_ACTIVATIONS`, `rows` lack these columns, or n or
            `first_column` is not a multiple of 32.
    """
    if activation not in GATED_ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {', '.join(GATED_ACTIVATIONS)}, got {activation}")
    recorder = recorder_of("act_mul", gate=(gate, Kind.ROWS, None), rows=(rows, Kind.ROWS, None))
    columns = gate.columns
    if columns % STRIP or first_column % STRIP:
        raise ValueError(
            f"`act_mul` takes multiples of {STRIP} columns, not {columns} from {first_column} on"
        )
    if not 0 <= first_column <= rows.columns - columns:
        raise ValueError(f"`rows` have {rows.columns} columns, not {columns} from {first_column} on")
    out = recorder.value(Kind.ACTIVATION, columns)
    return recorder.note(calls.ActMul(out, gate, rows, activation, first_column))
