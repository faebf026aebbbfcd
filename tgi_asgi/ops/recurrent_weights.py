"""Parameters of the recurrent operators: `short_conv`, `selective_scan`, `channel_scan` and `delta_rule`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.states import check_heads


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


@dataclass(frozen=True, eq=False, slots=True)
class SelectiveScanWeight:
    """The heads' parameters, float32 [num_heads] each.

    Attributes:
        head_dim: Dims of a head, a multiple of 16.
        num_groups: Number of groups of heads; the heads of a group share B and C.
        a: Negative; a state is multiplied by e^(dt * a).
        d: Factor with which x bypasses the state.
        dt_bias: Added to `dt_scale` times a token's step before softplus, whose result is clamped to
            `dt_limit`.

    Raises:
        TypeError: if a vector is not float32.
        ValueError: if a vector does not have one element per head.
    """

    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    a: Floats
    d: Floats
    dt_bias: Floats
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
        """Columns of x, B and C together."""
        return self.width + 2 * self.num_groups * self.state_size


@dataclass(frozen=True, eq=False, slots=True)
class ChannelScanWeight:
    """The channels' parameters, float32.

    Attributes:
        a: [channels, state_size], not positive; a number of a state is multiplied by e^(dt * a). The channels
            are a multiple of 16.
        d: [channels], factor with which x bypasses the state.

    Raises:
        TypeError: if an array is not float32.
        ValueError: if an array has another shape, or a rate is positive or NaN.
    """

    a: Floats
    d: Floats

    def __post_init__(self) -> None:
        if self.a.ndim != 2:
            raise ValueError(f"`a` must be [channels, state_size], got {list(self.a.shape)}")
        if self.a.dtype != np.float32:
            raise TypeError(f"`a` must be float32, got {self.a.dtype}")
        if not (self.a <= 0).all():
            raise ValueError("`a` must not be positive: states would grow without a bound")
        check_heads(self.a.shape[0], d=self.d)


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
