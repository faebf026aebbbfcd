"""Lowering of the recurrent layers' calls to CPU kernels: a part of `cpu_calls.py`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tgi_asgi import _C
from tgi_asgi.ops import calls, layout
from tgi_asgi.ops.arrays import Floats
from tgi_asgi.ops.buffers import CpuBuffers


class StateCalls:
    """Lowers calls that read and write states of sequences, and the gated norm that follows them.

    Attributes:
        buffers: The values' buffers.
    """

    buffers: CpuBuffers
    _native: _C.Program

    def _short_conv(self, call: calls.ShortConv) -> None:
        channels = call.out.columns
        conv = _C.ShortConv(
            weight=layout.padded(call.weight.taps.T),
            bias=None if call.weight.bias is None else layout.padded(call.weight.bias),
            first_column=call.first_column,
            in_gate=0 if call.is_gated else None,
            out_gate=channels if call.is_gated else None,
            has_silu=call.has_silu,
        )
        self._native.short_conv(
            rows=self.buffers.rows_of(call.rows), conv=conv, states=call.cache.pool.native,
            layer=call.cache.index, out=self.buffers.assign_rows(call.out, channels),
        )  # fmt: skip

    def _selective_scan(self, call: calls.SelectiveScan) -> None:
        weight = call.weight
        scan = _C.SelectiveScan(
            num_heads=weight.num_heads, head_dim=weight.head_dim, num_groups=weight.num_groups,
            state_size=weight.state_size, a=weight.a, d=weight.d,
            dt_bias=weight.dt_bias, dt_column=call.steps_column, dt_scale=weight.dt_scale,
            dt_low=weight.dt_limit[0], dt_high=weight.dt_limit[1],
        )  # fmt: skip
        self._native.selective_scan(scan=scan, **self._heads_of(call))

    def _channel_scan(self, call: calls.ChannelScan) -> None:
        source, steps, parts, gate = (
            self.buffers.rows_of(value) for value in (call.x, call.steps, call.parts, call.gate)
        )
        scan = _C.ChannelScan(
            num_channels=call.out.columns, state_size=call.weight.a.shape[1], a=_rates(call.weight.a),
            d=call.weight.d, parts_column=call.parts_column, gate_column=call.gate_column,
        )  # fmt: skip
        self._native.channel_scan(
            source=source, steps=steps, parts=parts, gate=gate, scan=scan, states=call.cache.pool.native,
            layer=call.cache.index, out=self.buffers.assign_rows(call.out, call.out.columns),
        )  # fmt: skip

    def _delta_rule(self, call: calls.DeltaRule) -> None:
        weight = call.weight
        rule = _C.DeltaRule(
            num_heads=weight.num_heads, head_dim=weight.head_dim, num_key_heads=weight.num_key_heads,
            key_dim=weight.key_dim, is_tiled=weight.is_tiled, a=weight.a,
            dt_bias=weight.dt_bias,
        )  # fmt: skip
        self._native.delta_rule(rule=rule, **self._heads_of(call))

    def _heads_of(self, call: calls.SelectiveScan | calls.DeltaRule) -> dict[str, Any]:
        """Return the buffers that heads with recurrent states read and write."""
        source, steps = (self.buffers.rows_of(value) for value in (call.rows, call.steps))
        return {
            "source": source, "steps": steps, "states": call.cache.pool.native, "layer": call.cache.index,
            "out": self.buffers.assign_rows(call.out, call.out.columns),
        }  # fmt: skip

    def _gated_norm(self, call: calls.GatedNorm) -> None:
        norm = _C.GatedNorm(
            width=call.out.columns, group_width=call.group_width, eps=call.eps,
            weight=call.weight,
            is_gate_first=call.is_gate_first, is_sigmoid=False, gate_scale=call.gate_scale,
        )  # fmt: skip
        rows, gate = (self.buffers.rows_of(value) for value in (call.rows, call.gate))
        out = self.buffers.assign_rows(call.out, call.out.columns)
        self._native.gated_norm(rows=rows, gate=gate, norm=norm, out=out)


def _rates(a: Floats) -> Floats:
    """Return rates [channels, state_size] for powers of two, in vectors of channels as states are."""
    channels, size = a.shape
    if channels % layout.PANEL:
        raise ValueError(f"channels with states must be multiples of {layout.PANEL}, got {channels}")
    vectors = (a.astype(np.float64) / math.log(2)).reshape(-1, layout.PANEL, size)
    found: Floats = np.ascontiguousarray(vectors.swapaxes(1, 2), np.float32)
    return found
