"""The coroutine that serves: takes requests from a queue, plans steps, runs them, and delivers their tokens.

Owned by `Engine`, the interface to HTTP; knows the runner's protocol, the tokenizer's byte table and the
scheduler. `delivery.py` and `recovery.py` hold two of its tasks. Everything here runs on one event loop.
While this coroutine runs, nothing else changes the scheduler, with two exceptions, between two of its turns:
`Engine.reset_prefix_cache` makes blocks unfindable, and an engine that dies ends every request and this task.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from tgi_asgi.engine.budget import TokenBudget
from tgi_asgi.engine.channel import RequestChannel
from tgi_asgi.engine.delivery import Delivery
from tgi_asgi.engine.output import ChoiceOutput, TokenTable
from tgi_asgi.engine.pipeline import Flight, Pipeline
from tgi_asgi.engine.policy import SchedulingPolicy
from tgi_asgi.engine.prefix import HashChain, root_digest
from tgi_asgi.engine.recovery import Recovery
from tgi_asgi.engine.scheduler import Scheduler
from tgi_asgi.engine.sequence import Sequence
from tgi_asgi.engine.stats import EngineStats
from tgi_asgi.engine.step import Step
from tgi_asgi.errors import GenerationFailed, IncompleteGeneration, TgiError
from tgi_asgi.runner.plan import Runner, StepResult
from tgi_asgi.settings import Settings

logger = logging.getLogger(__name__)

_LIMIT_FACTOR = 10  # a step hangs after this many times its expected time, or `step_timeout_s` if longer
_LONG_STEP_S = 0.25  # of prompts alone; until it has the next one, the runner waits for 0.7 ms (median)


class ServingLoop:
    """The engine's coroutine and everything that it owns.

    Args:
        eos_ids: End-of-sequence ids of the model.
        on_hang: Called once when a step has run for longer than its limit, with its duration in seconds.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: TokenTable,
        settings: Settings,
        *,
        eos_ids: frozenset[int],
        stats: EngineStats,
        on_hang: Callable[[float], None],
        clock: Callable[[], float],
    ) -> None:
        traits = runner.traits
        self._budget = TokenBudget(
            max_tokens=settings.max_batch_prefill_tokens,
            block_size=traits.block_size,
            target_s=settings.target_inter_token_ms / 1000,
            min_tokens=traits.min_chunk,
        )
        policy = SchedulingPolicy.of(settings, traits)
        self.scheduler = Scheduler(traits, policy, self._budget, stats)
        self.pipeline = Pipeline(runner, on_done=self._wake, on_hang=on_hang, clock=clock)
        self._recovery = Recovery(self, self.scheduler, self.pipeline, self._budget, stats)
        self._delivery = Delivery(self, self.scheduler, self.pipeline, self._recovery, stats, clock)
        # A channel: a new request, or one that was cancelled or refused (its flags say which; it may come
        # twice, and ends once). An error: all requests end with it. None: a step is done.
        self.inbox: asyncio.Queue[RequestChannel | TgiError | None] = asyncio.Queue()
        self.is_idle = asyncio.Event()  # set while no request is open
        self.is_idle.set()
        self._runner = runner
        self._block_size = traits.block_size
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._step_timeout_s = settings.step_timeout_s
        self._stats = stats
        if settings.serves_adapters:
            stats.adapters, stats.max_adapters = self._adapter_names, settings.max_loras
        self._clock = clock
        self._open: set[RequestChannel] = set()
        self._num_arrived = 0
        self._last_done_s = 0.0

    @property
    def num_open(self) -> int:
        """Number of requests that have not ended."""
        return len(self._open)

    @property
    def channels(self) -> list[RequestChannel]:
        """The requests that have not ended; read-only."""
        return list(self._open)

    def open(self, channel: RequestChannel) -> None:
        """Queue a new request; from now on it ends exactly once."""
        self._open.add(channel)
        self.is_idle.clear()
        self._stats.accepted += 1
        self.inbox.put_nowait(channel)

    def _adapter_names(self) -> tuple[list[str], list[str]]:
        """Return the names of the adapters of running requests and of waiting requests."""
        running, waiting = set[str](), set[str]()
        for channel in self._open:
            if channel.request.adapter is not None:
                names = waiting if channel.stats.scheduled_s is None else running
                names.add(channel.request.adapter.name)
        return sorted(running), sorted(waiting)

    def waiting_newest_first(self) -> list[RequestChannel]:
        """Return the requests that have not run, been cancelled or been refused."""
        waiting = [
            channel
            for channel in self._open
            if channel.stats.scheduled_s is None and channel.refusal is None and not channel.is_cancelled
        ]
        waiting.sort(key=lambda channel: -channel.stats.arrival_s)
        return waiting

    async def run(self) -> None:
        """Serve until cancelled.

        Raises:
            Exception: if nothing can be served any more: the device is lost, or there is a bug.
        """
        while True:
            self._take(await self._next_message())
            self.take_waiting()
            while (flight := self.pipeline.pop_done()) is not None:
                await self.complete(flight)
                await self._recovery.probe_engine()
                self._fill()
                await self.flush()
            self._fill()

    def end_all(self, error: TgiError) -> None:
        """End every open request with an error, its refusal's if it has one; pending events go first."""
        self._delivery.flush_at_once()
        for channel in list(self._open):
            self.end(channel, channel.refusal or error)
        self._update_gauges()

    async def _next_message(self) -> RequestChannel | TgiError | None:
        """Wait for a message; if that really waits, a new time slice begins."""
        if not self.inbox.empty():
            return self.inbox.get_nowait()
        message = await self.inbox.get()
        self._delivery.begin_slice()
        return message

    def _wake(self) -> None:
        self.inbox.put_nowait(None)

    def take_waiting(self) -> None:
        """Handle the messages that have arrived meanwhile."""
        while not self.inbox.empty():
            self._take(self.inbox.get_nowait())

    def _take(self, message: RequestChannel | TgiError | None) -> None:
        """Handle a message of `inbox`."""
        if isinstance(message, RequestChannel):
            if message.is_cancelled:
                self.end(message, IncompleteGeneration("the request was cancelled"))
            elif message.refusal is not None:
                self.end(message, message.refusal)
            elif not message.is_ended:
                self._add(message)
        elif message is not None:
            self.end_all(message)

    def _add(self, channel: RequestChannel) -> None:
        request = channel.request
        root = root_digest(None if request.adapter is None else request.adapter.key, request.cache_salt)
        chain = HashChain(root, self._block_size, request.images)
        for choice in range(request.n):
            sequence = Sequence(
                request,
                choice,
                arrival_s=channel.stats.arrival_s,
                number=self._num_arrived,
                chain=chain,
                eos_ids=self._eos_ids,
                leader=channel.sequences[0] if choice else None,
                owner=channel,
                tenant=channel.permit.tenant,
            )
            channel.sequences.append(sequence)
            channel.outputs.append(ChoiceOutput(choice, request.stop, self._tokenizer, self._eos_ids))
        self._num_arrived += 1
        self.scheduler.add(channel.sequences)

    def _fill(self) -> None:
        """Plan and submit until enough steps are in flight or there is nothing to compute.

        Messages are handled first: requests cancelled or refused since the last step must not run.
        """
        self.take_waiting()
        while self.pipeline.has_room and not self._leaves_room_for_arrivals():
            step = self.scheduler.plan(self._clock())
            if step is None:
                break
            self.submit(step)
        self._update_gauges()

    def _leaves_room_for_arrivals(self) -> bool:
        """Whether the next step is planned only when the one in flight has finished.

        This holds for a long step of prompts alone: what arrives during it should not wait for yet another,
        and the moment for which the runner then has no work is short compared with such a step.
        """
        step = self.pipeline.newest
        if step is None or step.num_decode_rows:
            return False
        return self._budget.predict_s(step.size) > _LONG_STEP_S

    def submit(self, step: Step) -> Flight:
        """Submit a step, with a limit on its duration, and note when its requests first ran."""
        predicted_s = self._budget.predict_s(step.size)
        flight = self.pipeline.submit(step, max(self._step_timeout_s, _LIMIT_FACTOR * predicted_s))
        encoding = [each.sequence for each in step.pending_images]
        for sequence in (*step.sequences[step.num_decode_rows :], *encoding):
            stats = sequence.owner.stats
            if stats.scheduled_s is None:
                stats.scheduled_s = flight.begun_s
        return flight

    async def complete(self, flight: Flight) -> None:
        """Process a finished step."""
        error = flight.error
        if error is not None:
            await self._recovery.recover(flight.step, error)
            return
        step, result = flight.step, flight.future.result()
        duration_s = flight.done_s - flight.begun_s - result.image_s
        if step.sequences:
            self._budget.observe(step.size, duration_s, num_drafts=result.num_drafts)
            self._stats.step_s["prefill" if step.num_prefill_tokens else "decode"].observe(duration_s)
        live = self.scheduler.apply(step, result)
        # A live decode row got its last token from the step before.
        num_continued = sum(row < step.num_decode_rows for row, _ in live)
        self._stats.inter_token_s.observe(flight.done_s - self._last_done_s, num_continued)
        if result.num_drafts:
            self._count_drafts(result)
        self._last_done_s = flight.done_s
        if step.num_prefill_tokens:
            self._stats.prefill_size.observe(len(step.sequences) - step.num_decode_rows)
        self._stats.steps += 1
        self._stats.prefill_tokens += step.num_prefill_tokens
        await self._delivery.deliver(step, result, live)

    async def flush(self) -> None:
        """Pass the events of completed steps on, as `Delivery.flush`."""
        await self._delivery.flush()

    def _count_drafts(self, result: StepResult) -> None:
        stats = self._stats
        stats.drafted_rows += result.num_drafted_rows
        stats.draft_tokens += result.num_drafts
        num_accepted = sum(map(len, result.draft_samples.values()))
        stats.accepted_draft_tokens += num_accepted
        stats.inter_token_s.observe(0.0, num_accepted)  # they came with the token before

    def fail_request(self, sequence: Sequence, reason: str, cause: BaseException | None = None) -> None:
        """Fail the request of a row and keep what it wrote out of the cache.

        The log has the cause; the client gets the request id to find it there.
        """
        request_id = sequence.request.request_id
        detail = "" if cause is None else f": {cause!r}"
        logger.error("request %s, choice %d: %s%s", request_id, sequence.choice, reason, detail)
        self.scheduler.remove(sequence, forget=True)
        self.end(sequence.owner, GenerationFailed(f"{reason} (request {request_id})"))

    def end(self, channel: RequestChannel, error: TgiError | None) -> None:
        """End a request once: release everything that it holds, and report `error` to its consumer if set."""
        if channel not in self._open:
            return
        self._open.remove(channel)
        for sequence in channel.sequences:
            self.scheduler.remove(sequence)
        channel.sequences.clear()  # they know the channel, see its `flush`
        channel.permit.release(has_run=channel.stats.scheduled_s is not None)
        if channel.timer is not None:
            channel.timer.cancel()
        channel.stats.finished_s = self._clock()
        if error is None:
            self._stats.finished += 1
        elif channel.is_cancelled:
            self._stats.cancelled += 1
        else:
            self._stats.failed += 1
        if error is not None:
            channel.fail(error)
        if not self._open:
            self.is_idle.set()

    def _update_gauges(self) -> None:
        stats, scheduler = self._stats, self.scheduler
        stats.running = scheduler.num_running
        stats.waiting = scheduler.num_waiting
        stats.blocks_used = scheduler.pool.num_used
        stats.compute_threads = self._runner.num_threads
        states = scheduler.tables.states
        if states is not None:
            stats.states_kept = states.num_known
