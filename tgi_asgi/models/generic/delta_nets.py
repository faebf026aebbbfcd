"""Gated delta nets of Qwen 3.5 on the native kernels, with native states.

Their own code computes sequences on one thread, and passes over each state several times. The module's
products and norm are used as they are; the convolution and the rule between them are native. The self-check
compares the result with the module's own code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tgi_asgi import ops
from tgi_asgi.models.decays import decays_of
from tgi_asgi.ops.state_rows import DeltaNet, StateRows

_NAMES = (
    "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "conv1d", "dt_bias", "A_log", "norm", "out_proj",
    "num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "activation",
)  # fmt: skip
_MAX_KEY_DIM = 256
_TAPS = range(2, 17)


class DeltaNets:
    """Wraps the recurrent modules of a model, all of which are delta nets.

    Attributes:
        nets: The native part of each module, in order.
    """

    def __init__(self, modules: Sequence[Any]) -> None:
        self.nets = [_native(module) for module in modules]
        self._rows: StateRows | None = None
        for index, module in enumerate(modules):
            module.forward = functools.partial(self._run, index, module, module.forward)

    def begin(self, rows: StateRows) -> None:
        """Compute the following calls on the step that `rows` has begun."""
        self._rows = rows

    def end(self) -> None:
        """Let calls pass to the modules' own code."""
        self._rows = None

    def _run(
        self, index: int, module: Any, forward: Callable[..., Any], hidden_states: Tensor, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        if self._rows is None:
            return forward(hidden_states, *args, **kwargs)
        products = (module.in_proj_qkv, module.in_proj_z, module.in_proj_b, module.in_proj_a)
        qkv, gates, rates, decays = (product(hidden_states)[0] for product in products)
        heads = self._rows.delta_net(index, self.nets[index], qkv, torch.cat((rates, decays), -1))
        size = (-1, module.head_v_dim)
        normed = module.norm(heads.reshape(size), gates.reshape(size))
        return module.out_proj(normed.reshape(1, len(heads), -1))


class NativeStates:
    """The states of running sequences, and kept ones; see `SlotStates`.

    Attributes:
        num_steps: Number of committed steps.
    """

    def __init__(self, layers: DeltaNets, *, num_slots: int, num_kept: int) -> None:
        self.num_steps = 0
        self._layers = layers
        self._rows = StateRows(ops.StatePool(layers.nets, num_slots=num_slots, num_kept=num_kept))

    def begin(self, batch: ops.FlatRows) -> None:
        """Begin a step.

        Raises:
            ValueError: if a row continues at a position for which there is no state.
        """
        self._rows.begin(batch)
        self._layers.begin(self._rows)

    def end(self) -> None:
        """Let calls pass to the modules' own code."""
        self._layers.end()

    def commit(self) -> None:
        """Keep the states that the step has computed."""
        self._rows.commit()
        self.num_steps += 1

    def forget(self) -> None:
        """Discard the states of the last step, so that no later step continues from them."""
        self._rows.roll_back()

    def discard(self, slot: int, num_tokens: int) -> None:
        """Discard the states of a slot after more than `num_tokens` tokens."""
        self._rows.discard(slot, num_tokens)


def are_delta_nets(modules: Sequence[nn.Module]) -> bool:
    """Return whether all modules have the parts of a delta net, in sizes that the kernels support."""
    return bool(modules) and all(map(_is_delta_net, modules))


def _is_delta_net(module: Any) -> bool:
    if not all(hasattr(module, name) for name in _NAMES):
        return False
    heads, key_heads = module.num_v_heads, module.num_k_heads
    width, key_width = heads * module.head_v_dim, key_heads * module.head_k_dim
    channels, _, taps = module.conv1d.weight.shape
    return (
        module.activation == "silu"
        and module.conv1d.bias is None
        and channels == width + 2 * key_width
        and taps in _TAPS
        and heads % key_heads == 0
        and module.head_v_dim % 16 == 0
        and module.head_k_dim <= _MAX_KEY_DIM
    )


def _native(module: Any) -> DeltaNet:
    def array(tensor: Tensor) -> Any:
        return np.ascontiguousarray(tensor.detach().float().numpy())

    rule = ops.DeltaRuleWeight(
        module.num_v_heads, module.head_v_dim, module.num_k_heads, module.head_k_dim,
        a=decays_of(array(module.A_log)), dt_bias=array(module.dt_bias),
    )  # fmt: skip
    return DeltaNet(ops.ShortConvWeight(array(module.conv1d.weight[:, 0])), rule)
