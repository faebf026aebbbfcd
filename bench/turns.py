"""The order of turns: interleaved rounds in changing order, and turns that must be repeated.

A turn is one contender's part of one round: all its loads, with the machine's bandwidth measured before and
after. The next turn is computed from the finished ones, so an interrupted run continues from its file.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

TOLERANCE = 0.1  # relative to the round's median bandwidth


@dataclass(frozen=True, slots=True)
class Turn:
    """The results of one contender in one round.

    Attributes:
        before, after: Bandwidth in GB/s.
        figures: Values by name.
    """

    round: int
    contender: str
    before: float
    after: float
    figures: dict[str, float]

    @classmethod
    def read(cls, record: dict[str, Any]) -> Self:
        """Read a turn from a record."""
        return cls(**record)

    def record(self) -> dict[str, Any]:
        """Return the turn in the form of the JSON record."""
        return asdict(self)


def order_of(names: Sequence[str], index: int) -> list[str]:
    """Return the order of a round: a row of a Williams design.

    Over len(names) rounds (twice as many for an odd number) each contender is at every place equally often,
    and follows every other equally often (Williams, Australian Journal of Scientific Research A 2, 1949).
    """
    count = len(names)
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]  # 0, 1, -1, 2, -2 …
    is_mirrored = count % 2 == 1 and index // count % 2 == 1
    row = [names[(place + index) % count] for place in zigzag]
    return row[::-1] if is_mirrored else row


def deviation(turn: Turn, round_turns: Iterable[Turn]) -> float:
    """Return how far a turn's bandwidth, before or after, is from its round's median: 0.1 is 10 %."""
    usual = statistics.median(value for each in round_turns for value in (each.before, each.after))
    return max(abs(turn.before / usual - 1), abs(turn.after / usual - 1))


def counted_turns(turns: Sequence[Turn]) -> list[tuple[Turn, bool]]:
    """Return the turn that counts for each contender and round, with whether it is within `TOLERANCE`.

    It is the turn whose bandwidth is nearest to that of the round.
    """
    found = []
    for index in sorted({turn.round for turn in turns}):
        of_round = [turn for turn in turns if turn.round == index]
        for name in dict.fromkeys(turn.contender for turn in of_round):
            tries = [turn for turn in of_round if turn.contender == name]
            nearest = min(tries, key=lambda turn: deviation(turn, of_round))
            found.append((nearest, deviation(nearest, of_round) <= TOLERANCE))
    return found


def next_turn(
    turns: Sequence[Turn], names: Sequence[str], rounds: int, max_tries: int
) -> tuple[int, str] | None:
    """Return the round and the contender of the next turn, or None when all is measured.

    A round's missing turns come first, in its order; then turns whose bandwidth deviated from the round's are
    repeated, up to `max_tries` turns in all.
    """
    for index in range(rounds):
        of_round = [turn for turn in turns if turn.round == index]
        order = order_of(names, index)
        tries = {name: sum(turn.contender == name for turn in of_round) for name in order}
        for name in order:
            if not tries[name]:
                return index, name
        uneven = [turn.contender for turn, is_even in counted_turns(of_round) if not is_even]
        for name in order:
            if name in uneven and tries[name] < max_tries:
                return index, name
    return None
