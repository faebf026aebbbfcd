"""A time limit for each test: a test that hangs fails with all stacks, and the run continues.

The limit is a signal to the main thread, whose handler raises. Code that never returns to Python never runs
the handler; one to two minutes later such a process prints its threads' stacks and exits, and pytest-xdist
starts another.

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
import time
import traceback
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

import pytest

# The longest test of a warm run took 6 s; other work may keep the machine busy.
CALL_S = 300.0
# A fixture that one test sets up for many may compile or fetch. Longer limits than CALL_S are passed in steps
# of it, each of which has to come back to Python.
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
        self._exit = LateExit(grace_s)

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

    def pytest_sessionfinish(self) -> None:
        self._exit.cancel()

    @contextmanager
    def _limited(self, seconds: float) -> Iterator[None]:
        end = time.monotonic() + seconds

        def go_on() -> None:
            step = min(max(end - time.monotonic(), 0.001), CALL_S)
            self._exit.postpone(step)
            signal.setitimer(signal.ITIMER_REAL, step)

        def pass_or_end(number: int, frame: FrameType | None) -> None:
            if time.monotonic() < end:
                go_on()
                return
            # Collecting the stacks takes seconds on a busy machine, so the next timer starts only afterwards.
            found = stacks()
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
            raise _Passed(f"the test took more than {seconds:g} s\n{found}")

        before = signal.signal(signal.SIGALRM, pass_or_end)
        go_on()
        try:
            yield
        except _Passed as passed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            pytest.fail(str(passed), pytrace=False)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _limit_of(self, item: pytest.Item, usual_s: float) -> float:
        """Return the longest duration of a test's phase in seconds: from its markers, or else `usual_s`."""
        marker = item.get_closest_marker("time_limit")
        if marker is not None:
            return float(marker.args[0])
        is_nightly = not self._nightly.isdisjoint(marker.name for marker in item.iter_markers())
        return NIGHTLY_S if is_nightly else usual_s


class LateExit:
    """Ends the process and prints its threads' stacks, unless it is postponed again and again.

    A thread of faulthandler's does it, which needs no interpreter. Each new time is a new thread, which takes
    as long as a small test does, so the old time is kept if it is late enough and at most the grace too late.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._at = 0.0
        self._stderr = os.dup(2)  # before pytest captures it

    def postpone(self, seconds: float) -> None:
        """Leave the process `seconds` from now, and one or two times the grace."""
        now = time.monotonic()
        earliest = now + seconds + self._grace_s
        if not earliest <= self._at <= earliest + self._grace_s:
            self._at = earliest + self._grace_s
            faulthandler.dump_traceback_later(self._at - now, exit=True, file=self._stderr)

    def cancel(self) -> None:
        """Let the process live; nothing may be postponed afterwards."""
        faulthandler.cancel_dump_traceback_later()
        os.close(self._stderr)


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
