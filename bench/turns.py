"""Whose turn it is: interleaved rounds in changing order, and turns that must be repeated.

A turn is one contender's, in one round: all its loads, with the machine's bandwidth read before and after.
What comes next is computed from the turns that were taken, so a run that was interrupted goes on from its
file.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

TOLERANCE = 0.1  # of the round's median bandwidth


@dataclass(frozen=True, slots=True)
class Turn:
    """What one contender did in one round.

    Attributes:
        before, after: bandwidth in GB/s.
        figures: values by name.
    """

    round: int
    contender: str
    before: float
    after: float
    figures: dict[str, float]

    @classmethod
    def read(cls, record: dict[str, Any]) -> Self:
        """Take it from a record."""
        return cls(**record)

    def record(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return asdict(self)


def order_of(names: Sequence[str], index: int) -> list[str]:
    """Return the order of a round: a row of a Williams design.

    Over len(names) rounds (twice as many for an odd number) everyone is at every place equally often, and
    behind every other equally often (Williams, Australian Journal of Scientific Research A 2, 1949).
    """
    count = len(names)
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]  # 0, 1, -1, 2, -2 …
    is_mirrored = count % 2 == 1 and index // count % 2 == 1
    row = [names[(place + index) % count] for place in zigzag]
    return row[::-1] if is_mirrored else row


def deviation(turn: Turn, round_turns: Iterable[Turn]) -> float:
    """Return how far a turn's bandwidth, before or after, was from the median of its round's: 0.1 is 10 %."""
    usual = statistics.median(value for each in round_turns for value in (each.before, each.after))
    return max(abs(turn.before / usual - 1), abs(turn.after / usual - 1))


def counted(turns: Sequence[Turn]) -> list[tuple[Turn, bool]]:
    """Return the turn of each contender and round that counts, the one nearest to the round's bandwidth; and
    whether it is within `TOLERANCE` of that."""
    found = []
    for index in sorted({turn.round for turn in turns}):
        of_round = [turn for turn in turns if turn.round == index]
        for name in dict.fromkeys(turn.contender for turn in of_round):
            tries = [turn for turn in of_round if turn.contender == name]
            nearest = min(tries, key=lambda turn: deviation(turn, of_round))
            found.append((nearest, deviation(nearest, of_round) <= TOLERANCE))
    return found


def next_turn(
    turns: Sequence[Turn], names: Sequence[str], rounds: int, most_tries: int
) -> tuple[int, str] | None:
    """Return the round and the contender of the next turn, or None when all is measured.

    A round's missing turns come first, in its order; then those are repeated, up to `most_tries` in all,
    whose bandwidth was not the round's.
    """
    for index in range(rounds):
        of_round = [turn for turn in turns if turn.round == index]
        order = order_of(names, index)
        tries = {name: sum(turn.contender == name for turn in of_round) for name in order}
        for name in order:
            if not tries[name]:
                return index, name
        uneven = [turn.contender for turn, is_even in counted(of_round) if not is_even]
        for name in order:
            if name in uneven and tries[name] < most_tries:
                return index, name
    return None
