"""Recovery from a failed step: retry its rows by halves until the faulty ones are isolated.

Owned by the engine's loop, which submits and delivers; knows sequences, but no requests.
"""

from __future__ import annotations

import logging
from typing import Protocol

from tgi_asgi.engine.budget import TokenBudget
from tgi_asgi.engine.pipeline import Flight, Pipeline
from tgi_asgi.engine.scheduler import Scheduler
from tgi_asgi.engine.sequence import Sequence
from tgi_asgi.engine.stats import EngineStats
from tgi_asgi.engine.step import Step
from tgi_asgi.runner.plan import DeviceLost

logger = logging.getLogger(__name__)

_PROBE_AFTER = 4  # consecutive failed rows after which the engine itself is suspected
_MAX_RESTARTS = 16  # of a prompt whose chunks cannot be retried one by one


class StepLoop(Protocol):
    """What recovery needs of the engine's loop: to run steps between its own, and to fail requests."""

    def take_waiting(self) -> None: ...

    def submit(self, step: Step) -> Flight: ...

    async def complete(self, flight: Flight) -> None: ...

    async def flush(self) -> None: ...

    def fail_request(self, sequence: Sequence, reason: str, cause: BaseException | None = None) -> None: ...


class Recovery:
    """The search for the rows that make a step fail, if it is the rows' fault at all.

    Attributes:
        num_lost_rows: Number of rows that failed since the last good one.
    """

    def __init__(
        self,
        loop: StepLoop,
        scheduler: Scheduler,
        pipeline: Pipeline,
        budget: TokenBudget,
        stats: EngineStats,
    ) -> None:
        self._loop = loop
        self._scheduler = scheduler
        self._pipeline = pipeline
        self._budget = budget
        self._stats = stats
        self.num_lost_rows = 0

    async def recover(self, failed: Step, error: BaseException) -> None:
        """Retry the rows of a failed step; rows that fail on their own lose their requests.

        Raises:
            Exception: if nothing can be computed any more.
        """
        for flight in reversed(await self._pipeline.drain()):
            self._scheduler.rollback(flight.step)
        pending = [(failed, error)]
        while pending:
            step, error = pending.pop()
            num_rows = len(step.sequences)
            logger.error("step %d failed with %d rows: %r", step.plan.step_id, num_rows, error)
            self._stats.failed_steps += 1
            if isinstance(error, DeviceLost):
                raise error
            self._fail_restarted(step, error)
            self._scheduler.rollback(step)
            if isinstance(error, MemoryError) and step.num_prefill_tokens:
                self._budget.shrink(step.num_prefill_tokens)
            if num_rows != 1:
                parts, max_tokens = [range(num_rows // 2), range(num_rows // 2, num_rows)], None
            elif (max_tokens := self._smaller_chunk(step, error)) is not None:
                parts = [range(1)]
            else:
                for _, sequence in step.live():
                    self.fail_row(sequence, "the model failed on this request", error)
                await self.probe_engine()
                continue
            for rows in parts:
                again = await self._retry(step, rows, max_tokens, error)
                if again is not None:
                    pending.append(again)

    def _smaller_chunk(self, step: Step, error: BaseException) -> int | None:
        """Return how many tokens to retry a step's only row with; None if fewer would not help."""
        num_tokens, traits = step.plan.rows[0].num_tokens, self._scheduler.traits
        is_minimum = num_tokens <= traits.block_size or traits.takes_whole_prompts
        if not isinstance(error, MemoryError) or is_minimum:
            return None
        return max(num_tokens // 2, traits.block_size)

    async def _retry(
        self, step: Step, rows: range, max_tokens: int | None, error: BaseException
    ) -> tuple[Step, BaseException] | None:
        """Run some rows of a failed step again; return the new step and its error if it fails, too."""
        self._loop.take_waiting()
        again = self._scheduler.retry(step, rows, max_tokens)
        if again is None:
            return None
        if max_tokens is not None and again.num_prefill_tokens >= step.num_prefill_tokens:
            self._scheduler.rollback(again)  # no smaller: its image cannot be cut
            for _, sequence in again.live():
                self._loop.fail_request(sequence, "there is no memory for an image", error)
            return None
        flight = await self._run(again)
        if flight.error is not None:
            return again, flight.error
        await self._loop.complete(flight)
        await self._loop.flush()
        return None

    def _fail_restarted(self, step: Step, error: BaseException) -> None:
        """Fail the prompts that would lose all that was computed of them once too often.

        A prompt that `needs_all` runs from its beginning again. Retrying its row therefore does not show
        whether one of its later chunks is faulty; without a limit, that chunk would fail again and again.
        """
        for index, sequence in step.live():
            if sequence.needs_all and step.plan.rows[index].start > 0:
                sequence.num_restarts += 1
                if sequence.num_restarts > _MAX_RESTARTS:
                    self.fail_row(sequence, "the model failed on this request", error)

    def fail_row(self, sequence: Sequence, reason: str, cause: BaseException | None = None) -> None:
        """Fail the request of a row that the model could not compute."""
        self.note_lost_row()
        self._loop.fail_request(sequence, reason, cause)

    def note_lost_row(self) -> None:
        """Note that a row has failed; `probe_engine` counts how many fail in succession."""
        self.num_lost_rows += 1

    def note_good_row(self) -> None:
        """Note that a row has been computed: the engine works."""
        self.num_lost_rows = 0

    async def probe_engine(self) -> None:
        """Run a probe step once several rows have failed in succession; give up only if it fails, too.

        A client whose every prompt fails affects only itself; an engine that cannot compute affects everyone.

        Raises:
            Exception: if the probe failed.
        """
        if self.num_lost_rows < _PROBE_AFTER:
            return
        for flight in await self._pipeline.drain():
            await self._loop.complete(flight)
        step = self._scheduler.probe() if self.num_lost_rows >= _PROBE_AFTER else None
        if step is None:
            return
        flight = await self._run(step)
        self._scheduler.end_probe(step)
        if flight.error is not None:
            raise flight.error
        [sampled] = flight.future.result().sampled
        if sampled is None or not sampled.is_finite:
            raise ArithmeticError("the model's logits are not finite, whatever the prompt")
        logger.warning("%d requests failed, but the engine works", self.num_lost_rows)
        self.num_lost_rows = 0

    async def _run(self, step: Step) -> Flight:
        """Run a step on its own."""
        self._loop.submit(step)
        (flight,) = await self._pipeline.drain()
        return flight
