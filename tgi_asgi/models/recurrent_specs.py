"""Sizes of layers' recurrent parts, and of the state that they keep per sequence. Without torch.

Each `RecurrentSpec` is a `StateShape`; `config_bounds.py` bounds its numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ShortConvSpec:
    """A gated short convolution (LFM2); its state, a `StateShape`, is the convolution's window."""

    num_channels: int
    num_taps: int  # number of tokens in the convolution
    has_bias: bool = False  # of the convolution, and of the products around it

    @property
    def num_floats(self) -> int:
        """Zero: the state is only the window."""
        return 0


@dataclass(frozen=True, slots=True)
class MambaSpec:
    """Mamba-2: selective state spaces after a short convolution; its state is a `StateShape`."""

    num_heads: int
    head_dim: int  # multiple of 16, required by the kernels
    num_groups: int  # of heads that share B and C
    state_size: int
    num_taps: int  # number of tokens in the convolution
    has_conv_bias: bool = True
    has_input_bias: bool = False
    has_output_bias: bool = False
    dt_limit: tuple[float, float] = (0.0, math.inf)
    has_norm: bool = True  # of the heads' results, by groups
    is_gate_first: bool = True  # whether gates apply before that norm
    factors: tuple[float, float, float, float, float] = (1.0,) * 5  # on gates, x, B, C and steps

    @property
    def width(self) -> int:
        """Number of channels of all heads."""
        return self.num_heads * self.head_dim

    @property
    def num_channels(self) -> int:
        """Number of convolved channels: x, B and C."""
        return self.width + 2 * self.num_groups * self.state_size

    @property
    def num_floats(self) -> int:
        """Number of elements of the heads' states."""
        return self.width * self.state_size


@dataclass(frozen=True, slots=True)
class ChannelsSpec:
    """Mamba 1: a state for each channel after a short convolution; its state is a `StateShape`."""

    width: int  # number of channels; multiple of 16, required by the kernels
    state_size: int
    rank: int  # number of inputs of the product that computes the channels' time steps
    num_taps: int  # number of tokens in the convolution
    has_conv_bias: bool = True
    has_bias: bool = False  # of the first product and of the last
    norm_eps: float | None = None  # of norms of the steps' inputs, of B and of C; None: no norms
    has_norm_weights: bool = False

    @property
    def num_channels(self) -> int:
        """Number of convolved channels."""
        return self.width

    @property
    def num_floats(self) -> int:
        """Number of elements of the channels' states."""
        return self.width * self.state_size


@dataclass(frozen=True, slots=True)
class GatedDeltaSpec:
    """Heads of the gated delta rule after a short convolution (Qwen3-Next, Qwen3.5)."""

    num_heads: int
    head_dim: int  # of values; multiple of 16, required by the kernels
    num_key_heads: int  # several heads share one key and query
    key_dim: int
    num_taps: int  # number of tokens in the convolution
    is_tiled: bool = False  # head h uses key h % num_key_heads; else adjacent heads share one

    @property
    def width(self) -> int:
        """Number of channels of all heads' values."""
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Number of channels of all keys, or of all queries."""
        return self.num_key_heads * self.key_dim

    @property
    def num_channels(self) -> int:
        """Number of convolved channels: queries, keys and values."""
        return self.width + 2 * self.key_width

    @property
    def num_floats(self) -> int:
        """Number of elements of the heads' states."""
        return self.width * self.key_dim


@dataclass(frozen=True, slots=True)
class PartFactors:
    """Constant factors of one part of a layer."""

    read: float = 1.0  # on its input
    added: float = 1.0  # on what it adds to the residual


@dataclass(frozen=True, slots=True)
class HybridSpec:
    """A layer with attention and recurrence: both read one norm and add to the residual (Falcon-H1)."""

    attention: PartFactors
    state: PartFactors
    mlp: PartFactors


RecurrentSpec = ShortConvSpec | MambaSpec | ChannelsSpec | GatedDeltaSpec
