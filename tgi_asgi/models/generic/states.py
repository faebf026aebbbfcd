"""What a model keeps of a sequence beside paged keys and values: recurrent states, or a cache of its own.

One a slot, made when a sequence begins. A step that fails leaves the states as they were before it, so
that its rows can run again.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_REPLACED = frozenset({"keys", "values"})  # what an update makes anew: it never writes into them


@dataclass(slots=True)
class SequenceState:
    """A sequence's own state.

    Attributes:
        cache: what the model's code keeps it in.
        num_tokens: those that it has seen.
    """

    cache: Any
    num_tokens: int = 0


class SlotStates:
    """The states of the sequences that run.

        of_rows = states.begin(slots, starts, lengths)   # they may be changed
        states.commit()                                  # once the step is done

    Args:
        make: makes an empty cache.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._states: dict[int, SequenceState] = {}
        self._under_way: dict[int, SequenceState] = {}

    def begin(self, slots: list[int], starts: list[int], lengths: list[int]) -> list[SequenceState]:
        """Return the states of a step's rows, which compute `lengths` tokens from positions `starts` on.

        Raises:
            RuntimeError: a row goes on where its state has not come to.
        """
        self._under_way = {}
        found = []
        for slot, start, length in zip(slots, starts, lengths, strict=True):
            state = SequenceState(self._make()) if start == 0 else self._states.get(slot)
            if state is None or state.num_tokens != start:
                raise RuntimeError(f"slot {slot} has no state of {start} tokens")
            state = SequenceState(_copy(state.cache) if start else state.cache, start + length)
            self._under_way[slot] = state
            found.append(state)
        return found

    def commit(self) -> None:
        """Keep what the step made of the states."""
        self._states.update(self._under_way)
        self._under_way = {}


def _copy(cache: Any) -> Any:
    """Return a cache that may change in place without the other; keys and values are shared."""
    made = copy.copy(cache)
    for name, value in vars(cache).items():
        if isinstance(value, list):
            value = [_copy_layer(each) for each in value]
        setattr(made, name, value)
    return made


def _copy_layer(layer: Any) -> Any:
    if isinstance(layer, Tensor):
        return layer.clone()
    if not hasattr(layer, "__dict__"):
        return copy.deepcopy(layer)
    made = copy.copy(layer)
    for name, value in vars(layer).items():
        if name not in _REPLACED and isinstance(value, (Tensor, list, dict)):
            setattr(made, name, copy.deepcopy(value))
    return made


def empty_cache(model: Any) -> Any:
    """Return an empty cache of one sequence: of the model's own class where it has one (MiniMax)."""
    from transformers import DynamicCache

    written_in = sys.modules[type(model).__module__]
    for value in vars(written_in).values():
        if (
            isinstance(value, type)
            and issubclass(value, DynamicCache)
            and value.__module__ == written_in.__name__
        ):
            return value()
    return DynamicCache(config=model.config.get_text_config(decoder=True))
