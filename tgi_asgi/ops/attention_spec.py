"""How a layer attends: which positions a query sees, and how its scores are transformed."""

from __future__ import annotations

from tgi_asgi import _C
from tgi_asgi.ops.arrays import Floats


class AttentionSpec:
    """One layer's attention parameters, validated on construction.

        spec = AttentionSpec(head_dim**-0.5, window=4096, soft_cap=50.0)  # Gemma 2

    Args:
        scale: Factor on the scores.
        window: Number of positions that a query sees, its own last; None: all before it.
        chunk: Size of the chunks of positions; a query sees only those of its own chunk (Llama 4).
        soft_cap: Cap on the scaled scores, which become soft_cap * tanh(score / soft_cap) (Gemma 2).
        sinks: float32 [num_heads], attention sinks: scores that enter the softmax's sum but have no value
            (gpt-oss).
        slopes: float32 [num_heads], ALiBi slopes: slope * (key position - query position) is added to a score
            after its cap (Press et al., 2022).
        sees_ahead: Whether tokens also see later ones in a step that says so, as those of an image do.

    Raises:
        ValueError: if a number is not finite, or a window, chunk or cap is not positive.
        TypeError: if sinks or slopes are not float32.
    """

    __slots__ = ("chunk", "native", "scale", "sees_ahead", "sinks", "slopes", "soft_cap", "window")

    def __init__(
        self,
        scale: float,
        window: int | None = None,
        chunk: int | None = None,
        soft_cap: float | None = None,
        sinks: Floats | None = None,
        slopes: Floats | None = None,
        *,
        sees_ahead: bool = True,
    ) -> None:
        self.scale, self.window, self.chunk, self.soft_cap = scale, window, chunk, soft_cap
        self.sinks, self.slopes, self.sees_ahead = sinks, slopes, sees_ahead
        self.native = _C.AttentionSpec(
            scale=scale, window=window, chunk=chunk, soft_cap=soft_cap, sinks=sinks,
            slopes=slopes, sees_ahead=sees_ahead,
        )  # fmt: skip
