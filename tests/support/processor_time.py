"""Bars for the processor time of code whose cost must not explode with its input.

Only this thread's time counts, without the collection of garbage, whose cost is that of all tests' objects.
Cores that are shared compute at a fraction of their speed at times, so a bar is several times what the code
was measured to take, and code that can be run again gets three tries.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

NUM_TRIES = 3

T = TypeVar("T")


def computed_within(limit_s: float, run: Callable[[], T]) -> T:
    """Return what `run` returns; fail if each of three calls takes longer than `limit_s` seconds."""
    for _ in range(NUM_TRIES - 1):
        try:
            with at_most(limit_s):
                return run()
        except TooSlow:
            continue
    with at_most(limit_s):
        return run()


@contextmanager
def at_most(limit_s: float) -> Iterator[None]:
    """Fail if the block takes longer than `limit_s` seconds; for what has only one try."""
    was_enabled = gc.isenabled()
    gc.disable()
    began_s = time.thread_time()
    try:
        yield
        spent_s = time.thread_time() - began_s
    finally:
        if was_enabled:
            gc.enable()
    if spent_s > limit_s:
        raise TooSlow(f"{spent_s:.2f} s of processor time, more than {limit_s:g}")


class TooSlow(AssertionError):
    """Code took longer than its bar."""
