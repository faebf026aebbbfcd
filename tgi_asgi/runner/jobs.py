"""Steps on their way from the event loop to a runner's thread, and their results on the way back."""

from __future__ import annotations

import asyncio
import logging
import queue
from dataclasses import dataclass

from tgi_asgi.runner.plan import StepPlan, StepResult

logger = logging.getLogger(__name__)

MAX_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class Job:
    """A step that was submitted, and who waits for it."""

    plan: StepPlan
    future: asyncio.Future[StepResult]
    loop: asyncio.AbstractEventLoop


class JobQueue:
    """First in, first out, with at most two steps not yet delivered.

    `submit` and `close` are the event loop's; `take` and `finish` may be any thread's.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._in_flight = 0
        self._is_closed = False

    def submit(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        """Queue a step; the future fails if the step raises, and only it.

        Raises:
            RuntimeError: the queue is closed, or two steps are in flight already.
        """
        if self._is_closed:
            raise RuntimeError("the runner is closed")
        if self._in_flight == MAX_IN_FLIGHT:
            raise RuntimeError(f"{MAX_IN_FLIGHT} steps are in flight already")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[StepResult] = loop.create_future()
        self._in_flight += 1
        self._jobs.put(Job(plan, future, loop))
        return future

    def close(self) -> None:
        """Take no more; after what is queued `take` returns None, once. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._jobs.put(None)

    def take(self) -> Job | None:
        """Wait for the next job; None means that there will be none."""
        return self._jobs.get()

    def finish(self, job: Job, outcome: StepResult | Exception) -> None:
        """Hand a step's outcome to the event loop that waits for it."""
        try:
            job.loop.call_soon_threadsafe(self._deliver, job.future, outcome)
        except RuntimeError:  # the loop is closed: nobody waits for the result
            logger.debug("the result of step %s has no taker", job.plan.step_id)

    def _deliver(self, future: asyncio.Future[StepResult], outcome: StepResult | Exception) -> None:
        """End a step; runs on the event loop."""
        self._in_flight -= 1
        if future.done():  # cancelled by its waiter
            return
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
