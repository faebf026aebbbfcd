"""Mamba's recurrent part of a layer (Mamba 1), in which each channel has steps and a state of its own.

Plain Python over the operators, like `layers.py`.
"""

from __future__ import annotations

from tgi_asgi import ops
from tgi_asgi.models.decays import stored_decays
from tgi_asgi.models.layer_tensors import LayerTensors
from tgi_asgi.models.recurrent_specs import ChannelsSpec


class MambaChannels:
    """Mamba: one product computes channels and gates, another the steps' inputs, B and C of the channels.

    Source: Gu and Dao, Mamba, arXiv 2312.00752, section 3.

    Attributes:
        targets: What adapters may change of it, by module name.
    """

    def __init__(self, weights: LayerTensors, spec: ChannelsSpec) -> None:
        hidden, width, rank, size = weights.config.hidden_size, spec.width, spec.rank, spec.state_size
        self._spec, has_bias = spec, spec.has_bias
        self._input = weights.linear("mamba.in_proj", 2 * width, hidden, has_bias=has_bias)
        taps = ops.vector(weights.get("mamba.conv1d.weight", width, 1, spec.num_taps))
        bias = ops.vector(weights.get("mamba.conv1d.bias", width)) if spec.has_conv_bias else None
        self._conv = ops.ShortConvWeight(taps.reshape(width, -1), bias)
        # Steps, B and C are multiplied with each other: without norms, an input of 8 bits makes
        # log-probabilities differ by a quarter more, and single ones by twice as much.
        parts = weights.get("mamba.x_proj.weight", rank + 2 * size, width)
        has_norms, arithmetic = spec.norm_eps is not None, weights.arithmetic
        self._parts = ops.linear_weight(parts, arithmetic if has_norms else arithmetic.for_states())
        self._norms = _norms(weights, spec)
        self._steps = weights.linear("mamba.dt_proj", width, rank, has_bias=True)
        a = stored_decays(weights, "mamba", width, size).reshape(width, size)
        self._scan = ops.ChannelScanWeight(a, ops.vector(weights.get("mamba.D", width)))
        self._output = weights.linear("mamba.out_proj", hidden, width, has_bias=has_bias)
        self.targets = {
            "mamba.in_proj": ops.Target.whole(self._input),
            "mamba.x_proj": ops.Target.whole(self._parts),
            "mamba.dt_proj": ops.Target.whole(self._steps),
            "mamba.out_proj": ops.Target.whole(self._output),
        }

    def add(self, a: ops.Value, x: ops.Value, cache: ops.Cache, factor: float) -> ops.Value:
        """Add the output for the activation a, times `factor`, to the residual x."""
        rank, width = self._spec.rank, self._spec.width
        rows = ops.linear(a, self._input)  # channels, gates
        convolved = ops.short_conv(rows, self._conv, cache, has_silu=True)
        parts = ops.linear(ops.activation(convolved), self._parts)  # inputs of steps, B, C
        for first_column, norm in self._norms.items():
            parts = ops.norm_in_place(parts, norm, first_column)
        steps = ops.linear(ops.activation(parts, rank), self._steps)
        y = ops.channel_scan(
            convolved, steps, parts, rows, self._scan, cache, parts_column=rank, gate_column=width
        )
        return ops.linear_add(ops.activation(y), self._output, x, factor)


def _norms(weights: LayerTensors, spec: ChannelsSpec) -> dict[int, ops.NormWeight]:
    """Return the norms of the steps' inputs, of B and of C, by the first of their columns."""
    if spec.norm_eps is None:
        return {}
    found, first_column = {}, 0
    for name, size in (("dt", spec.rank), ("b", spec.state_size), ("c", spec.state_size)):
        weight = None
        if spec.has_norm_weights:
            weight = ops.vector(weights.get(f"mamba.{name}_layernorm.weight", size))
        found[first_column] = ops.NormWeight.rms(size, spec.norm_eps, weight=weight)
        first_column += size
    return found
