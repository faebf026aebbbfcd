"""The operator `short_conv`: a causal convolution of each channel over its sequence's last few tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tgi_asgi.ops import calls
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.kv import Cache
from tgi_asgi.ops.states import states
from tgi_asgi.ops.values import Kind, Value, recorder_of


@dataclass(frozen=True, eq=False, slots=True)
class ShortConvWeight:
    """The taps of each channel, [channels, taps] float32, the oldest token's first, and a bias [channels].

    Raises:
        TypeError: if an array is not float32.
        ValueError: if an array has another shape.
    """

    taps: Floats
    bias: Floats | None = None

    def __post_init__(self) -> None:
        if self.taps.ndim != 2:
            raise ValueError(f"`taps` must be [channels, taps], got {list(self.taps.shape)}")
        if self.bias is not None and self.bias.shape != self.taps.shape[:1]:
            raise ValueError(f"`bias` must have {self.taps.shape[0]} elements, got {list(self.bias.shape)}")
        for name, array in (("taps", self.taps), ("bias", self.bias)):
            if array is not None and array.dtype != np.float32:
                raise TypeError(f"`{name}` must be float32, got {array.dtype}")


def short_conv(
    rows: Value,
    weight: ShortConvWeight,
    cache: Cache,
    *,
    is_gated: bool = False,
    has_silu: bool = False,
    first_column: int = 0,
) -> Value:
    """Convolve columns of rows along their sequences; write the tokens that the next step needs to `cache`.

    Gated (LFM2), rows are B, C and x side by side, each as wide as the channels; the result is C * conv(B *
    x). Otherwise x is the columns from `first_column` on. Returns rows [n_tokens, channels]. Tokens are
    processed one after the other, so a token's bits do not depend on how its sequence was split into steps.

    Args:
        has_silu: Whether silu is applied to the convolution's result.

    Raises:
        TypeError: if `cache` holds keys and values.
        ValueError: if channels, taps or columns do not fit the weight.
    """
    layer = states("short_conv", cache)
    channels, taps = weight.taps.shape
    if (channels, taps) != (layer.num_channels, layer.num_taps):
        raise ValueError(
            f"`short_conv` takes states of {channels} channels and {taps} taps, "
            f"not {layer.num_channels} and {layer.num_taps}"
        )
    recorder = recorder_of("short_conv", rows=(rows, Kind.ROWS, 3 * channels if is_gated else None))
    if not 0 <= first_column <= rows.columns - channels:
        raise ValueError(
            f"`short_conv` takes columns {first_column} to {first_column + channels} of `rows`, which has "
            f"{rows.columns}"
        )
    out = recorder.value(Kind.ROWS, channels)
    first = 2 * channels if is_gated else first_column
    return recorder.note(calls.ShortConv(out, rows, weight, layer, is_gated, has_silu, first))
