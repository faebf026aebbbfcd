"""The operator `short_conv`: a causal convolution of each channel over its sequence's last few tokens."""

from __future__ import annotations

from tgi_asgi.ops import calls
from tgi_asgi.ops.kv import Cache
from tgi_asgi.ops.recorder import Kind, Value, recorder_of
from tgi_asgi.ops.recurrent_weights import ShortConvWeight
from tgi_asgi.ops.states import states


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
