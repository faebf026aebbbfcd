"""The recurrent-layer states of `FakeRunner`: a state is the list of tokens that it covers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tgi_asgi.runner.plan import StepPlan, StepRow

_State = tuple[list[int], Any]  # the tokens it covers, and the adapter


class FakeStates:
    """Two halves of states for each slot, and places for kept states.

    Args:
        extent: Callback that returns a row's sequence with its drafts, and the start and end of what it
            computes.
        require: Callback given a condition that must hold and the message if it does not.
    """

    def __init__(
        self,
        num_kept: int,
        extent: Callable[[StepRow], tuple[list[int], int, int]],
        require: Callable[[bool, str], None],
    ) -> None:
        self._extent, self._require = extent, require
        self._of_slots: dict[int, tuple[list[_State], list[_State]]] = {}  # second: the last row's
        self._kept: list[_State | None] = [None] * num_kept

    def check_places(self, plan: StepPlan) -> None:
        """Require that every place exists and belongs to one row only."""
        moves = [row.states for row in plan.rows if row.states is not None]
        kept = [place for each in moves for _, place in each.keeps]
        resumed = {each.resumes for each in moves if each.resumes is not None}
        self._require(len(set(kept)) == len(kept) and not resumed & set(kept), "two rows share a place")
        are_there = all(0 <= place < len(self._kept) for place in resumed | set(kept))
        self._require(are_there, "no such place")

    def move(self, plan: StepPlan, *, is_tainted: bool) -> None:
        """Update the states of all rows, or return before any change if a tainted step cannot run at all.

        A tainted step has failed or was queued after a failed one; its rows end without states. It cannot
        run if a row lacks its state, or begins after the tokens that its slot has without the failed step.
        """
        moves: list[tuple[StepRow, list[_State], list[_State]]] = []
        for row in plan.rows:
            tokens, begin, end = self._extent(row)
            if begin == end:
                continue  # its sequence already has all its tokens
            before, source = self._source(row, begin)
            is_there = begin == 0 or source == (tokens[:begin], row.adapter)
            if is_tainted and not (is_there and row.start <= begin):
                return
            self._require(is_there, f"slot {row.slot} lacks its state at {begin}")
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
        """Return the half of the slot's states that holds the row's state, and that state."""
        if row.states is not None and row.states.resumes is not None:
            return [], self._kept[row.states.resumes]
        older, newer = self._of_slots.get(row.slot, ([], []))
        for half in (newer, older) if begin else ():
            for state in half:
                if len(state[0]) == begin:
                    return half, state
        return [], None
