"""Recurrent layers, run sequence by sequence: their code accepts one sequence's cache, a step has many.

They are found by the cache methods that their source calls. The innermost module that keeps a state is called
once per sequence, with that sequence's tokens and cache, and the results are concatenated.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tgi_asgi.models.generic.source_code import class_source
from tgi_asgi.models.generic.states import SequenceState

_STATE = re.compile(r"\b(update_conv_state|update_recurrent_state|get_linear_cache)\(|\bself\.conv1d_state\b")
_SINGLE_STEP = "mamba2_selective_state_update"
_CACHE_NAMES = ("cache", "cache_params", "past_key_values", "past_key_value")


def keep_states_in_caches(model: nn.Module) -> None:
    """Let RecurrentGemma's layers keep states in a sequence's cache: their code keeps one, in the layer."""
    for index, module in enumerate(model.modules()):
        if type(module).__name__ == "RecurrentGemmaRecurrentBlock":
            module.forward = functools.partial(_with_state_of, module, module.forward, index)


def _with_state_of(
    block: Any, forward: Callable[..., Any], index: int, input_states: Tensor, position_ids: Tensor,
    attention_mask: Any, use_cache: bool = False, cache: Any = None, past_key_values: Any = None, **_: Any,
) -> Any:  # fmt: skip
    cache = past_key_values if cache is None else cache  # the name before transformers 5.24
    if cache is None:
        return forward(input_states, position_ids, attention_mask, use_cache=False)
    states = vars(cache).setdefault("states_of_modules", {})
    block.conv1d_state, block.rg_lru.recurrent_states = states.get(index, (None, None))
    output = forward(input_states, position_ids, attention_mask, use_cache=True)
    states[index] = block.conv1d_state, block.rg_lru.recurrent_states
    return output


def clamp_single_steps(model: nn.Module) -> None:
    """Let Mamba 2's code clamp the time step of a single token, too: it does so only where it scans several.

    A module gets a `forward` with a function of its own in place of the one that steps, because the limits
    are the module's, and the function has no argument for them.
    """
    for module in model.modules():
        low, high = getattr(module, "time_step_limit", None) or (0.0, math.inf)
        forward: Any = inspect.unwrap(type(module).forward)
        step = getattr(forward, "__globals__", {}).get(_SINGLE_STEP)
        if step is None or (low, high) == (0.0, math.inf):
            continue
        around = {**forward.__globals__, _SINGLE_STEP: functools.partial(_clamped, step, low, high)}
        own = types.FunctionType(
            forward.__code__, around, forward.__name__, forward.__defaults__, forward.__closure__
        )
        module.forward = types.MethodType(own, module)


def _clamped(
    step: Callable[..., Tensor], low: float, high: float, state: Tensor, hidden_states: Tensor, dt: Tensor,
    *args: Any, dt_bias: Tensor, dt_softplus: bool, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Take the step of one token, of which the scan would compute the same time step."""
    assert dt_softplus
    dt = torch.nn.functional.softplus(dt + dt_bias.to(dt.dtype)).clamp(low, high)
    return step(state, hidden_states, dt, *args, dt_bias=None, dt_softplus=False, **kwargs)


def recurrent_modules(model: nn.Module) -> list[nn.Module]:
    """Return the innermost modules that keep sequence state other than keys and values."""
    modules: list[tuple[nn.Module, Any]] = [(module, type(module)) for module in model.modules()]
    found = [module for module, kind in modules if _STATE.search(class_source(kind))]
    return [
        module
        for module in found
        if not any(other is not module and other in found for other in module.modules())
    ]


class RecurrentLayers:
    """Wraps the recurrent modules of a model; `begin` sets the next step's sequences.

    Attributes:
        continues_by_token: Whether tokens that continue from a state are run one at a time.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._lengths: list[int] = []
        self._starts: list[int] = []
        self._states: list[SequenceState[Any]] = []
        self._is_active = False
        self.continues_by_token = False
        for module in modules:
            forward = module.forward
            module.forward = functools.partial(self._run, module, forward)

    def begin(self, starts: list[int], lengths: list[int], states: list[SequenceState[Any]]) -> None:
        """Set the sequences of the following calls."""
        self._starts, self._lengths, self._states = starts, lengths, states
        self._is_active = True

    def end(self) -> None:
        """Let calls pass to the modules unchanged."""
        self._is_active = False
        self._states = []

    def _run(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._is_active:
            return forward(*args, **kwargs)
        names = list(inspect.signature(forward).parameters)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        cache_name = next(name for name in _CACHE_NAMES if name in names)
        total = sum(self._lengths)
        parts, first = [], 0
        for start, length, state in zip(self._starts, self._lengths, self._states, strict=True):
            steps = [1] * length if start and self.continues_by_token else [length]
            for count in steps:
                mine = {name: _cut(value, total, first, count) for name, value in given.items()}
                mine[cache_name] = state.cache
                parts.append(forward(**mine))
                first += count
        return _join(parts, total)


def _cut(value: Any, total: int, first: int, count: int) -> Any:
    """Return tokens [first, first + count) of values whose second dimension is all tokens."""
    if isinstance(value, tuple):
        return tuple(_cut(each, total, first, count) for each in value)
    if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == total:
        return value[:, first : first + count]
    return value


def _join(parts: list[Any], total: int) -> Any:
    first = parts[0]
    if isinstance(first, tuple):
        return tuple(_join([part[index] for part in parts], total) for index in range(len(first)))
    if not isinstance(first, Tensor):
        return first
    for dim in (1, 2, 0):
        if dim < first.dim() and sum(part.shape[dim] for part in parts) == total:
            return torch.cat(parts, dim)
    return parts[-1]  # a state, which no other code reads
