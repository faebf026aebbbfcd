"""Waiting for what another task does, with an end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

LONGEST_S = 10.0


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop run until a condition holds.

    Raises:
        TimeoutError: it has not within ten seconds.
    """
    async with asyncio.timeout(LONGEST_S):
        while not condition():
            await asyncio.sleep(0)
