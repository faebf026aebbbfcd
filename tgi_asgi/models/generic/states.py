"""Sequence state other than paged keys and values: recurrent states, or a cache of the model's own.

There is one per slot, created when a sequence begins. Rows can run again in two cases. A failed step leaves
the states as they were before it. A step in flight can become void, because the step before it failed or
sampled a token that activates a grammar. Other sequences may resume from states that steps keep.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from tgi_asgi.errors import ModelLoadError
from tgi_asgi.models.generic.discover import run_with_cache
from tgi_asgi.models.generic.zeros import NotProbed

KEPT = 2  # states per slot, see `SlotStates`
FLOAT_BYTES = 4
# Tensors that each update replaces, and never writes into: one for each token.
_REPLACED = frozenset({"keys", "values", "indexer_keys", "indexer_position_ids"})
_CONTAINERS = (Tensor, list, tuple, dict)  # may change in place; others, such as configurations, are shared

Cache = TypeVar("Cache")


@dataclass(frozen=True, slots=True)
class RowSpan:
    """One sequence's part of a step.

    Attributes:
        slot: The sequence's slot.
        start, length: Position of its first token in the step, and number of its tokens there.
        resumes: The place of the kept state that it begins with; None: its slot's own.
        keeps: (position, place) of the states to keep, just before each position, in order.
    """

    slot: int
    start: int
    length: int
    resumes: int | None = None
    keeps: Sequence[tuple[int, int]] = ()


@dataclass(slots=True)
class SequenceState(Generic[Cache]):
    """One sequence's state.

    Attributes:
        cache: Object in which the model's code keeps it.
        num_tokens: Number of tokens that it has processed, once the step has.
        forks: (tokens of the step, cache) of the states to keep on the way; see `fork`.
    """

    cache: Cache
    num_tokens: int = 0
    forks: list[tuple[int, Cache]] = field(default_factory=list)


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


def fork(cache: Any) -> Any:
    """Return a copy of a cache whose layers are the same objects until `copy_layer` has copied them."""
    made = copy.copy(cache)
    for name, value in vars(cache).items():
        if isinstance(value, list | dict):
            setattr(made, name, copy.copy(value))
    return made


def copy_layer(cache: Any, forked: Any, layer: int) -> None:
    """Copy what a cache has of one layer to its fork: the entry `layer` of each of its lists and dicts."""
    _put_layer(cache, forked, layer, copy_cache)


def join_layer(caches: Sequence[Any], joined: Any, layer: int) -> None:
    """Put one layer's states of several sequences into `joined`, a fork of the first, as one batch."""
    rest = caches[1:]

    def join(name: str, value: Any) -> Any:
        return _batch([value, *(vars(cache)[name][layer] for cache in rest)])

    for name, value in vars(caches[0]).items():
        if _has_layer(value, layer):
            getattr(joined, name)[layer] = join(name, value[layer])


def part_layer(joined: Any, caches: Sequence[Any], layer: int) -> None:
    """Put the sequences' parts of a layer of `joined` into their own caches, as copies."""
    for index, cache in enumerate(caches):
        _put_layer(joined, cache, layer, partial(_copied_row, index=index))


def _put_layer(cache: Any, other: Any, layer: int, change: Callable[[Any], Any]) -> None:
    for name, value in vars(cache).items():
        mine = getattr(other, name, None)
        if _has_layer(value, layer) and isinstance(mine, list | dict):
            if isinstance(mine, list):
                mine.extend(value[len(mine) :])
            mine[layer] = change(value[layer])
        elif not isinstance(value, _CONTAINERS):
            setattr(other, name, value)  # such as whether there is a state


def _has_layer(value: Any, layer: int) -> bool:
    return layer < len(value) if isinstance(value, list) else isinstance(value, dict) and layer in value


def _batch(values: Sequence[Any]) -> Any:
    """Return the states of several sequences as one batch; values other than tensors are the same in all."""
    return _changed(values, torch.cat)


def _copied_row(value: Any, index: int) -> Any:
    """Return one sequence's part of joined states; a copy, so that it does not hold the others' memory."""
    return _changed([value], lambda tensors: tensors[0][index : index + 1].clone())


def _changed(values: Sequence[Any], change: Callable[[list[Tensor]], Tensor]) -> Any:
    """Return a copy of the first value with all tensors changed; `change` gets those of all values."""
    first = values[0]
    if isinstance(first, Tensor):
        return change(list(values))
    if isinstance(first, dict):
        made = copy.copy(first)
        made.update((name, _changed([value[name] for value in values], change)) for name in first)
        return made
    if isinstance(first, list | tuple):
        return type(first)([_changed(each, change) for each in zip(*values, strict=True)])
    if not hasattr(first, "__dict__") or isinstance(first, type):
        return first
    made = copy.copy(first)
    for name, value in vars(first).items():
        if name not in _REPLACED and isinstance(value, _CONTAINERS):
            setattr(made, name, _changed([vars(each)[name] for each in values], change))
    return made


class SlotStates(Generic[Cache]):
    """The states of the running sequences, and those that are kept for others.

        of_rows = states.begin(spans, forked=[1, 2])   # may be modified
        states.commit()                                # once the step is done
        states.forget()                                # if it fails after all

    The last two states of each slot are kept, because a step in flight may become void. A state that is kept
    for others is not copied: each step copies those that it begins with.

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
        self._kept: dict[int, SequenceState[Cache]] = {}  # by place
        self._to_keep: dict[int, SequenceState[Cache]] = {}  # by the step in progress

    def begin(self, spans: Iterable[RowSpan], forked: Container[int] = ()) -> list[SequenceState[Cache]]:
        """Return the states of a step's rows; those before their first tokens are known.

        Args:
            forked: Indices of the rows whose layers the step replaces instead of changing them, see `fork`.

        Raises:
            RuntimeError: if a row continues at a position for which there is no state.
        """
        self._in_progress, self._to_keep = {}, {}
        found = []
        for index, span in enumerate(spans):
            known = [state for state in self._before(span) if span.start and state.num_tokens == span.start]
            if span.start and not known:
                where = f"slot {span.slot}" if span.resumes is None else f"place {span.resumes}"
                raise RuntimeError(f"{where} has no state of {span.start} tokens")
            self._states[span.slot] = known
            copy_of = fork if index in forked else self._copy
            cache = copy_of(known[0].cache) if known else self._make()
            state = SequenceState(cache, span.start + span.length)
            kept = {span.start: known[0].cache} if known else {}  # by position: a state may have two places
            for position, place in span.keeps:
                if position not in kept:
                    kept[position] = fork(cache)
                    state.forks.append((position - span.start, kept[position]))
                self._to_keep[place] = SequenceState(kept[position], position)
            self._in_progress[span.slot] = [*known, state]
            found.append(state)
        return found

    def _before(self, span: RowSpan) -> Iterable[SequenceState[Cache]]:
        if span.resumes is None:
            return self._states.get(span.slot, ())
        return [self._kept[span.resumes]] if span.resumes in self._kept else ()

    def of_others(self) -> Iterator[Cache]:
        """Yield what slots keep that are not in the step that has begun; their sequences may have ended."""
        for slot, states in self._states.items():
            if slot not in self._in_progress:
                yield from (state.cache for state in states)

    def commit(self) -> None:
        """Keep the states that the step has computed."""
        for *_, state in self._in_progress.values():
            state.forks.clear()
        self._states.update(self._in_progress)
        self._done, self._in_progress = tuple(self._in_progress), {}
        self._kept.update(self._to_keep)
        self._to_keep = {}
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
    """Return the bytes of a sequence's state, without its keys and values; needs no weights.

    Raises:
        ModelLoadError: if the size cannot be determined.
    """
    if cache_name is None:
        return 0
    try:
        cache = run_with_cache(model, cache_name, lambda: empty_cache(model))
    except NotProbed as error:
        raise ModelLoadError(f"the size of a sequence's states cannot be determined: {error}") from None
    return FLOAT_BYTES * sum(tensor.numel() for tensor in tensors_of(cache))


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
