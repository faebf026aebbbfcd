"""Carries steps from the event loop to a runner's threads, and their results back."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tgi_asgi import ops
from tgi_asgi.runner.plan import MAX_IN_FLIGHT, Sampled, StepPlan, StepResult

logger = logging.getLogger(__name__)


class Steps(Protocol):
    """The steps that are queued, and those that have finished: a `StepQueue`, or a `DeviceQueue`."""

    def fileno(self) -> int: ...
    def push(self, number: int) -> None: ...
    def done(self) -> Sequence[tuple[int, Any]]: ...
    def finish(self, number: int) -> None: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class PendingStep:
    """A submitted step and the future that waits for its result.

    Attributes:
        place: Index in [0, `MAX_IN_FLIGHT`) that no other step in flight has.
    """

    number: int
    place: int
    plan: StepPlan
    future: asyncio.Future[StepResult]
    outcome: StepResult | Exception | None = None


# Queues a step that needs no Python, and returns True; returns False, and queues nothing, if it needs any.
PushPrepared = Callable[[PendingStep], bool]


class Handoff:
    """Hands steps to threads, in order and with at most two undelivered, and their results back.

        handoff = Handoff(steps)
        future = handoff.submit(plan)                      # on the event loop
        step = handoff.step(number)                        # on a thread that takes numbers of `steps`
        handoff.finish(step, StepResult(step.plan.step_id, rows))

    Call `submit`, `close` and `end` on the event loop, the others on any other thread.
    """

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._numbers = itertools.count()
        self._num_accepted = 0
        self._undelivered: dict[int, PendingStep] = {}  # by number
        self._loop: asyncio.AbstractEventLoop | None = None  # the loop that delivers results
        self._is_closed = False

    def submit(self, plan: StepPlan, push_prepared: PushPrepared | None = None) -> asyncio.Future[StepResult]:
        """Queue a step; `push_prepared` queues it for native code, if it can.

        The future fails only if this step raises; if its rows are refused here, it fails at once.

        Raises:
            RuntimeError: if the handoff is closed or two steps are already in flight.
        """
        if self._is_closed:
            raise RuntimeError("the runner is closed")
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._watch(loop)
        if len(self._undelivered) >= MAX_IN_FLIGHT:
            raise RuntimeError(f"{MAX_IN_FLIGHT} steps are in flight already")
        place = self._num_accepted % MAX_IN_FLIGHT
        step = PendingStep(next(self._numbers), place, plan, loop.create_future())
        self._undelivered[step.number] = step  # before the push: the thread that takes the number looks it up
        try:
            if push_prepared is None or not push_prepared(step):
                self._steps.push(step.number)
        except Exception as error:
            del self._undelivered[step.number]
            step.future.set_exception(error)
        else:
            self._num_accepted += 1
        return step.future

    def step(self, number: int) -> PendingStep:
        """Return a step that is not delivered yet."""
        return self._undelivered[number]

    def finish(self, step: PendingStep, outcome: StepResult | Exception) -> None:
        """Hand a step's outcome to the event loop that waits for it."""
        step.outcome = outcome
        self._steps.finish(step.number)

    def close(self) -> None:
        """Accept no more steps; those queued are still computed. Idempotent."""
        self._is_closed = True
        self._steps.close()

    def end(self) -> None:
        """Deliver what has finished and stop watching. Call once no thread computes any more. Idempotent."""
        self._deliver()
        self._watch(None)

    def _watch(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Deliver results on this loop only; the waiters of a previous loop are gone with it."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._steps.fileno())
        self._loop = None
        if loop is not None:
            loop.add_reader(self._steps.fileno(), self._deliver)
            self._loop = loop
            self._deliver()

    def _deliver(self) -> None:
        """Complete the futures of finished steps. Runs on the event loop."""
        for number, sampled in self._steps.done():
            step = self._undelivered.pop(number)
            outcome: StepResult | Exception
            if sampled is None:
                assert step.outcome is not None
                outcome = step.outcome
            elif isinstance(sampled, Exception):
                logger.error("step %s failed: %s", step.plan.step_id, sampled)
                outcome = sampled
            else:
                rows, draft_samples, (num_drafted_rows, num_drafts) = sampled
                outcome = StepResult(
                    step.plan.step_id,
                    [None if row is None else Sampled(*row) for row in rows],
                    {row: [Sampled(*each) for each in more] for row, more in draft_samples.items()},
                    num_drafted_rows,
                    num_drafts,
                )
            _end(step, outcome)


class StepHandoff(Handoff):
    """Hands steps to one thread, which computes one after the other.

        handoff = StepHandoff()
        future = handoff.submit(plan)                 # on the event loop
        while (step := handoff.take()) is not None:   # on the thread
            handoff.finish(step, compute(step.plan))

    With a native program, `take` itself computes the steps that were pushed as rows. Neither the computation
    nor the completion signal runs Python or waits for the GIL.

    Args:
        program: Native program that computes steps that consist only of rows.
        limits: Bounds of the integers in those rows.

    Attributes:
        steps: The queue.
    """

    def __init__(self, program: ops.NativeProgram | None = None, limits: ops.RowLimits | None = None) -> None:
        self.steps = ops.StepQueue(program, None if program is None else limits)
        super().__init__(self.steps)

    def take(self) -> PendingStep | None:
        """Wait for the next step that needs Python; return None once closed and empty."""
        number = self.steps.compute_rows()
        return None if number is None else self.step(number)

    def serve(self, compute: Callable[[StepPlan], StepResult]) -> None:
        """Compute steps one after the other until the handoff is closed. The body of a runner's thread."""
        ops.join_threads()
        while (step := self.take()) is not None:
            self.finish(step, _outcome(compute, step.plan))
            del step  # or its plan's images and adapters would stay in memory until the next step

    def start(self, compute: Callable[[StepPlan], StepResult]) -> threading.Thread:
        """Start a runner's thread, which computes steps until the handoff is closed."""
        thread = threading.Thread(target=self.serve, args=(compute,), name="tgi-runner", daemon=True)
        thread.start()
        return thread


def _outcome(compute: Callable[[StepPlan], StepResult], plan: StepPlan) -> StepResult | Exception:
    try:
        return compute(plan)
    except BaseException as error:  # a panic in a library written in Rust is not an `Exception`
        logger.exception("step %s failed", plan.step_id)
        if _is_out_of_memory(error):
            return MemoryError(str(error))
        return error if isinstance(error, Exception) else RuntimeError(repr(error))


def _end(step: PendingStep, outcome: StepResult | Exception) -> None:
    future = step.future
    if future.get_loop().is_closed():
        logger.debug("nobody waits for the result of step %s", step.plan.step_id)
    elif future.done():  # cancelled by the caller
        return
    elif isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory was refused: to numpy or the extension, or to torch on a CPU."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)
