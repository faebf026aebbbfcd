"""Bounded waiting for another task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

LONGEST_S = 60.0  # a test that fails waits so long; one on a busy machine has been seen to need ten
_NUM_TURNS = 1000
_BETWEEN_S = 0.001


async def until(condition: Callable[[], bool]) -> None:
    """Run the event loop until a condition holds.

    It is looked at in each turn of the loop, in which a fake runner may compute a step. What takes longer is
    computed by other threads, from which a loop without sleep would take the GIL at each step.

    Raises:
        TimeoutError: if it does not hold within a minute.
    """
    async with asyncio.timeout(LONGEST_S):
        num_turns = 0
        while not condition():
            num_turns += 1
            await asyncio.sleep(0 if num_turns < _NUM_TURNS else _BETWEEN_S)
