"""What a model keeps of a sequence beside paged keys and values: recurrent states, or a cache of its own.

One a slot, made when a sequence begins. Rows can run again: those of a step that failed, which leaves the
states as they were before it, and those of one that was in flight when it became void, behind one that failed
or behind a token that woke a grammar.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.generic.discover import NotProbed, run_with_cache

_KEPT = 2  # states of a slot, see `SlotStates`
_FLOAT_BYTES = 4
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
        states.forget()                                  # if it fails all the same

    Of each slot the last two states are kept: a step that is in flight may turn out to be void.

    Args:
        make: makes an empty cache.

    Attributes:
        num_steps: those that were done.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self.num_steps = 0
        self._make = make
        self._states: dict[int, list[SequenceState]] = {}  # by slot: at most two, the last one behind
        self._under_way: dict[int, list[SequenceState]] = {}
        self._done: tuple[int, ...] = ()  # slots of the last step

    def begin(self, slots: list[int], starts: list[int], lengths: list[int]) -> list[SequenceState]:
        """Return the states of a step's rows, which compute `lengths` tokens from positions `starts` on.

        Raises:
            RuntimeError: a row goes on where its state has not come to.
        """
        self._under_way = {}
        found = []
        for slot, start, length in zip(slots, starts, lengths, strict=True):
            known = [state for state in self._states.get(slot, ()) if start and state.num_tokens == start]
            if start and not known:
                raise RuntimeError(f"slot {slot} has no state of {start} tokens")
            self._states[slot] = known
            cache = _copy(known[0].cache) if known else self._make()
            state = SequenceState(cache, start + length)
            self._under_way[slot] = [*known, state]
            found.append(state)
        return found

    def commit(self) -> None:
        """Keep what the step made of the states."""
        self._states.update(self._under_way)
        self._done, self._under_way = tuple(self._under_way), {}
        self.num_steps += 1

    def forget(self) -> None:
        """Take back what the last step made: a step behind it must not go on from there."""
        for slot in self._done:
            self._states[slot].pop()
        self._done = ()


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


def state_bytes(model: Any, cache_name: str | None) -> int:
    """Return what the states of a sequence take, both of them, beside its keys and values; without weights.

    Raises:
        ModelLoadError: it cannot be found out.
    """
    if cache_name is None:
        return 0
    try:
        cache = run_with_cache(model, cache_name, lambda: empty_cache(model))
    except NotProbed as error:
        raise ModelLoadError(f"what a sequence's states take is not known: {error}") from None
    tensors = [
        tensor
        for value in vars(cache).values()
        if isinstance(value, list)
        for layer in value
        for tensor in tensors_of(layer)
    ]
    return _KEPT * _FLOAT_BYTES * sum(tensor.numel() for tensor in tensors)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a layer's state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(each)
    elif hasattr(value, "__dict__"):
        for name, each in vars(value).items():
            if name not in _REPLACED:
                yield from tensors_of(each)


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
