"""Recurrent layers, run sequence by sequence: their code accepts one sequence's cache, a step has many.

They are found by the cache methods that their source calls. The innermost module that keeps a state is called
once per sequence, with that sequence's tokens and cache, and the results are concatenated. If a state within
these tokens is to be kept, the module is called for the tokens before it first:

    step         a a a a a b b b c         letters: sequences
    calls        a a a | a a, b b b, c     |: the state after a's third token is copied here, layer by layer
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tgi_asgi.models.generic.source_code import class_source
from tgi_asgi.models.generic.states import RowSpan, SequenceState, copy_layer

_STATE = re.compile(r"\b(update_conv_state|update_recurrent_state|get_linear_cache)\(|\bself\.conv1d_state\b")
_CACHE_NAMES = ("cache", "cache_params", "past_key_values", "past_key_value")


def keep_states_in_caches(model: nn.Module) -> None:
    """Let RecurrentGemma's layers keep states in a sequence's cache: their code keeps one, in the layer."""
    modules: list[Any] = list(model.modules())
    for index, module in enumerate(modules):
        if type(module).__name__ == "RecurrentGemmaRecurrentBlock":
            module.layer_idx = index
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


class RecurrentLayers:
    """Wraps the recurrent modules of a model; `begin` sets the next step's sequences.

    Attributes:
        continues_by_token: Whether tokens that continue from a state are run one at a time.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._spans: Sequence[RowSpan] = ()
        self._states: Sequence[SequenceState[Any]] = ()
        self._is_active = False
        self.continues_by_token = False
        for module in modules:
            forward = module.forward
            module.forward = functools.partial(self._run, module, forward)

    def begin(self, spans: Sequence[RowSpan], states: Sequence[SequenceState[Any]]) -> None:
        """Set the sequences of the following calls."""
        self._spans, self._states = spans, states
        self._is_active = True

    def end(self) -> None:
        """Let calls pass to the modules unchanged."""
        self._is_active = False
        self._states = ()

    def _run(self, module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._is_active:
            return forward(*args, **kwargs)
        names = list(inspect.signature(forward).parameters)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        cache_name = next(name for name in _CACHE_NAMES if name in names)
        total = sum(span.length for span in self._spans)
        parts, first = [], 0
        for span, state in zip(self._spans, self._states, strict=True):
            forks = dict(state.forks)
            for start, stop in itertools.pairwise([0, *forks, span.length]):
                continues = span.start + start > 0
                steps = [1] * (stop - start) if continues and self.continues_by_token else [stop - start]
                for count in steps:
                    mine = {name: _cut(value, total, first, count) for name, value in given.items()}
                    mine[cache_name] = state.cache
                    parts.append(forward(**mine))
                    first += count
                if stop in forks:
                    copy_layer(state.cache, forks[stop], module.layer_idx)
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
