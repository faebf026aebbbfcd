"""Recurrent layers for models that compute in torch: one call per layer, tensors in and out."""

from __future__ import annotations

from torch import Tensor

from tgi_asgi import _C
from tgi_asgi.ops import layout
from tgi_asgi.ops.direct import new_rows, without_padding
from tgi_asgi.ops.recurrent_weights import DeltaRuleWeight, ShortConvWeight
from tgi_asgi.ops.states import StatePool
from tgi_asgi.ops.tensors import float_array


class DeltaNet:
    """A short convolution of queries, keys and values, followed by the gated delta rule.

    The arithmetic is that of `ops.short_conv` and `ops.delta_rule`: a token's bits do not depend on how its
    sequence was split into steps.

    Attributes:
        width: Columns of the result.
        num_steps: Columns of the heads' steps.
        num_channels, num_taps, num_floats: Sizes of the states, as in `StateShape`.
    """

    def __init__(self, conv: ShortConvWeight, rule: DeltaRuleWeight) -> None:
        self.num_channels, self.num_taps = conv.taps.shape
        self.num_floats = rule.num_floats
        self.width, self.num_steps = rule.width, 2 * rule.num_heads
        self.conv = _C.ShortConv(
            weight=layout.padded(conv.taps.T),
            bias=None if conv.bias is None else layout.padded(conv.bias),
            first_column=0, in_gate=None, out_gate=None, has_silu=True,
        )  # fmt: skip
        self.rule = _C.DeltaRule(
            num_heads=rule.num_heads, head_dim=rule.head_dim, num_key_heads=rule.num_key_heads,
            key_dim=rule.key_dim, is_tiled=rule.is_tiled, a=rule.a, dt_bias=rule.dt_bias,
        )  # fmt: skip


class StateRows:
    """Runs the recurrent layers of a model on the rows of a step.

        rows = StateRows(pool)
        rows.begin(batch)                            # once per step
        out = rows.delta_net(i, nets[i], qkv, steps)   # once per layer
        rows.commit()                                # the states of the step are valid from now on

    A step that fails before `commit` changes no state.
    """

    def __init__(self, pool: StatePool) -> None:
        self._native = _C.StateRows(pool.native)

    def begin(self, batch: _C.FlatRows) -> None:
        """Begin a step.

        Raises:
            ValueError: if a row begins with a state that does not exist.
        """
        self._native.begin(batch)

    def commit(self) -> None:
        """End a step whose layers have all been computed."""
        self._native.commit()

    def roll_back(self) -> None:
        """Void the last step after its `commit`."""
        self._native.roll_back()

    def discard(self, slot: int, num_tokens: int) -> None:
        """Discard the states of a slot after more than `num_tokens` tokens."""
        self._native.discard(slot, num_tokens)

    def delta_net(self, layer: int, net: DeltaNet, qkv: Tensor, steps: Tensor) -> Tensor:
        """Return the heads' results [n_tokens, width] of layer number `layer` of the pool.

        Args:
            qkv: [n_tokens, channels] float32, queries, keys and values before the convolution.
            steps: [n_tokens, 2 * num_heads] float32, the heads' rate steps, then their decay steps.

        Raises:
            ValueError: if no step has begun, or a shape does not fit.
            TypeError: if a tensor is not float32.
        """
        out = new_rows(qkv.shape[0], layout.round_up(net.width))
        self._native.delta_net(layer, net.conv, net.rule, float_array(qkv), float_array(steps), out.numpy())
        return without_padding(out, net.width)
