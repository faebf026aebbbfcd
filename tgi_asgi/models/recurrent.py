"""What a layer may have in the place of attention: something that keeps a state of a sequence, of one size.

Plain Python over the operators, as `layers.py`.
"""

from __future__ import annotations

from typing import Protocol

import torch

from tgi_asgi import ops
from tgi_asgi.models.config import MambaSpec, ModelConfig, RecurrentSpec, ShortConvSpec


class RecurrentSource(Protocol):
    """A layer's weights, as `layers.LayerWeights` has them."""

    config: ModelConfig

    def has(self, name: str) -> bool: ...
    def get(self, name: str, *shape: int) -> ops.WeightSource: ...
    def linear(self, name: str, rows: int, columns: int, *, has_bias: bool) -> ops.LinearWeight: ...


class Recurrent(Protocol):
    """Something of this kind.

    Attributes:
        products: by the names of their modules, as adapters have them.
    """

    products: dict[str, ops.LinearWeight]

    def add(self, a: ops.Value, x: ops.Value, cache: ops.Cache, factor: float) -> ops.Value:
        """Add to the residual x what this makes of the activation a, times `factor`."""


class ShortConv:
    """A gated short convolution: C * conv(B * x), of which one product makes all three.

    Source: Liquid AI, LFM2 Technical Report, arXiv 2511.23404, section 2.
    """

    def __init__(self, weights: RecurrentSource, spec: ShortConvSpec) -> None:
        hidden, channels = weights.config.hidden_size, spec.num_channels
        self._input = weights.linear("conv.in_proj", 3 * channels, hidden, has_bias=spec.has_bias)
        taps = ops.vector(weights.get("conv.conv.weight", channels, 1, spec.num_taps))
        bias = ops.vector(weights.get("conv.conv.bias", channels)) if spec.has_bias else None
        self._conv = ops.ShortConvWeight(taps.view(channels, spec.num_taps), bias)
        self._output = weights.linear("conv.out_proj", hidden, channels, has_bias=spec.has_bias)
        self.products = {"conv.in_proj": self._input, "conv.out_proj": self._output}

    def add(self, a: ops.Value, x: ops.Value, cache: ops.Cache, factor: float) -> ops.Value:
        """Add to the residual x what this makes of the activation a, times `factor`."""
        rows = ops.short_conv(ops.linear(a, self._input), self._conv, cache, is_gated=True)
        return ops.linear_add(ops.activation(rows), self._output, x, factor)


class Mamba:
    """Mamba-2: a product makes gates, what is convolved (x, B and C) and the heads' steps.

    Source: Dao and Gu, Transformers are SSMs, arXiv 2405.21060, section 7.
    """

    def __init__(self, weights: RecurrentSource, spec: MambaSpec) -> None:
        hidden, heads, width = weights.config.hidden_size, spec.num_heads, spec.width
        rows = width + spec.num_channels + heads
        self._spec, self._eps = spec, weights.config.norm_eps
        self._input = weights.linear("mamba.in_proj", rows, hidden, has_bias=spec.has_bias)
        taps = ops.vector(weights.get("mamba.conv1d.weight", spec.num_channels, 1, spec.num_taps))
        bias = ops.vector(weights.get("mamba.conv1d.bias", spec.num_channels)) if spec.has_conv_bias else None
        self._conv = ops.ShortConvWeight(taps.view(spec.num_channels, spec.num_taps), bias)
        is_llama_cpp = weights.has("mamba.A")  # where others have the logarithm of what it has
        logs, steps = ("mamba.A", "mamba.dt.bias") if is_llama_cpp else ("mamba.A_log", "mamba.dt_bias")
        a = ops.vector(weights.get(logs, heads))
        self._scan = ops.SelectiveScanWeight(
            heads, spec.head_dim, spec.num_groups, spec.state_size, a=a if is_llama_cpp else -torch.exp(a),
            d=ops.vector(weights.get("mamba.D", heads)), dt_bias=ops.vector(weights.get(steps, heads)),
            dt_limit=spec.dt_limit,
        )  # fmt: skip
        groups = (spec.num_groups, width // spec.num_groups) if is_llama_cpp else (width,)
        self._norm = ops.vector(weights.get("mamba.norm.weight", *groups))
        self._output = weights.linear("mamba.out_proj", hidden, width, has_bias=spec.has_bias)
        self.products = {"mamba.in_proj": self._input, "mamba.out_proj": self._output}

    def add(self, a: ops.Value, x: ops.Value, cache: ops.Cache, factor: float) -> ops.Value:
        """Add to the residual x what this makes of the activation a, times `factor`."""
        width, channels = self._spec.width, self._spec.num_channels
        rows = ops.linear(a, self._input)  # gates, what is convolved, steps
        convolved = ops.short_conv(rows, self._conv, cache, has_silu=True, first_column=width)
        y = ops.selective_scan(convolved, rows, self._scan, cache, steps_column=width + channels)
        group_width = width // self._spec.num_groups
        y = ops.gated_norm(y, rows, self._norm, group_width=group_width, eps=self._eps)
        return ops.linear_add(ops.activation(y), self._output, x, factor)


def make_recurrent(weights: RecurrentSource, spec: RecurrentSpec) -> Recurrent:
    """Make what a configuration says."""
    return Mamba(weights, spec) if isinstance(spec, MambaSpec) else ShortConv(weights, spec)
