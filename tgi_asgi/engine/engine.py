"""The engine's interface to HTTP: permits, requests in, channels out; ready, draining or dead.

    engine = Engine(runner, tokenizer, settings, info)
    engine.on_fatal = end_the_process
    engine.start()
    engine.submit(request, engine.acquire(request.n)).attach(sink)
    await engine.drain(timeout_s=90)
    await engine.stop()

`loop.py` does the work in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from tgi_asgi.engine.admission import Admission, AdmissionPermit
from tgi_asgi.engine.channel import RequestChannel
from tgi_asgi.engine.describe import describe
from tgi_asgi.engine.loop import ServingLoop
from tgi_asgi.engine.output import TokenTable
from tgi_asgi.engine.request_check import check_request
from tgi_asgi.engine.scheduler import Scheduler
from tgi_asgi.engine.stats import EngineStats
from tgi_asgi.errors import (
    GenerationFailed,
    IncompleteGeneration,
    Overloaded,
    RequestAborted,
    TgiError,
    Unavailable,
)
from tgi_asgi.model_info import ModelInfo
from tgi_asgi.runner.plan import Runner
from tgi_asgi.settings import Settings
from tgi_asgi.types import EngineState, GenerationRequest, Permit

logger = logging.getLogger(__name__)


class Engine:
    """A server of requests with one runner, on the event loop that calls `start`.

    Args:
        runner: Computes the steps; `stop` closes it.

    Attributes:
        on_fatal: Called once if the engine dies (a hung step, a lost device, a bug). Every request has
            received its error by then, and the process should end.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: TokenTable,
        settings: Settings,
        info: ModelInfo,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.on_fatal: Callable[[TgiError], None] | None = None
        self.stats = EngineStats()
        self.stats.blocks_total = runner.traits.num_blocks
        self.admission = Admission(settings.max_concurrent_requests, clock)
        # A tokenizer may have more ids than the model has logits; an EOS id beyond them must not be masked.
        eos_ids = frozenset(i for i in tokenizer.eos_ids | info.eos_token_ids if i < info.vocab_size)
        self._loop = ServingLoop(
            runner,
            tokenizer,
            settings,
            eos_ids=eos_ids,
            stats=self.stats,
            on_hang=self._on_hang,
            clock=clock,
        )
        self._runner = runner
        self._max_total_tokens = info.max_total_tokens
        self._step_timeout_s = settings.step_timeout_s
        self._queue_timeout_s = settings.queue_timeout_s
        self._clock = clock
        self._state = EngineState.LOADING
        self._task: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._has_drained = False  # what is left of the accepted requests is being ended
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._lost: str | None = None

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler, with the running and waiting sequences and the block pool; read-only."""
        return self._loop.scheduler

    def describe(self) -> dict[str, Any]:
        """Return the engine's current state for people to read, in JSON types only."""
        return describe(self.admission, self.scheduler.tables, self._loop.channels, self.stats, self._clock())

    def start(self) -> None:
        """Start serving."""
        assert self._task is None, "an engine starts once"
        self._state = EngineState.READY
        self._event_loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._loop.run(), name="engine")
        self._task.add_done_callback(self._on_end)
        self._event_loop.call_soon(self._on_loss)  # in case `mark_lost` was called before

    def acquire(self, n: int, tenant: str | None = None, *, is_accepted: bool = False) -> AdmissionPermit:
        """Take a permit for n choices.

        If none is free, a tenant that holds fewer choices than another displaces the other's newest request
        that has not begun to run; the displaced request fails with `Overloaded`.

        Args:
            is_accepted: Whether an accepted call needs more permits: it goes on while the engine drains.

        Raises:
            InvalidRequest: if n exceeds the number of permits.
            Overloaded: if no permit is free or can be freed.
            Unavailable: if the engine is draining or dead.
        """
        self._check_state(is_accepted=is_accepted)
        self.admission.make_room(n, tenant, self._loop.waiting_newest_first)
        return self.admission.acquire(n, tenant)

    def submit(self, request: GenerationRequest, permit: Permit) -> RequestChannel:
        """Queue a request. Its permit is released when the request ends, or at once if this raises.

        A request whose permit was taken before the engine began to drain is still served.

        Raises:
            InvalidRequest: if the request could never run in this KV cache.
            Unavailable: if the engine is dead, or has drained for as long as it may.
        """
        try:
            self._check_state(is_accepted=True)
            check_request(request, self._max_total_tokens, self._runner.traits, self.scheduler)
        except TgiError:
            permit.release()
            raise
        channel = RequestChannel(request, permit, self._loop.inbox.put_nowait, self._clock())
        self._loop.open(channel)
        if self._queue_timeout_s:
            loop = asyncio.get_running_loop()
            channel.timer = loop.call_later(self._queue_timeout_s, self._on_late, channel)
        return channel

    def _on_late(self, channel: RequestChannel) -> None:
        """Refuse a request that has waited too long for its first step."""
        if channel.stats.scheduled_s is None:
            retry_after_s = self.admission.retry_after_s(channel.permit.n)
            channel.refuse(
                Overloaded(f"No room within {self._queue_timeout_s:g} s", retry_after_s=retry_after_s)
            )

    def abort(self, request_id: str) -> int:
        """End the requests with this id, running or waiting, with an error; return how many there were."""
        error = RequestAborted("the request was aborted")
        named = [channel for channel in self._loop.channels if channel.request.request_id == request_id]
        return sum(channel.refuse(error) for channel in named)

    def reset_prefix_cache(self) -> int:
        """Drop all cached prompts; return the number of blocks dropped. Blocks in use stay allocated."""
        return self.scheduler.pool.reset()

    def mark_lost(self, reason: str) -> None:
        """Mark the engine dead because a part of its runner is lost; from any thread, at any time."""
        self._lost = reason
        if self._event_loop is not None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                self._event_loop.call_soon_threadsafe(self._on_loss)

    def _on_loss(self) -> None:
        if not self._is_stopping and self._lost is not None:
            self._die(GenerationFailed(self._lost))

    async def drain(self, timeout_s: float) -> None:
        """Accept nothing new and let all who hold a permit finish; at the timeout, end the rest.

        Of the requests left at the timeout, those that have begun get `IncompleteGeneration`, and those that
        have not get `Unavailable`, which load balancers send to another server.
        """
        if self._state is EngineState.READY:
            self._state = EngineState.DRAINING
        try:
            async with asyncio.timeout(timeout_s):
                await self.admission.is_idle.wait()  # also those whose prompts are still being tokenised
                await self._loop.is_idle.wait()
        except TimeoutError:
            logger.warning("%d requests did not finish within %g s", self._loop.num_open, timeout_s)
            self._has_drained = True
            self._refuse_waiting()
            self._loop.inbox.put_nowait(IncompleteGeneration("the server is shutting down"))
            await self._loop.is_idle.wait()

    async def stop(self) -> None:
        """End every request now as `drain` does, wait for the steps in flight, and close the runner."""
        self._is_stopping = self._has_drained = True
        if self._state is not EngineState.DEAD:
            self._state = EngineState.DRAINING
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._refuse_waiting()
        self._loop.end_all(IncompleteGeneration("the server is shutting down"))
        if self._state is not EngineState.DEAD:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._step_timeout_s):
                    await self._loop.pipeline.drain()
                self._runner.close()  # it would otherwise wait for the steps
        self._loop.pipeline.close()

    def _refuse_waiting(self) -> None:
        for channel in self._loop.waiting_newest_first():
            channel.refuse(Unavailable("the server is shutting down"))

    def _check_state(self, *, is_accepted: bool) -> None:
        goes_on = is_accepted and self._state is EngineState.DRAINING and not self._has_drained
        if self._state is not EngineState.READY and not goes_on:
            raise Unavailable(f"the engine is {self._state.value}")

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """Mark the engine dead when the loop has ended for any reason other than `stop`."""
        error = None if task.cancelled() else task.exception()
        if not self._is_stopping:
            logger.error("the engine's task has ended", exc_info=error)
            self._die(GenerationFailed(f"the engine failed: {error or 'its task was cancelled'}"))

    def _on_hang(self, taken_s: float) -> None:
        self._die(GenerationFailed(f"a step has not ended after {taken_s:.0f} s"))

    def _die(self, error: TgiError) -> None:
        """Mark the engine dead: end its task and every request, and notify the owner of the process."""
        if self._state is EngineState.DEAD:
            return
        self._state = EngineState.DEAD
        logger.critical("the engine is dead: %s", error)
        self._loop.pipeline.close()
        if self._task is not None:
            self._task.cancel()
        self._loop.end_all(GenerationFailed("the engine has failed"))  # the cause is in the log
        if self.on_fatal is not None:
            self.on_fatal(error)
