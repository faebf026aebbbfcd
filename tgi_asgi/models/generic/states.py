"""Sequence state other than paged keys and values: recurrent states, or a cache of the model's own.

There is one per slot, created when a sequence begins. Rows can run again in two cases. A failed step leaves
the states as they were before it. A step in flight can become void, because the step before it failed or
sampled a token that activates a grammar. Other sequences may resume from states that steps keep.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tgi_asgi.models.generic.module_caches import copy_cache, fork

KEPT = 2  # states per slot, see `SlotStates`

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
