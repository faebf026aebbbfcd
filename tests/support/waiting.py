"""Bounded waiting for another task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

LONGEST_S = 10.0


async def until(condition: Callable[[], bool]) -> None:
    """Run the event loop until a condition holds.

    Raises:
        TimeoutError: if it does not hold within ten seconds.
    """
    async with asyncio.timeout(LONGEST_S):
        while not condition():
            await asyncio.sleep(0)
