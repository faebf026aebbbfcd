"""The states of recurrent layers as `FakeRunner` has them: a state is the tokens that it is of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tgi_asgi.runner.plan import StepPlan, StepRow

_State = tuple[list[int], Any]  # the tokens that it is of, and the adapter


class FakeStates:
    """Two halves of states a slot, and places where some are kept.

    Args:
        extent: says of a row its sequence with what it guesses, and from where to where it computes that.
        require: is told what must hold, and what it is where it does not.
    """

    def __init__(
        self,
        num_kept: int,
        extent: Callable[[StepRow], tuple[list[int], int, int]],
        require: Callable[[bool, str], None],
    ) -> None:
        self._extent, self._require = extent, require
        self._of_slots: dict[int, tuple[list[_State], list[_State]]] = {}  # the last row's come second
        self._kept: list[_State | None] = [None] * num_kept

    def check_places(self, plan: StepPlan) -> None:
        """Require that a place is there, and has to do with one row."""
        moves = [row.states for row in plan.rows if row.states is not None]
        kept = [place for each in moves for _, place in each.keeps]
        resumed = {each.resumes for each in moves if each.resumes is not None}
        self._require(len(set(kept)) == len(kept) and not resumed & set(kept), "a place is not one row's")
        are_there = all(0 <= place < len(self._kept) for place in resumed | set(kept))
        self._require(are_there, "no such place")

    def move(self, plan: StepPlan, *, is_tainted: bool) -> None:
        """Take rows' states from place to place; a step begins nothing where one is missing.

        Of one that is tainted, for it has failed or was queued behind one that has, no state is left.
        """
        moves: list[tuple[StepRow, list[_State], list[_State]]] = []
        for row in plan.rows:
            tokens, begin, end = self._extent(row)
            if begin == end:
                continue  # its sequence has all its tokens
            before, source = self._source(row, begin)
            is_there = begin == 0 or source == (tokens[:begin], row.adapter)
            if is_tainted and not is_there:
                return
            self._require(is_there, f"slot {row.slot} has not its state at {begin}")
            ends = [end] if row.token_ids is not None else range(begin + 1, end + 1)
            after = [] if is_tainted else [(tokens[:at], row.adapter) for at in ends]
            moves.append((row, [state for state in before if len(state[0]) <= begin], after))
            last = max(begin, 1)
            for at, _ in row.states.keeps if row.states is not None else ():
                self._require(last <= at < end, "states are not kept in order")
                self._require(row.stop is None or at == begin == row.start, "a state is kept among drafts")
                last = at
        for row, before, after in moves:
            self._of_slots[row.slot] = (before, after)
            for at, place in row.states.keeps if row.states is not None else ():
                tokens, _, _ = self._extent(row)
                self._kept[place] = None if is_tainted else (tokens[:at], row.adapter)

    def _source(self, row: StepRow, begin: int) -> tuple[list[_State], _State | None]:
        """Return the half of its slot's states that a row's is in, and that state."""
        if row.states is not None and row.states.resumes is not None:
            return [], self._kept[row.states.resumes]
        older, newer = self._of_slots.get(row.slot, ([], []))
        for half in (newer, older) if begin else ():
            for state in half:
                if len(state[0]) == begin:
                    return half, state
        return [], None
