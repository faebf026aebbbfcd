from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from tests.support.waiting import until
from tgi_asgi.engine.pipeline import Pipeline
from tgi_asgi.engine.step import Step
from tgi_asgi.runner.plan import RunnerTraits, StepPlan, StepResult


class HeldRunner:
    """Holds every step until the test releases it."""

    traits = RunnerTraits(num_blocks=1, block_size=1, max_batch_size=1, max_step_tokens=1)
    num_threads = 0
    progress: int | None = None

    def __init__(self) -> None:
        self.held: deque[asyncio.Future[StepResult]] = deque()

    def submit(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        self.held.append(asyncio.get_running_loop().create_future())
        return self.held[-1]

    def let_go(self, error: Exception | None = None) -> None:
        future = self.held.popleft()
        if error is None:
            future.set_result(StepResult(0, []))
        else:
            future.set_exception(error)

    def close(self) -> None: ...


class Watched:
    """A pipeline and the events that it has reported."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.runner = HeldRunner()
        self.num_done = 0
        self.hangs: list[float] = []
        self.pipeline = Pipeline(self.runner, on_done=self._done, on_hang=self.hangs.append, clock=clock)

    def _done(self) -> None:
        self.num_done += 1


async def test_two_steps_at_most_and_in_order() -> None:
    watched = Watched()
    first, second = Step(0), Step(1)
    watched.pipeline.submit(first, 10)
    assert watched.pipeline.has_room
    watched.pipeline.submit(second, 10)
    assert not watched.pipeline.has_room
    assert watched.pipeline.pop_done() is None
    for step in (first, second):
        watched.runner.let_go()
        await asyncio.sleep(0)
        flight = watched.pipeline.pop_done()
        assert flight is not None
        assert flight.step is step
    assert watched.num_done == 2
    watched.pipeline.close()


async def test_a_step_begins_when_the_one_before_has_ended() -> None:
    watched = Watched()
    first = watched.pipeline.submit(Step(0), 10)
    second = watched.pipeline.submit(Step(1), 10)
    watched.runner.let_go()
    await asyncio.sleep(0)
    assert second.begun_s == first.done_s
    watched.pipeline.close()


async def test_nothing_goes_behind_a_step_that_is_known_to_have_failed() -> None:
    watched = Watched()
    watched.pipeline.submit(Step(0), 10)
    watched.runner.let_go(RuntimeError("no"))
    assert watched.pipeline.has_room
    await asyncio.sleep(0)
    assert not watched.pipeline.has_room
    flight = watched.pipeline.pop_done()
    assert flight is not None
    assert isinstance(flight.error, RuntimeError)
    assert not watched.pipeline.has_room
    assert await watched.pipeline.drain() == []
    assert watched.pipeline.has_room
    watched.pipeline.close()


async def test_a_short_limit_is_watched_behind_a_long_one() -> None:
    watched = Watched()
    watched.pipeline.submit(Step(0), 1000)
    watched.runner.let_go()
    await asyncio.sleep(0)
    watched.pipeline.pop_done()
    watched.pipeline.submit(Step(1), 0.01)
    await until(lambda: bool(watched.hangs))
    assert watched.hangs[0] >= 0.02  # the limit, and the same again as grace
    watched.pipeline.close()


async def test_a_suspicion_ends_with_its_step() -> None:
    """The process was paused twice, each time in a step and for longer than the limit: neither hung."""
    now = 0.0
    watched = Watched(clock=lambda: now)
    for number in range(2):
        watched.pipeline.submit(Step(number), 10)
        now += 60
        watched.pipeline._watch()
        assert watched.hangs == []
        watched.runner.let_go()
        await asyncio.sleep(0)
        watched.pipeline.pop_done()
        watched.pipeline._watch()
    watched.pipeline.submit(Step(2), 10)
    now += 60
    watched.pipeline._watch()
    watched.pipeline._watch()
    assert watched.hangs == [60]
    watched.pipeline.close()


async def test_a_late_step_that_gets_on_does_not_hang() -> None:
    """A prompt may be longer than any before, and a container may have a tenth of a core."""
    now = 0.0
    watched = Watched(clock=lambda: now)
    watched.runner.progress = 0
    watched.pipeline.submit(Step(0), 10)
    for _ in range(20):
        now += 60
        watched.runner.progress += 1
        watched.pipeline._watch()
    assert watched.hangs == []
    watched.pipeline._watch()
    assert watched.hangs == [1200]
    watched.pipeline.close()


async def test_a_step_that_was_given_up_is_a_failure_and_no_crash() -> None:
    watched = Watched()
    flight = watched.pipeline.submit(Step(0), 10)
    watched.runner.held[0].cancel()
    await asyncio.sleep(0)
    assert watched.pipeline.pop_done() is flight
    assert flight.error is not None
    watched.pipeline.close()
