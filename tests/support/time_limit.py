"""A time limit for each test: a test that hangs fails with all stacks, and the run continues.

The limit is a signal to the main thread, whose handler raises. Code that never returns to Python never runs
the handler; a minute later such a process prints its threads' stacks and exits, and pytest-xdist starts
another.

    config.pluginmanager.register(TimeLimit(nightly=["soak"]))
    @pytest.mark.time_limit(1800)  # for a test that compiles
"""

from __future__ import annotations

import asyncio
import faulthandler
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

import pytest

# The longest test of a warm run took 6 s; other work may keep the machine busy.
CALL_S = 300.0
# A fixture that one test sets up for many may compile or fetch.
SETUP_S = 1800.0
NIGHTLY_S = 3600.0
GRACE_S = 60.0
_AGAIN_S = 1.0  # repeats the signal, for code that catches it by mistake


class _Passed(KeyboardInterrupt):
    """The limit has passed; asyncio lets a KeyboardInterrupt out of the loop, whichever task it hits."""


class TimeLimit:
    """Limit the phases of every test; `nightly` lists the markers of tests that may take an hour."""

    def __init__(self, nightly: Iterable[str], grace_s: float = GRACE_S) -> None:
        self._nightly = frozenset(nightly)
        self._grace_s = grace_s
        self._stderr = os.dup(2)  # before pytest captures it

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        with self._limited(self._limit_of(item, SETUP_S)):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        with self._limited(self._limit_of(item, CALL_S)):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        with self._limited(self._limit_of(item, SETUP_S)):
            return (yield)

    def pytest_unconfigure(self) -> None:
        os.close(self._stderr)

    @contextmanager
    def _limited(self, seconds: float) -> Iterator[None]:
        def end(number: int, frame: FrameType | None) -> None:
            # Collecting the stacks takes seconds on a busy machine, so the next timer starts only afterwards.
            found = stacks()
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
            raise _Passed(f"the test took more than {seconds:g} s\n{found}")

        before = signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        faulthandler.dump_traceback_later(seconds + self._grace_s, exit=True, file=self._stderr)
        try:
            yield
        except _Passed as passed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            pytest.fail(str(passed), pytrace=False)
        finally:
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _limit_of(self, item: pytest.Item, usual_s: float) -> float:
        """Return the longest duration of a test's phase in seconds: from its markers, or else `usual_s`."""
        marker = item.get_closest_marker("time_limit")
        if marker is not None:
            return float(marker.args[0])
        is_nightly = not self._nightly.isdisjoint(marker.name for marker in item.iter_markers())
        return NIGHTLY_S if is_nightly else usual_s


def stacks() -> str:
    """Return the stacks of every thread and of every task of this thread's running loop."""
    out = io.StringIO()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        out.write(f"thread {names.get(ident, ident)}:\n")
        traceback.print_stack(frame, file=out)
    loop = asyncio._get_running_loop()
    for task in asyncio.all_tasks(loop) if loop is not None else ():
        task.print_stack(file=out)
    return out.getvalue()
