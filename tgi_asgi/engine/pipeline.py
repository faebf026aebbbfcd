"""The steps in flight: submit them to the runner, time them, and detect one that hangs. Internal."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from functools import partial

from tgi_asgi.engine.step import Step
from tgi_asgi.runner.plan import MAX_IN_FLIGHT, DeviceLost, Runner, StepResult

logger = logging.getLogger(__name__)

_GRACE_S = 1.0  # given to a late step: it may be late because the process was suspended
# Given to a late step that got on: the longest part of a layer on a starved machine takes less.
_QUIET_S = 60.0


class Flight:
    """A step that the runner has; `begun_s` is when the runner could begin it."""

    __slots__ = ("begun_s", "done_s", "future", "is_done", "limit_s", "step")

    def __init__(
        self, step: Step, future: asyncio.Future[StepResult], begun_s: float, limit_s: float
    ) -> None:
        self.step = step
        self.future = future
        self.begun_s = begun_s
        self.done_s = begun_s
        self.is_done = False
        self.limit_s = limit_s

    @property
    def error(self) -> BaseException | None:
        """Why the finished step failed; None if it succeeded."""
        if self.future.cancelled():
            return DeviceLost("the runner gave a step up")
        return self.future.exception()


class Pipeline:
    """The queue of steps that the runner has: at most two, in order.

    Args:
        on_done: Called when a step has finished, successfully or not.
        on_hang: Called once when a step has run for longer than its limit and does not get on any more, with
            its duration in seconds.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        on_done: Callable[[], None],
        on_hang: Callable[[float], None],
        clock: Callable[[], float],
    ) -> None:
        self._runner = runner
        self._on_done = on_done
        self._on_hang = on_hang
        self._clock = clock
        self._flights: deque[Flight] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._is_suspect = False  # whether the oldest step was late when `_watch` last looked
        self._progress: int | None = None  # the runner's progress at that time
        self._has_failed = False

    @property
    def has_room(self) -> bool:
        """Whether another step may be submitted; false until a failed step has been handled."""
        return len(self._flights) < MAX_IN_FLIGHT and not self._has_failed

    @property
    def newest(self) -> Step | None:
        """The last of the steps in flight."""
        return self._flights[-1].step if self._flights else None

    @property
    def has_done(self) -> bool:
        """Whether `pop_done` would return a step."""
        return bool(self._flights) and self._flights[0].is_done

    def submit(self, step: Step, limit_s: float) -> Flight:
        """Submit a step to the runner; a refusal becomes the step's failure."""
        loop = asyncio.get_running_loop()
        now = self._clock()
        try:
            future = self._runner.submit(step.plan)
        except Exception as error:
            future = loop.create_future()
            future.set_exception(error)
        flight = Flight(step, future, now, limit_s)
        self._flights.append(flight)
        future.add_done_callback(partial(self._finish, flight))
        if self._timer is None or self._timer.when() > loop.time() + limit_s:
            self._unwatch()
            self._timer = loop.call_later(limit_s, self._watch)
        return flight

    def pop_done(self) -> Flight | None:
        """Return and remove the oldest step if it has finished."""
        if self.has_done:
            return self._flights.popleft()
        return None

    async def drain(self) -> list[Flight]:
        """Wait until every step has finished; return and remove them all, oldest first."""
        flights = list(self._flights)
        if flights:
            await asyncio.wait([flight.future for flight in flights])
        self._flights.clear()
        self._has_failed = False
        return flights

    def close(self) -> None:
        """Stop watching for hung steps."""
        self._unwatch()

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _finish(self, flight: Flight, future: asyncio.Future[StepResult]) -> None:
        flight.is_done = True
        flight.done_s = self._clock()
        # Retrieve the error here, so that asyncio does not complain if nothing awaits this step any more.
        self._has_failed |= flight.error is not None
        for other in self._flights:
            if not other.is_done:
                other.begun_s = flight.done_s
        self._on_done()

    def _watch(self) -> None:
        """Check whether the oldest step hangs; the timer restarts only while there is a step."""
        self._timer = None
        if not self._flights:
            self._is_suspect = False
            return
        oldest = self._flights[0]
        taken_s = self._clock() - oldest.begun_s
        delay_s = oldest.limit_s - taken_s
        if oldest.is_done or delay_s > 0:
            self._is_suspect = False
        elif self._is_suspect and self._runner.progress == self._progress:
            self._on_hang(taken_s)
            return
        else:
            self._is_suspect, self._progress = True, self._runner.progress
        grace_s = _GRACE_S if self._progress is None else _QUIET_S
        delay_s = max(delay_s, min(grace_s, oldest.limit_s))
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._watch)
