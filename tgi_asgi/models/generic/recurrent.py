"""Recurrent layers, run sequence by sequence: their code accepts one sequence's cache, a step has many.

They are found by the cache methods that their source calls. The innermost module that keeps a state is called
once per sequence, with that sequence's tokens and cache, and the results are concatenated. If a state within
these tokens is to be kept, the module is called for the tokens before it first. Sequences with one token each
are one call, a batch whose states are joined:

    step         a a a a a b b b c d         letters: sequences
    calls        a a a | a a, b b b, (c d)   |: the state after a's third token is copied here, layer by layer
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tgi_asgi.errors import check
from tgi_asgi.models.generic.module_caches import copy_layer, fork, join_layer, part_layer
from tgi_asgi.models.generic.source_code import class_source
from tgi_asgi.models.generic.states import RowSpan, SequenceState

_STATE = re.compile(r"\b(update_conv_state|update_recurrent_state|get_linear_cache)\(|\bself\.conv1d_state\b")
_SINGLE_STEP = "mamba2_selective_state_update"
_OTHERS = 1 << 20  # layers of a cache that `keep_states_in_caches` adds: no list of `transformers` has them
_CACHE_NAMES = ("cache", "cache_params", "past_key_values", "past_key_value")


def keep_states_in_caches(model: nn.Module) -> None:
    """Let RecurrentGemma's layers keep states in a sequence's cache: their code keeps one, in the layer."""
    modules: list[Any] = list(model.modules())
    for index, module in enumerate(modules):
        if type(module).__name__ == "RecurrentGemmaRecurrentBlock":
            module.layer_idx = _OTHERS + index
            module.hidden_size = module.lru_width  # read only for a new convolution's state, of this width
            module.forward = functools.partial(_with_state_of, module, module.forward, module.layer_idx)


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
        limits = getattr(module, "time_step_limit", None)
        limits = (0.0, math.inf) if limits is None else tuple(limits)
        check(len(limits) == 2, f"time_step_limit must be two numbers, got {limits}")
        low, high = limits
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
    """Compute one token with the time step that the scan would compute."""
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


def can_fork(modules: Sequence[nn.Module]) -> bool:
    """Return whether states can be kept within a row: each module says which layer of a cache is its own."""
    return all(type(getattr(module, "layer_idx", None)) is int for module in modules)


class _Recurrent:
    """A recurrent module's own code."""

    def __init__(self, module: Any) -> None:
        self.forward: Callable[..., Any] = module.forward
        self.names = list(inspect.signature(module.forward).parameters)
        self.layer: int = getattr(module, "layer_idx", -1)  # read only if the module has one
        self._cache_name = next(name for name in _CACHE_NAMES if name in self.names)

    def call(self, given: dict[str, Any], cache: Any) -> Any:
        """Call the module with this cache."""
        return self.forward(**{**given, self._cache_name: cache})


class RecurrentLayers:
    """Wraps the recurrent modules of a model; `begin` sets the next step's sequences.

    Attributes:
        continues_by_token: Whether tokens that continue from a state are run one at a time.
        joins_tokens: Whether sequences with one token each are run together.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._spans: Sequence[RowSpan] = ()
        self._states: Sequence[SequenceState[Any]] = ()
        self._together: dict[int, int] = {}  # by sequence that is run with others: its row of that batch
        self._is_active = False
        self.continues_by_token = False
        self.joins_tokens = can_fork(modules)
        for module in modules:
            module.forward = functools.partial(self._run, _Recurrent(module))

    def together(self, spans: Sequence[RowSpan]) -> list[int]:
        """Return the indices of the sequences that are run together; their states must be forks."""
        found = [index for index, span in enumerate(spans) if span.length == 1 and span.start]
        return found if self.joins_tokens and len(found) > 1 else []

    def begin(self, spans: Sequence[RowSpan], states: Sequence[SequenceState[Any]]) -> None:
        """Set the sequences of the following calls."""
        self._spans, self._states = spans, states
        self._together = {index: row for row, index in enumerate(self.together(spans))}
        self._is_active = True

    def end(self) -> None:
        """Let calls pass to the modules unchanged."""
        self._is_active = False
        self._states = ()

    def _run(self, module: _Recurrent, *args: Any, **kwargs: Any) -> Any:
        if not self._is_active:
            return module.forward(*args, **kwargs)
        given = {**dict(zip(module.names, args, strict=False)), **kwargs}
        total = sum(span.length for span in self._spans)
        joined = self._run_together(module, given, total)
        if len(self._together) == total:
            return _map(joined, lambda value: value.transpose(0, 1))
        parts: list[Any] = []
        first = 0
        for index, (span, state) in enumerate(zip(self._spans, self._states, strict=True)):
            if index in self._together:
                parts.append(_map(joined, functools.partial(_of_sequence, row=self._together[index])))
                first += 1
                continue
            for count, forked in self._calls(span, state):
                mine = {name: _cut(value, total, first, count) for name, value in given.items()}
                parts.append(module.call(mine, state.cache))
                if forked is not None:
                    copy_layer(state.cache, forked, module.layer)
                first += count
        return _join(parts, total)

    def _calls(self, span: RowSpan, state: SequenceState[Any]) -> Iterator[tuple[int, Any]]:
        """Yield the tokens of each call for a sequence, and what to copy the state to after it, or None."""
        forks = dict(state.forks)
        for start, stop in itertools.pairwise([0, *forks, span.length]):
            by_token = self.continues_by_token and span.start + start > 0
            counts = [1] * (stop - start) if by_token else [stop - start]
            for count in counts[:-1]:
                yield count, None
            yield counts[-1], forks.get(stop)

    def _run_together(self, module: _Recurrent, given: Mapping[str, Any], total: int) -> Any:
        """Return the output [n_sequences, 1, ...] for those with one token each; None without any."""
        if not self._together:
            return None
        firsts = list(itertools.accumulate((span.length for span in self._spans), initial=0))
        at = [firsts[index] for index in self._together]
        caches = [self._states[index].cache for index in self._together]
        joined = fork(caches[0])
        join_layer(caches, joined, module.layer)
        mine = {name: _picked(value, total, at) for name, value in given.items()}
        output = module.call(mine, joined)
        part_layer(joined, caches, module.layer)
        return output


def _picked(value: Any, total: int, at: list[int]) -> Any:
    """Return tokens `at` of values whose second dimension is all tokens, as a batch of one token each."""
    if isinstance(value, tuple):
        return tuple(_picked(each, total, at) for each in value)
    if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == total:
        return value[:, at].transpose(0, 1)
    return value


def _of_sequence(value: Tensor, row: int) -> Tensor:
    return value[row : row + 1]


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return an output with its tensors changed."""
    if isinstance(value, tuple):
        return tuple(_map(each, change) for each in value)
    return change(value) if isinstance(value, Tensor) else value


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
