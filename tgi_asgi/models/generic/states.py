"""Sequence state other than paged keys and values: recurrent states, or a cache of the model's own.

There is one per slot, created when a sequence begins. Rows can run again in two cases. A failed step leaves
the states as they were before it. A step in flight can become void, because the step before it failed or
sampled a token that activates a grammar.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.generic.discover import NotProbed, run_with_cache

KEPT = 2  # states per slot, see `SlotStates`
FLOAT_BYTES = 4
# Tensors that each update replaces, and never writes into: one for each token.
_REPLACED = frozenset({"keys", "values", "indexer_keys", "indexer_position_ids"})
_CONTAINERS = (Tensor, list, tuple, dict)  # may change in place; others, such as configurations, are shared

Cache = TypeVar("Cache")


@dataclass(slots=True)
class SequenceState(Generic[Cache]):
    """One sequence's state.

    Attributes:
        cache: Object in which the model's code keeps it.
        num_tokens: Number of tokens that it has processed.
    """

    cache: Cache
    num_tokens: int = 0


def copy_cache(cache: Any) -> Any:
    """Return a copy of a cache that may change in place without affecting it; keys and values are shared."""
    if isinstance(cache, Tensor):
        return cache.clone()
    if isinstance(cache, dict):
        made = copy.copy(cache)
        made.update((name, copy_cache(value)) for name, value in cache.items())
        return made
    if isinstance(cache, list | tuple):
        return type(cache)([copy_cache(value) for value in cache])
    if not hasattr(cache, "__dict__") or isinstance(cache, type):
        return copy.deepcopy(cache)
    made = copy.copy(cache)
    for name, value in vars(cache).items():
        if name not in _REPLACED and isinstance(value, _CONTAINERS):
            setattr(made, name, copy_cache(value))
    return made


class SlotStates(Generic[Cache]):
    """The states of the running sequences.

        of_rows = states.begin(slots, starts, lengths)   # may be modified
        states.commit()                                  # once the step is done
        states.forget()                                  # if it fails after all

    The last two states of each slot are kept, because a step in flight may become void.

    Args:
        make: Function that makes an empty cache.
        copy: Function that returns a copy of a cache, which may change without affecting the original.

    Attributes:
        num_steps: Number of committed steps.
    """

    def __init__(self, make: Callable[[], Cache], copy: Callable[[Cache], Cache] = copy_cache) -> None:
        self.num_steps = 0
        self._make, self._copy = make, copy
        self._states: dict[int, list[SequenceState[Cache]]] = {}  # by slot: at most two, the latest last
        self._in_progress: dict[int, list[SequenceState[Cache]]] = {}
        self._done: tuple[int, ...] = ()  # slots of the last step

    def begin(self, slots: list[int], starts: list[int], lengths: list[int]) -> list[SequenceState[Cache]]:
        """Return the states of a step's rows, which compute `lengths` tokens from positions `starts` on.

        Raises:
            RuntimeError: if a row continues at a position for which there is no state.
        """
        self._in_progress = {}
        found = []
        for slot, start, length in zip(slots, starts, lengths, strict=True):
            known = [state for state in self._states.get(slot, ()) if start and state.num_tokens == start]
            if start and not known:
                raise RuntimeError(f"slot {slot} has no state of {start} tokens")
            self._states[slot] = known
            cache = self._copy(known[0].cache) if known else self._make()
            state = SequenceState(cache, start + length)
            self._in_progress[slot] = [*known, state]
            found.append(state)
        return found

    def of_others(self) -> Iterator[Cache]:
        """Yield what slots keep that are not in the step that has begun; their sequences may have ended."""
        for slot, states in self._states.items():
            if slot not in self._in_progress:
                yield from (state.cache for state in states)

    def commit(self) -> None:
        """Keep the states that the step has computed."""
        self._states.update(self._in_progress)
        self._done, self._in_progress = tuple(self._in_progress), {}
        self.num_steps += 1

    def forget(self) -> None:
        """Discard the states of the last step, so that no later step continues from them."""
        for slot in self._done:
            self._states[slot].pop()
        self._done = ()

    def discard(self, slot: int, num_tokens: int) -> None:
        """Discard the states of a slot after more than `num_tokens` tokens."""
        known = self._states.get(slot, [])
        known[:] = [state for state in known if state.num_tokens <= num_tokens]


def state_bytes(model: Any, cache_name: str | None) -> int:
    """Return the bytes of both states of a sequence, without its keys and values; needs no weights.

    Raises:
        ModelLoadError: if the size cannot be determined.
    """
    if cache_name is None:
        return 0
    try:
        cache = run_with_cache(model, cache_name, lambda: empty_cache(model))
    except NotProbed as error:
        raise ModelLoadError(f"the size of a sequence's states cannot be determined: {error}") from None
    return KEPT * FLOAT_BYTES * sum(tensor.numel() for tensor in tensors_of(cache))


def tensors_of(cache: Any, *, with_tokens: bool = False) -> Iterator[Tensor]:
    """Yield the tensors of a cache: its states, and with `with_tokens` also what it keeps of each token."""
    if isinstance(cache, Tensor):
        yield cache
    elif isinstance(cache, list | tuple | dict):
        for value in cache.values() if isinstance(cache, dict) else cache:
            yield from tensors_of(value, with_tokens=with_tokens)
    elif hasattr(cache, "__dict__") and not isinstance(cache, type):
        for name, value in vars(cache).items():
            if isinstance(value, _CONTAINERS) and (with_tokens or name not in _REPLACED):
                yield from tensors_of(value, with_tokens=with_tokens)


def empty_cache(model: Any) -> Any:
    """Return an empty cache for one sequence, of the model's own class if it has one (MiniMax)."""
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
