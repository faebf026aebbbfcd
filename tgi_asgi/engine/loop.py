"""The coroutine that serves: takes requests from a queue, plans steps, runs them, delivers their tokens.

Owned by `Engine`, the interface to HTTP; knows the runner's protocol, the tokenizer's byte table and the
scheduler. Everything here runs on one event loop. While this coroutine runs, nothing else changes the
scheduler, except that `Engine.reset_prefix_cache` makes blocks unfindable between two of its turns.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tgi_asgi.engine.budget import TokenBudget
from tgi_asgi.engine.channel import RequestChannel
from tgi_asgi.engine.output import ChoiceOutput, TokenTable
from tgi_asgi.engine.pipeline import Flight, Pipeline
from tgi_asgi.engine.prefix import HashChain, root_digest
from tgi_asgi.engine.recovery import Recovery
from tgi_asgi.engine.scheduler import Scheduler
from tgi_asgi.engine.sequence import Sequence, SequenceState
from tgi_asgi.engine.stats import EngineStats
from tgi_asgi.engine.step import Step
from tgi_asgi.errors import GenerationFailed, IncompleteGeneration, InvalidRequest, TgiError
from tgi_asgi.runner.plan import Runner, Sampled, StepResult
from tgi_asgi.settings import Settings
from tgi_asgi.types import Bidirectional, FinishReason, Permit, TokenEvent

if TYPE_CHECKING:
    from tgi_asgi.types import Vector

log = logging.getLogger(__name__)

_LIMIT_FACTOR = 10  # a step hangs after this many times its expected time, or `step_timeout_s` if longer
_SLICE_S = 0.001  # longest that delivery may hold the event loop
_MAX_DELAY_S = 0.05  # longest a token may wait when the event loop is slower than the steps


class ServingLoop:
    """The engine's coroutine and everything that it owns.

    Args:
        eos_ids: End-of-sequence ids of the model.
        num_eager_blocks: As in `Scheduler`.
        on_hang: Called once when a step has run for longer than its limit, with its duration in seconds.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: TokenTable,
        settings: Settings,
        *,
        eos_ids: frozenset[int],
        num_eager_blocks: int,
        stats: EngineStats,
        on_hang: Callable[[float], None],
        clock: Callable[[], float],
    ) -> None:
        self._budget = TokenBudget(
            max_tokens=settings.max_batch_prefill_tokens,
            block_size=runner.block_size,
            target_s=settings.target_inter_token_ms / 1000,
            min_tokens=runner.min_chunk,
        )
        self.scheduler = Scheduler(
            num_blocks=runner.num_blocks,
            block_size=runner.block_size,
            max_batch_size=runner.max_batch_size,
            max_step_tokens=runner.max_step_tokens,
            budget=self._budget,
            stats=stats,
            num_eager_blocks=num_eager_blocks,
            vision=runner.vision,
            prefix_cache=(
                settings.prefix_cache
                and runner.num_kept_states != 0
                and runner.vision is not Bidirectional.PROMPT
            ),
            num_kept_states=runner.num_kept_states,
            takes_whole_prompts=runner.takes_whole_prompts,
            has_prompt_arithmetic=runner.has_prompt_arithmetic,
            drafts=runner.drafts,
            windows=runner.windows,
            waiting_served_ratio=settings.waiting_served_ratio,
            max_waiting_steps=settings.max_waiting_tokens,
            max_adapters=settings.max_loras,
        )
        self.pipeline = Pipeline(runner, on_done=self._wake, on_hang=on_hang, clock=clock)
        self._recovery = Recovery(self, self.scheduler, self.pipeline, self._budget, stats)
        # A channel: a new request, or one that was cancelled or refused (its flags say which; it may come
        # twice, and ends once). An error: all requests end with it. None: a step is done.
        self.inbox: asyncio.Queue[RequestChannel | TgiError | None] = asyncio.Queue()
        self.is_idle = asyncio.Event()  # set while no request is open
        self.is_idle.set()
        self._runner = runner
        self._block_size = runner.block_size
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._step_timeout_s = settings.step_timeout_s
        self._stats = stats
        if settings.serves_adapters:
            stats.adapters, stats.max_adapters = self._adapter_names, settings.max_loras
        self._clock = clock
        self._open: set[RequestChannel] = set()
        self._touched: dict[RequestChannel, None] = {}  # with events to flush, in order
        self._num_arrived = 0
        self._yield_at = 0.0  # when delivery must next let the event loop run
        self._flush_by: float | None = None  # when the tokens waiting in `_touched` must leave
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

    def waiting_newest_first(self) -> dict[Permit, RequestChannel]:
        """Return the requests that have not run, been cancelled or been refused, by their permits."""
        waiting = [
            channel
            for channel in self._open
            if channel.stats.scheduled_s is None and channel.refusal is None and not channel.is_cancelled
        ]
        waiting.sort(key=lambda channel: -channel.stats.arrival_s)
        return {channel.permit: channel for channel in waiting}

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
        for channel in self._touched:
            channel.flush()
        self._touched.clear()
        for channel in list(self._open):
            self._end(channel, channel.refusal or error)
        self._update_gauges()

    async def _next_message(self) -> RequestChannel | TgiError | None:
        """Wait for a message; if that really waits, a new time slice begins."""
        if not self.inbox.empty():
            return self.inbox.get_nowait()
        message = await self.inbox.get()
        self._yield_at = self._clock() + _SLICE_S
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
                self._end(message, IncompleteGeneration("the request was cancelled"))
            elif message.refusal is not None:
                self._end(message, message.refusal)
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
        """Plan and submit until two steps are in flight or there is nothing to compute.

        Messages are handled first: requests cancelled or refused since the last step must not run.
        """
        self.take_waiting()
        while self.pipeline.has_room:
            step = self.scheduler.plan(self._clock())
            if step is None:
                break
            self.submit(step)
        self._update_gauges()

    def submit(self, step: Step) -> Flight:
        """Submit a step, with a limit on its duration, and note when its requests first ran."""
        predicted_s = self._budget.predict_s(step.num_decode_rows, step.num_prefill_tokens)
        flight = self.pipeline.submit(step, max(self._step_timeout_s, _LIMIT_FACTOR * predicted_s))
        encoding = [each.sequence for each in step.pending_images]
        for sequence in (*step.sequences[step.num_decode_rows :], *encoding):
            stats = sequence.owner.stats
            if stats.scheduled_s is None:
                stats.scheduled_s = flight.begun_s
                if sequence.owner.timer is not None:
                    sequence.owner.timer.cancel()
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
            self._budget.observe(
                step.num_decode_rows, step.num_prefill_tokens, duration_s, num_drafts=result.num_drafts
            )
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
        await self._deliver(step, result, live)

    def _count_drafts(self, result: StepResult) -> None:
        stats = self._stats
        stats.drafted_rows += result.num_drafted_rows
        stats.draft_tokens += result.num_drafts
        num_accepted = sum(map(len, result.draft_samples.values()))
        stats.accepted_draft_tokens += num_accepted
        stats.inter_token_s.observe(0.0, num_accepted)  # they came with the token before

    async def _deliver(self, step: Step, result: StepResult, live: list[tuple[int, Sequence]]) -> None:
        """Turn live rows' results into events and end finished requests; `flush` passes the events on."""
        now = self._clock()
        for row, sequence in live:
            if sequence.state is SequenceState.FINISHED:
                continue  # another choice of the request failed in this step
            channel: RequestChannel = sequence.owner
            if row in result.prompt_logprobs:
                self._keep_prompt_logprobs(channel, step, row, result)
            if row in result.pooled:
                self._end_pooled(sequence, result.pooled[row], now)
                continue
            sampled = result.sampled[row]
            if sampled is None:
                continue
            self._deliver_token(sequence, sampled, now)
            self._deliver_draft_samples(sequence, result.draft_samples.get(row, []), now)
            if self._clock() > self._yield_at:
                await self._yield_to_loop()

    def _deliver_draft_samples(self, sequence: Sequence, draft_samples: list[Sampled], now: float) -> None:
        """Turn the tokens from drafts into events, up to the one that ends the sequence."""
        for count, sampled in enumerate(draft_samples):
            if sequence.state is SequenceState.FINISHED:
                draft_samples = draft_samples[:count]
                break
            self._deliver_token(sequence, sampled, now)
        self._stats.skipped_tokens.observe(len(draft_samples))

    def _deliver_token(self, sequence: Sequence, sampled: Sampled, now: float) -> None:
        """Turn a token into an event, and end the sequence or request that it ends."""
        channel: RequestChannel = sequence.owner
        if not sampled.is_finite and sequence.request.grammar and sequence.request.sampling.logit_bias:
            self.scheduler.remove(sequence)
            self._end(channel, InvalidRequest("`logit_bias` leaves no token that the grammar allows"))
            return
        if not sampled.is_finite:
            self._recovery.num_lost_rows += 1
            self.fail_request(sequence, "the model's logits were not finite")
            return
        if sampled.failure is not None:
            # The request exceeded a limit; clients would resend the request after a 500.
            log.warning(
                "request %s, choice %d: grammar: %s",
                sequence.request.request_id, sequence.choice, sampled.failure,
            )  # fmt: skip
            self.scheduler.remove(sequence, forget=True)
            self._end(channel, InvalidRequest(f"the grammar cannot go on: {sampled.failure}"))
            return
        stats = channel.stats
        stats.generated_tokens += 1
        if stats.first_token_s is None:
            stats.first_token_s = now
            stats.cached_tokens = sequence.num_cached or 0
        try:
            event = channel.outputs[sequence.choice].push(sampled)
        except Exception as error:
            log.exception("request %s: token %d", channel.request.request_id, sampled.token_id)
            self.fail_request(sequence, f"token {sampled.token_id} has no text", error)
            return
        channel.push(event)
        self._touched[channel] = None
        self._stats.sampled_tokens += 1
        self._recovery.num_lost_rows = 0
        if event.finish is not None:
            self.scheduler.remove(sequence)
            if channel.is_ended:
                self._end(channel, None)

    def _end_pooled(self, sequence: Sequence, vector: Vector, now: float) -> None:
        """End a request for a vector; its only event carries nothing but the finish reason."""
        channel: RequestChannel = sequence.owner
        if not bool(np.isfinite(vector).all()):
            self._recovery.num_lost_rows += 1
            self.fail_request(sequence, "the model's hidden states were not finite")
            return
        stats = channel.stats
        stats.vector, stats.first_token_s = vector, now
        stats.cached_tokens = sequence.num_cached or 0
        self._recovery.num_lost_rows = 0
        channel.push(TokenEvent(0, 0, finish=FinishReason.STOP))
        self._touched[channel] = None
        self.scheduler.remove(sequence)
        self._end(channel, None)

    def _keep_prompt_logprobs(
        self, channel: RequestChannel, step: Step, row: int, result: StepResult
    ) -> None:
        known = channel.stats.prompt_logprobs or []
        del known[step.plan.rows[row].start :]  # computed twice after a preemption
        known.extend(result.prompt_logprobs[row])
        channel.stats.prompt_logprobs = known

    async def flush(self) -> None:
        """Pass new events on, one call per request, and yield to the event loop in between.

        First tokens and ends go first. If the next step is already done, the event loop is the bottleneck:
        the other events then wait up to `_MAX_DELAY_S` and leave with later tokens in larger frames.
        """
        urgent = [channel for channel in self._touched if channel.is_urgent]
        others = [channel for channel in self._touched if not channel.is_urgent]
        now = self._clock()
        if self.pipeline.has_done and now < (self._flush_by or now + _MAX_DELAY_S):
            self._flush_by = self._flush_by or now + _MAX_DELAY_S
            others = []
        else:
            self._flush_by = None
        for channel in urgent + others:
            # Removed one by one: if the engine ends while this yields, `end_all` finds the rest.
            self._touched.pop(channel, None)
            channel.flush()
            if self._clock() > self._yield_at:
                await self._yield_to_loop()

    async def _yield_to_loop(self) -> None:
        await asyncio.sleep(0)
        self._yield_at = self._clock() + _SLICE_S

    def fail_request(self, sequence: Sequence, reason: str, cause: BaseException | None = None) -> None:
        """Fail the request of a row and keep what it wrote out of the cache.

        The log has the cause; the client gets the request id to find it there.
        """
        request_id = sequence.request.request_id
        detail = "" if cause is None else f": {cause!r}"
        log.error("request %s, choice %d: %s%s", request_id, sequence.choice, reason, detail)
        self.scheduler.remove(sequence, forget=True)
        self._end(sequence.owner, GenerationFailed(f"{reason} (request {request_id})"))

    def _end(self, channel: RequestChannel, error: TgiError | None) -> None:
        """End a request once: release everything that it holds, and report `error` to its consumer if set."""
        if channel not in self._open:
            return
        self._open.remove(channel)
        for sequence in channel.sequences:
            self.scheduler.remove(sequence)
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
