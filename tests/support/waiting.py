"""Bounded waiting for another task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

LONGEST_S = 60.0  # a test that fails waits so long; one on a busy machine has been seen to need ten
BETWEEN_S = 0.001  # a loop that never sleeps would take the GIL from the engine's thread at each step


async def until(condition: Callable[[], bool]) -> None:
    """Run the event loop until a condition holds.

    Raises:
        TimeoutError: if it does not hold within a minute.
    """
    async with asyncio.timeout(LONGEST_S):
        while not condition():
            await asyncio.sleep(BETWEEN_S)
