"""How a layer attends: which positions it sees, and what is done with its scores."""

from __future__ import annotations

from torch import Tensor

from tgi_asgi import _C
from tgi_asgi.ops.layout import Floats


class AttentionSpec:
    """One layer's attention, checked once.

        spec = AttentionSpec(head_dim**-0.5, window=4096, soft_cap=50.0)  # Gemma 2

    Args:
        scale: what scores are multiplied by.
        window: so many positions a query sees, its own the last; None: all before it.
        chunk: a query sees those of its own chunk of so many positions only (Llama 4).
        soft_cap: scores, scaled, become soft_cap * tanh(score / soft_cap) (Gemma 2).
        sinks: float32 [num_heads], scores that join the sum of weights and have no value (gpt-oss).
        slopes: float32 [num_heads], slope * (position of the key - of the query) is added to a score, behind
            its cap: ALiBi (Press et al., 2022).

    Raises:
        ValueError: a number is not finite, or a window, chunk or cap not positive.
        TypeError: sinks or slopes are not float32.
    """

    __slots__ = ("chunk", "native", "scale", "sinks", "slopes", "soft_cap", "window")

    def __init__(
        self,
        scale: float,
        window: int | None = None,
        chunk: int | None = None,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
        slopes: Tensor | None = None,
    ) -> None:
        self.scale, self.window, self.chunk, self.soft_cap = scale, window, chunk, soft_cap
        self.sinks, self.slopes = sinks, slopes
        self.native = _C.AttentionSpec(
            scale=scale, window=window, chunk=chunk, soft_cap=soft_cap, sinks=_floats(sinks),
            slopes=_floats(slopes),
        )  # fmt: skip


def _floats(vector: Tensor | None) -> Floats | None:
    return None if vector is None else vector.detach().cpu().contiguous().numpy()
