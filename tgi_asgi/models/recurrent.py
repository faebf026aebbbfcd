"""Layers that replace attention with a recurrent state of fixed size per sequence.

Plain Python over the operators, like `layers.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tgi_asgi import ops
from tgi_asgi.models.decays import stored_decays
from tgi_asgi.models.layer_tensors import LayerTensors
from tgi_asgi.models.recurrent_channels import MambaChannels
from tgi_asgi.models.recurrent_specs import (
    ChannelsSpec,
    GatedDeltaSpec,
    MambaSpec,
    RecurrentSpec,
    ShortConvSpec,
)


class Recurrent(Protocol):
    """A recurrent part of a layer.

    Attributes:
        targets: What adapters may change of it, by module name.
    """

    targets: dict[str, ops.Target]

    def add(self, a: ops.Value, x: ops.Value, cache: ops.Cache, factor: float) -> ops.Value:
        """Add the output for the activation a, times `factor`, to the residual x."""


class ShortConv:
    """A gated short convolution: C * conv(B * x); one product computes B, C and x.

    Source: Liquid AI, LFM2 Technical Report, arXiv 2511.23404, section 2.
    """

    def __init__(self, weights: LayerTensors, spec: ShortConvSpec) -> None:
        hidden, channels = weights.config.hidden_size, spec.num_channels
        self._input = weights.linear("conv.in_proj", 3 * channels, hidden, has_bias=spec.has_bias)
        taps = ops.vector(weights.get("conv.conv.weight", channels, 1, spec.num_taps))
        bias = ops.vector(weights.get("conv.conv.bias", channels)) if spec.has_bias else None
        self._conv = ops.ShortConvWeight(taps.reshape(channels, spec.num_taps), bias)
        self._output = weights.linear("conv.out_proj", hidden, channels, has_bias=spec.has_bias)
        self.targets = {
            "conv.in_proj": ops.Target.whole(self._input),
            "conv.out_proj": ops.Target.whole(self._output),
        }

    def add(self, a: ops.Value, x: ops.Value, cache: ops.Cache, factor: float) -> ops.Value:
        """Add the output for the activation a, times `factor`, to the residual x."""
        return ops.linear_add(self._convolve(a, cache), self._output, x, factor)

    def rows(self, a: ops.Value, cache: ops.Cache) -> ops.Value:
        """Return the output for the activation a, rows, for models that norm it first."""
        return ops.linear(self._convolve(a, cache), self._output)

    def _convolve(self, a: ops.Value, cache: ops.Cache) -> ops.Value:
        return ops.activation(ops.short_conv(ops.linear(a, self._input), self._conv, cache, is_gated=True))


class Mamba:
    """Mamba-2: one product computes the gates, the inputs of the convolution (x, B and C) and the time steps.

    Source: Dao and Gu, Transformers are SSMs, arXiv 2405.21060, section 7.
    """

    def __init__(self, weights: LayerTensors, spec: MambaSpec) -> None:
        hidden, heads, width = weights.config.hidden_size, spec.num_heads, spec.width
        rows = width + spec.num_channels + heads
        self._spec, self._eps = spec, weights.config.norm_eps
        self._input = weights.linear("mamba.in_proj", rows, hidden, has_bias=spec.has_input_bias)
        taps = ops.vector(weights.get("mamba.conv1d.weight", spec.num_channels, 1, spec.num_taps))
        self._gate_factor, *convolved, steps_factor = spec.factors
        state = spec.num_groups * spec.state_size
        factors = np.repeat(np.array(convolved, np.float32), [width, state, state])
        bias = ops.vector(weights.get("mamba.conv1d.bias", spec.num_channels)) if spec.has_conv_bias else None
        self._conv = ops.ShortConvWeight(taps.reshape(len(factors), -1) * factors[:, None], bias)
        is_llama_cpp = weights.has("mamba.dt.bias")
        steps = weights.get("mamba.dt.bias" if is_llama_cpp else "mamba.dt_bias", heads)
        self._scan = ops.SelectiveScanWeight(
            heads, spec.head_dim, spec.num_groups, spec.state_size, a=stored_decays(weights, "mamba", heads),
            d=ops.vector(weights.get("mamba.D", heads)), dt_bias=ops.vector(steps), dt_limit=spec.dt_limit,
            dt_scale=steps_factor,
        )  # fmt: skip
        groups = (spec.num_groups, width // spec.num_groups) if is_llama_cpp else (width,)
        self._norm = ops.vector(weights.get("mamba.norm.weight", *groups)) if spec.has_norm else None
        self._output = weights.linear("mamba.out_proj", hidden, width, has_bias=spec.has_output_bias)
        self.targets = {
            "mamba.in_proj": ops.Target.whole(self._input),
            "mamba.out_proj": ops.Target.whole(self._output),
        }

    def add(self, a: ops.Value, x: ops.Value, cache: ops.Cache, factor: float) -> ops.Value:
        """Add the output for the activation a, times `factor`, to the residual x."""
        width, channels = self._spec.width, self._spec.num_channels
        rows = ops.linear(a, self._input)  # gates, convolution inputs, time steps
        convolved = ops.short_conv(rows, self._conv, cache, has_silu=True, first_column=width)
        y = ops.selective_scan(convolved, rows, self._scan, cache, steps_column=width + channels)
        y = ops.gated_norm(
            y, rows, self._norm, group_width=width // self._spec.num_groups, eps=self._eps,
            is_gate_first=self._spec.is_gate_first, gate_scale=self._gate_factor,
        )  # fmt: skip
        return ops.linear_add(ops.activation(y), self._output, x, factor)


class GatedDelta:
    """A gated delta net: queries, keys and values are convolved, then update and read the heads' states.

    Source: Yang, Kautz and Hatamizadeh, Gated Delta Networks, arXiv 2412.06464.
    """

    def __init__(self, weights: LayerTensors, spec: GatedDeltaSpec) -> None:
        hidden, heads, arithmetic = weights.config.hidden_size, spec.num_heads, weights.arithmetic
        self._head_dim, self._eps = spec.head_dim, weights.config.norm_eps
        self._input, self._gate = (ops.linear_weight(each, arithmetic) for each in _inputs(weights, spec))
        self._steps = ops.router_weight(_steps(weights, spec), arithmetic)
        taps = ops.vector(weights.get("linear_attn.conv1d.weight", spec.num_channels, 1, spec.num_taps))
        self._conv = ops.ShortConvWeight(taps.reshape(spec.num_channels, spec.num_taps))
        is_llama_cpp = weights.has("linear_attn.dt.bias")
        bias = weights.get("linear_attn.dt.bias" if is_llama_cpp else "linear_attn.dt_bias", heads)
        self._rule = ops.DeltaRuleWeight(
            heads, spec.head_dim, spec.num_key_heads, spec.key_dim,
            a=stored_decays(weights, "linear_attn", heads), dt_bias=ops.vector(bias), is_tiled=spec.is_tiled,
        )  # fmt: skip
        self._norm = np.tile(ops.vector(weights.get("linear_attn.norm.weight", spec.head_dim)), heads)
        self._output = weights.linear("linear_attn.out_proj", hidden, spec.width, has_bias=False)
        # In tiled files, heads are in another order than in adapters.
        self.targets = {} if spec.is_tiled else self._targets(weights, spec)

    def _targets(self, weights: LayerTensors, spec: GatedDeltaSpec) -> dict[str, ops.Target]:
        found = {"linear_attn.out_proj": ops.Target.whole(self._output)}
        if weights.has("linear_attn.in_proj_qkv.weight"):
            found["linear_attn.in_proj_qkv"] = ops.Target.whole(self._input)
            found["linear_attn.in_proj_z"] = ops.Target.whole(self._gate)
        else:
            order = _order_of_inputs(spec)
            gate = ops.Target(self._gate, 0, self._gate.rows, order[spec.num_channels :])
            rows = self._input.rows
            found["linear_attn.in_proj_qkvz"] = ops.Target(
                self._input, 0, rows, order[: spec.num_channels], (gate,)
            )
        heads = spec.num_heads
        if weights.has("linear_attn.in_proj_ba.weight"):
            order = _order_of_steps(spec)
            found["linear_attn.in_proj_ba"] = ops.Target(self._steps, 0, 2 * heads, order)
        elif heads % ops.PANEL == 0:  # else two targets would have rows of one panel
            found["linear_attn.in_proj_b"] = ops.Target(self._steps, 0, heads)
            found["linear_attn.in_proj_a"] = ops.Target(self._steps, heads, 2 * heads)
        return found

    def add(self, a: ops.Value, x: ops.Value, cache: ops.Cache, factor: float) -> ops.Value:
        """Add the output for the activation a, times `factor`, to the residual x."""
        rows, gate, steps = (ops.linear(a, each) for each in (self._input, self._gate, self._steps))
        convolved = ops.short_conv(rows, self._conv, cache, has_silu=True)
        y = ops.delta_rule(convolved, steps, self._rule, cache)
        y = ops.gated_norm(
            y, gate, self._norm, group_width=self._head_dim, eps=self._eps, is_gate_first=False
        )
        return ops.linear_add(ops.activation(y), self._output, x, factor)


def _inputs(weights: LayerTensors, spec: GatedDeltaSpec) -> Iterator[ops.WeightSource]:
    """Yield the product of queries, keys and values, one below another, and that of gates."""
    hidden, both = weights.config.hidden_size, "linear_attn.in_proj_qkvz.weight"
    if weights.has(both):
        order = _order_of_inputs(spec)
        fused = weights.get(both, len(order), hidden)
        yield fused.in_rows(order[: spec.num_channels])
        yield fused.in_rows(order[spec.num_channels :])
        return
    yield weights.get("linear_attn.in_proj_qkv.weight", spec.num_channels, hidden)
    yield weights.get("linear_attn.in_proj_z.weight", spec.width, hidden)


def _steps(weights: LayerTensors, spec: GatedDeltaSpec) -> ops.WeightSource:
    """Return the product of each head's rate, and below it that of each head's decay."""
    hidden, both = weights.config.hidden_size, "linear_attn.in_proj_ba.weight"
    if weights.has(both):
        return weights.get(both, 2 * spec.num_heads, hidden).in_rows(_order_of_steps(spec))
    each = [weights.get(f"linear_attn.in_proj_{name}.weight", spec.num_heads, hidden) for name in ("b", "a")]
    return ops.stack_rows(each)


def _order_of_inputs(spec: GatedDeltaSpec) -> npt.NDArray[np.int64]:
    """Return the rows of Qwen3-Next's `in_proj_qkvz` in the order in which they are held."""
    return _ungrouped(spec.num_key_heads, [spec.key_dim] * 2 + [spec.width // spec.num_key_heads] * 2)


def _order_of_steps(spec: GatedDeltaSpec) -> npt.NDArray[np.int64]:
    """Return the rows of Qwen3-Next's `in_proj_ba` in the order in which they are held."""
    return _ungrouped(spec.num_key_heads, [spec.num_heads // spec.num_key_heads] * 2)


def _ungrouped(num_groups: int, sizes: list[int]) -> npt.NDArray[np.int64]:
    """Return the row order for rows stored group by group, each group with parts of these sizes.

    q0 k0 v0 z0 | q1 k1 v1 z1         in Qwen3-Next's files
    q0 q1 | k0 k1 | v0 v1 | z0 z1     as read
    """
    rows = np.arange(num_groups * sum(sizes)).reshape(num_groups, -1)
    parts = np.split(rows, np.cumsum(sizes)[:-1], axis=1)
    return np.concatenate([part.reshape(-1) for part in parts])


def make_recurrent(weights: LayerTensors, spec: RecurrentSpec) -> Recurrent:
    """Make the recurrent part that a specification describes."""
    if isinstance(spec, GatedDeltaSpec):
        return GatedDelta(weights, spec)
    if isinstance(spec, ChannelsSpec):
        return MambaChannels(weights, spec)
    return Mamba(weights, spec) if isinstance(spec, MambaSpec) else ShortConv(weights, spec)
