"""The one coroutine that serves: takes requests from a queue, plans steps, runs them, delivers their tokens.

    engine = Engine(runner, tokenizer, settings, info, on_fatal=lambda error: os._exit(1))
    engine.start()
    channel = engine.submit(request, engine.acquire(request.n))
    async for events in channel: ...
    await engine.drain(timeout_s=90)
    await engine.stop()

HTTP calls it; it knows the runner's protocol, the tokenizer's byte table and the scheduler, and not HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from tgi_asgi.engine.admission import Admission, AdmissionPermit
from tgi_asgi.engine.budget import TokenBudget
from tgi_asgi.engine.channel import RequestChannel
from tgi_asgi.engine.output import ChoiceOutput, TokenTable
from tgi_asgi.engine.pipeline import Flight, Pipeline
from tgi_asgi.engine.prefix import HashChain, root_digest
from tgi_asgi.engine.scheduler import Scheduler, Step
from tgi_asgi.engine.sequence import Sequence, SequenceState
from tgi_asgi.engine.stats import EngineStats
from tgi_asgi.errors import GenerationFailed, IncompleteGeneration, InvalidRequest, TgiError, Unavailable
from tgi_asgi.runner.plan import DeviceLost, Runner, StepResult
from tgi_asgi.settings import Settings
from tgi_asgi.types import EngineState, GenerationRequest, ModelInfo, Permit

log = logging.getLogger(__name__)

AGING_S = 30.0  # seconds of waiting that make up for one level of priority
_LIMIT_FACTOR = 10  # a step hangs when it takes that many times what it should, and `step_timeout_s`
_SLICE_S = 0.001  # delivery holds the loop no longer
_MAX_LOST_ROWS = 16  # rows that failed with no good step between them: the fault is not in the requests


class Engine:
    """Serve requests with one runner, on the event loop that calls `start`.

    Args:
        runner: computes the steps; the caller closes it after `stop`.
        on_fatal: called once if the engine dies (a hung step, a lost device, a bug); every request has had
            its error by then, and the process should end.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: TokenTable,
        settings: Settings,
        info: ModelInfo,
        *,
        on_fatal: Callable[[TgiError], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stats = EngineStats()
        self.stats.blocks_total = runner.num_blocks
        self.admission = Admission(settings.max_concurrent_requests, clock)
        self._budget = TokenBudget(
            max_tokens=settings.max_batch_prefill_tokens,
            block_size=runner.block_size,
            target_s=settings.target_inter_token_ms / 1000,
        )
        self.scheduler = Scheduler(
            num_blocks=runner.num_blocks,
            block_size=runner.block_size,
            max_batch_size=runner.max_batch_size,
            max_step_tokens=runner.max_step_tokens,
            budget=self._budget,
            stats=self.stats,
            prefix_cache=settings.prefix_cache,
        )
        self._pipeline = Pipeline(runner, on_done=self._wake, on_hang=self._on_hang, clock=clock)
        self._runner = runner
        self._tokenizer = tokenizer
        self._eos_ids = tokenizer.eos_ids | info.eos_token_ids
        self._max_total_tokens = info.max_total_tokens
        self._step_timeout_s = settings.step_timeout_s
        self.on_fatal = on_fatal
        self._clock = clock
        self._state = EngineState.LOADING
        self._inbox: asyncio.Queue[RequestChannel | TgiError | None] = asyncio.Queue()
        self._open: set[RequestChannel] = set()
        self._touched: dict[RequestChannel, None] = {}  # with events to flush, in order
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._num_arrived = 0
        self._num_lost_rows = 0
        self._yield_at = 0.0
        self._last_done_s = 0.0
        self._task: asyncio.Task[None] | None = None

    # What HTTP calls

    @property
    def state(self) -> EngineState:
        return self._state

    def start(self) -> None:
        """Begin to serve."""
        assert self._task is None, "an engine starts once"
        self._state = EngineState.READY
        self._task = asyncio.create_task(self._run(), name="engine")

    def acquire(self, n: int) -> AdmissionPermit:
        """Take room for n choices; raises `Overloaded` or `Unavailable`."""
        self._check_state()
        return self.admission.acquire(n)

    def submit(self, request: GenerationRequest, permit: Permit) -> RequestChannel:
        """Queue a request. The permit is released at its end, or at once if this raises.

        Raises:
            InvalidRequest: the request could never run in this KV cache.
            Unavailable: the engine is draining or dead.
        """
        try:
            self._check_state()
            self._check_size(request)
        except TgiError:
            permit.release()
            raise
        channel = RequestChannel(request, permit, self._inbox.put_nowait, self._clock())
        self._open.add(channel)
        self._is_idle.clear()
        self.stats.accepted += 1
        self._inbox.put_nowait(channel)
        return channel

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new and let what runs finish; what has not by then gets `IncompleteGeneration`."""
        if self._state is EngineState.READY:
            self._state = EngineState.DRAINING
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
        except TimeoutError:
            log.warning("%d requests did not finish within %g s and are cut off", len(self._open), timeout_s)
            self._inbox.put_nowait(IncompleteGeneration("the server is shutting down"))
            await self._is_idle.wait()

    async def stop(self) -> None:
        """End every request with an error now, and wait for the steps in flight."""
        if self._state is not EngineState.DEAD:
            self._state = EngineState.DRAINING
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._end_all(IncompleteGeneration("the server is shutting down"))
        if self._state is not EngineState.DEAD:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._step_timeout_s):
                    await self._pipeline.drain()
        self._pipeline.close()

    def _check_state(self) -> None:
        if self._state is not EngineState.READY:
            raise Unavailable(f"the engine is {self._state.value}")

    def _check_size(self, request: GenerationRequest) -> None:
        num_tokens = len(request.prompt_ids) + request.stop.max_tokens
        if num_tokens > self._max_total_tokens:
            raise InvalidRequest(
                f"prompt and max_tokens must not exceed {self._max_total_tokens} tokens together, "
                f"got {len(request.prompt_ids)} + {request.stop.max_tokens}",
                code="context_length_exceeded",
            )
        # The last token drawn is never fed back.
        if self.scheduler.tables.blocks_for(num_tokens - 1) > self._runner.num_blocks:
            raise InvalidRequest(
                f"prompt and max_tokens need {num_tokens - 1} tokens of KV cache, which has "
                f"{self._runner.num_blocks * self._runner.block_size}",
                code="context_length_exceeded",
            )

    # The coroutine

    async def _run(self) -> None:
        try:
            while True:
                self._take(await self._next_message())
                while not self._inbox.empty():
                    self._take(self._inbox.get_nowait())
                while (flight := self._pipeline.pop_done()) is not None:
                    await self._complete(flight)
                    self._fill()
                    await self._flush()
                self._fill()
        except Exception as error:
            log.exception("the engine failed")
            self._die(GenerationFailed(f"the engine failed: {error}"))

    async def _next_message(self) -> RequestChannel | TgiError | None:
        """Wait for a message; where that really waits, a new slice of the loop's time begins."""
        if not self._inbox.empty():
            return self._inbox.get_nowait()
        message = await self._inbox.get()
        self._yield_at = self._clock() + _SLICE_S
        return message

    def _wake(self) -> None:
        self._inbox.put_nowait(None)

    def _take(self, message: RequestChannel | TgiError | None) -> None:
        """Handle a message: a channel is new or cancelled, an error ends all, None means a step is done."""
        if isinstance(message, RequestChannel):
            if message.is_cancelled:
                self._end(message, IncompleteGeneration("the request was cancelled"))
            elif not message.is_ended:
                self._add(message)
        elif message is not None:
            self._end_all(message)

    def _add(self, channel: RequestChannel) -> None:
        request = channel.request
        urgency = channel.stats.arrival_s + request.priority * AGING_S
        chain = HashChain(root_digest(request.adapter, request.cache_salt), self._runner.block_size)
        for choice in range(request.n):
            sequence = Sequence(
                request,
                choice,
                urgency=(urgency, self._num_arrived, choice),
                chain=chain,
                eos_ids=self._eos_ids,
                leader=channel.sequences[0] if choice else None,
                owner=channel,
            )
            channel.sequences.append(sequence)
            channel.outputs.append(ChoiceOutput(choice, request.stop, self._tokenizer, self._eos_ids))
        self._num_arrived += 1
        self.scheduler.add(channel.sequences)

    def _fill(self) -> None:
        """Plan and submit until two steps are in flight or there is nothing to compute."""
        while self._pipeline.has_room:
            step = self.scheduler.plan()
            if step is None:
                break
            self._submit(step)
        self._show()

    def _submit(self, step: Step) -> Flight:
        predicted_s = self._budget.predict_s(step.num_prefill_tokens)
        flight = self._pipeline.submit(step, max(self._step_timeout_s, _LIMIT_FACTOR * predicted_s))
        for sequence in step.sequences[step.num_decode_rows :]:
            stats = sequence.owner.stats
            if stats.scheduled_s is None:
                stats.scheduled_s = flight.begun_s
                stats.cached_tokens = sequence.num_cached or 0
        return flight

    async def _complete(self, flight: Flight) -> None:
        """Take over a finished step."""
        error = flight.error
        if error is not None:
            await self._recover(flight.step, error)
            return
        step, duration_s = flight.step, flight.done_s - flight.begun_s
        self._budget.observe(step.num_prefill_tokens, duration_s)
        self.stats.step_s["prefill" if step.num_prefill_tokens else "decode"].observe(duration_s)
        # A decode row had its last token from the step before.
        self.stats.inter_token_s.observe(flight.done_s - self._last_done_s, step.num_decode_rows)
        self._last_done_s = flight.done_s
        if step.num_prefill_tokens:
            self.stats.prefill_size.observe(len(step.sequences) - step.num_decode_rows)
        self.stats.steps += 1
        self.stats.batch_size = len(step.sequences)
        self.stats.prefill_tokens += step.num_prefill_tokens
        self._num_lost_rows = 0
        await self._deliver(step, flight.future.result())

    async def _deliver(self, step: Step, result: StepResult) -> None:
        """Turn a result into events and end what has ended; `_flush` hands them on."""
        now = self._clock()
        for row, sequence in self.scheduler.apply(step, result):
            if sequence.state is SequenceState.FINISHED:
                continue  # a sibling failed in this same step
            channel: RequestChannel = sequence.owner
            if row in result.prompt_logprobs:
                self._keep_prompt_logprobs(channel, step, row, result)
            sampled = result.sampled[row]
            if sampled is None:
                continue
            if not sampled.is_finite:
                self._lose(sequence, "the model's logits were not finite")
                continue
            stats = channel.stats
            stats.generated_tokens += 1
            if stats.first_token_s is None:
                stats.first_token_s = now
            event = channel.outputs[sequence.choice].push(sampled)
            channel.push(event)
            self._touched[channel] = None
            self.stats.sampled_tokens += 1
            if event.finish is not None:
                self.scheduler.remove(sequence)
                if channel.is_ended:
                    self._end(channel, None)
            if self._clock() > self._yield_at:
                await self._breathe()

    def _keep_prompt_logprobs(
        self, channel: RequestChannel, step: Step, row: int, result: StepResult
    ) -> None:
        known = channel.stats.prompt_logprobs or []
        del known[step.plan.rows[row].start :]  # computed twice after a preemption
        known.extend(result.prompt_logprobs[row])
        channel.stats.prompt_logprobs = known

    async def _flush(self) -> None:
        """Hand on what is new, one call a request, and let the loop do other things in between."""
        touched, self._touched = self._touched, {}
        for channel in touched:
            channel.flush()
            if self._clock() > self._yield_at:
                await self._breathe()

    async def _breathe(self) -> None:
        await asyncio.sleep(0)
        self._yield_at = self._clock() + _SLICE_S

    # Faults and ends

    async def _recover(self, failed: Step, error: BaseException) -> None:
        """Run the rows of a failed step again by halves, until those that make it fail are alone."""
        following = await self._pipeline.drain()
        for flight in reversed(following):
            self.scheduler.rollback(flight.step)
        pending = [(failed, error, range(len(failed.sequences)))]
        while pending:
            step, error, rows = pending.pop()
            if isinstance(error, DeviceLost):
                raise error
            log.error("step %d failed with %d rows: %r", step.plan.step_id, len(rows), error)
            self.stats.failed_steps += 1
            self.scheduler.rollback(step)
            if len(rows) == 1:
                self._lose(step.sequences[rows[0]], f"the model failed on this request: {error!r}")
                continue
            middle = len(rows) // 2
            for half in (rows[:middle], rows[middle:]):
                again = self.scheduler.retry(step, half)
                if again is not None:
                    self._submit(again)
                    (flight,) = await self._pipeline.drain()
                    if flight.error is None:
                        await self._complete(flight)
                        await self._flush()
                    else:
                        pending.append((again, flight.error, range(len(again.sequences))))

    def _lose(self, sequence: Sequence, reason: str) -> None:
        """Fail the request of a row; what it wrote is not to be found in the cache."""
        self.scheduler.remove(sequence, forget=True)
        self._end(sequence.owner, GenerationFailed(reason))
        self._num_lost_rows += 1
        if self._num_lost_rows >= _MAX_LOST_ROWS:
            raise DeviceLost(f"{self._num_lost_rows} rows failed one after the other: {reason}")

    def _end(self, channel: RequestChannel, error: TgiError | None) -> None:
        """End a request once: give back all that it holds, and tell its taker if it is an error."""
        if channel not in self._open:
            return
        self._open.remove(channel)
        for sequence in channel.sequences:
            self.scheduler.remove(sequence)
        channel.permit.release()
        channel.stats.finished_s = self._clock()
        if error is None:
            self.stats.finished += 1
        elif channel.is_cancelled:
            self.stats.cancelled += 1
        else:
            self.stats.failed += 1
        if error is not None:
            channel.fail(error)
        if not self._open:
            self._is_idle.set()

    def _end_all(self, error: TgiError) -> None:
        for channel in list(self._open):
            self._end(channel, error)
        self._show()

    def _on_hang(self, taken_s: float) -> None:
        self._die(GenerationFailed(f"a step has not ended after {taken_s:.0f} s"))
        if self._task is not None:
            self._task.cancel()

    def _die(self, error: TgiError) -> None:
        """Be dead: refuse everything, end every request, tell the owner of the process."""
        if self._state is EngineState.DEAD:
            return
        self._state = EngineState.DEAD
        log.critical("the engine is dead: %s", error)
        self._pipeline.close()
        self._end_all(error)
        if self.on_fatal is not None:
            self.on_fatal(error)

    def _show(self) -> None:
        stats, scheduler = self.stats, self.scheduler
        stats.running = scheduler.num_running
        stats.waiting = scheduler.num_waiting
        stats.blocks_used = scheduler.pool.num_used
