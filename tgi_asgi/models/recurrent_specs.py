"""What a layer may have in the place of attention, or beside it: sizes, and what a sequence keeps of it.

Each of `RecurrentSpec` is a `StateShape`; `config.py` bounds their numbers. Without torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ShortConvSpec:
    """A gated short convolution (LFM2): the window that a sequence keeps is a `StateShape`."""

    num_channels: int
    num_taps: int  # tokens that it goes over
    has_bias: bool = False  # of the convolution, and of the products around it

    @property
    def num_floats(self) -> int:
        """It keeps nothing but the window."""
        return 0


@dataclass(frozen=True, slots=True)
class MambaSpec:
    """State spaces of heads behind a short convolution (Mamba-2); what a sequence keeps is a `StateShape`."""

    num_heads: int
    head_dim: int  # a multiple of 16, as the kernels have it
    num_groups: int  # of heads, which share B and C
    state_size: int
    num_taps: int  # tokens that the convolution goes over
    has_conv_bias: bool = True
    has_input_bias: bool = False
    has_output_bias: bool = False
    dt_limit: tuple[float, float] = (0.0, math.inf)
    has_norm: bool = True  # of the heads' results, by groups
    is_gate_first: bool = True  # before that norm
    factors: tuple[float, float, float, float, float] = (1.0,) * 5  # on gates, x, B, C and steps

    @property
    def width(self) -> int:
        """Channels of all heads."""
        return self.num_heads * self.head_dim

    @property
    def num_channels(self) -> int:
        """Those that are convolved: x, B and C."""
        return self.width + 2 * self.num_groups * self.state_size

    @property
    def num_floats(self) -> int:
        """What the heads' states are."""
        return self.width * self.state_size


@dataclass(frozen=True, slots=True)
class GatedDeltaSpec:
    """Heads of the gated delta rule behind a short convolution (Qwen3-Next, Qwen3.5)."""

    num_heads: int
    head_dim: int  # of values, a multiple of 16, as the kernels have it
    num_key_heads: int  # several heads have one key and query
    key_dim: int
    num_taps: int  # tokens that the convolution goes over
    is_tiled: bool = False  # head h has the key of h % num_key_heads; else neighbours have one

    @property
    def width(self) -> int:
        """Channels of all heads' values."""
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Channels of all keys, or of all queries."""
        return self.num_key_heads * self.key_dim

    @property
    def num_channels(self) -> int:
        """Those that are convolved: queries, keys and values."""
        return self.width + 2 * self.key_width

    @property
    def num_floats(self) -> int:
        """What the heads' states are."""
        return self.width * self.key_dim


@dataclass(frozen=True, slots=True)
class PartFactors:
    """Constants of one part of a layer."""

    read: float = 1.0  # on what it reads
    added: float = 1.0  # on what it adds to the residual


@dataclass(frozen=True, slots=True)
class HybridSpec:
    """A layer that attends and is recurrent: both read one norm, and add to the residual (Falcon-H1)."""

    attention: PartFactors
    state: PartFactors
    mlp: PartFactors


RecurrentSpec = ShortConvSpec | MambaSpec | GatedDeltaSpec
