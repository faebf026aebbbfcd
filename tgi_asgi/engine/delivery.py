"""Turns the results of steps into events of their requests, and passes the events on in short time slices.

Owned by the engine's loop, which ends requests; knows the scheduler, from which it removes what has finished.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tgi_asgi.engine.channel import RequestChannel
from tgi_asgi.engine.pipeline import Pipeline
from tgi_asgi.engine.recovery import Recovery
from tgi_asgi.engine.scheduler import Scheduler
from tgi_asgi.engine.sequence import Sequence, Stage
from tgi_asgi.engine.stats import EngineStats
from tgi_asgi.engine.step import Step
from tgi_asgi.errors import InvalidRequest, TgiError
from tgi_asgi.runner.plan import Sampled, StepResult
from tgi_asgi.types import FinishReason, TokenEvent

if TYPE_CHECKING:
    from tgi_asgi.types import Vector

logger = logging.getLogger(__name__)

_SLICE_S = 0.001  # longest that delivery may hold the event loop
_MAX_DELAY_S = 0.05  # longest a token may wait when the event loop is slower than the steps


class Requests(Protocol):
    """What delivery needs of the engine's loop: to end requests."""

    def end(self, channel: RequestChannel, error: TgiError | None) -> None: ...

    def fail_request(self, sequence: Sequence, reason: str, cause: BaseException | None = None) -> None: ...


class Delivery:
    """The events that steps have made and requests have not yet got."""

    def __init__(
        self,
        requests: Requests,
        scheduler: Scheduler,
        pipeline: Pipeline,
        recovery: Recovery,
        stats: EngineStats,
        clock: Callable[[], float],
    ) -> None:
        self._requests = requests
        self._scheduler = scheduler
        self._pipeline = pipeline
        self._recovery = recovery
        self._stats = stats
        self._clock = clock
        self._touched: dict[RequestChannel, None] = {}  # with events to flush, in order
        self._yield_at = 0.0  # when delivery must next let the event loop run
        self._flush_by: float | None = None  # when the tokens waiting in `_touched` must leave

    def begin_slice(self) -> None:
        """Note that the event loop has just run other work."""
        self._yield_at = self._clock() + _SLICE_S

    async def deliver(self, step: Step, result: StepResult, live: list[tuple[int, Sequence]]) -> None:
        """Turn live rows' results into events and end finished requests; `flush` passes the events on."""
        now = self._clock()
        for row, sequence in live:
            if sequence.stage is Stage.FINISHED:
                continue  # another choice of the request failed in this step
            channel: RequestChannel = sequence.owner
            if row in result.prompt_logprobs:
                self._keep_prompt_logprobs(channel, step, row, result)
            if row in result.pooled:
                self._end_pooled(sequence, result.pooled[row], now)
            elif (sampled := result.sampled[row]) is not None:
                self._deliver_token(sequence, sampled, now)
                self._deliver_draft_samples(sequence, result.draft_samples.get(row, []), now)
            if self._clock() > self._yield_at:
                await self._yield_to_loop()

    def _deliver_draft_samples(self, sequence: Sequence, draft_samples: list[Sampled], now: float) -> None:
        """Turn the tokens from drafts into events, up to the one that ends the sequence."""
        for count, sampled in enumerate(draft_samples):
            if sequence.stage is Stage.FINISHED:
                draft_samples = draft_samples[:count]
                break
            self._deliver_token(sequence, sampled, now)
        self._stats.skipped_tokens.observe(len(draft_samples))

    def _deliver_token(self, sequence: Sequence, sampled: Sampled, now: float) -> None:
        """Turn a token into an event, and end the sequence or request that it ends."""
        channel: RequestChannel = sequence.owner
        if not sampled.is_finite and sequence.request.grammar and sequence.request.sampling.logit_bias:
            why = "`logit_bias` and the model's `suppress_tokens` leave no token that the grammar allows"
            self._recovery.note_lost_row()  # the logits may be NaN instead: a probe finds out
            self._requests.end(channel, InvalidRequest(why))
            return
        if not sampled.is_finite:
            self._recovery.fail_row(sequence, "the model's logits were not finite")
            return
        if sampled.failure is not None:
            # The request exceeded a limit; clients would resend the request after a 500.
            logger.warning(
                "request %s, choice %d: grammar: %s",
                sequence.request.request_id, sequence.choice, sampled.failure,
            )  # fmt: skip
            self._requests.end(channel, InvalidRequest(f"the grammar cannot go on: {sampled.failure}"))
            return
        stats = channel.stats
        stats.generated_tokens += 1
        if stats.first_token_s is None:
            stats.first_token_s = now
            stats.cached_tokens = sequence.num_cached or 0
        try:
            event = channel.outputs[sequence.choice].push(sampled)
        except Exception as error:
            logger.exception("request %s: token %d", channel.request.request_id, sampled.token_id)
            self._requests.fail_request(sequence, f"token {sampled.token_id} has no text", error)
            return
        channel.push(event)
        self._touched[channel] = None
        self._stats.sampled_tokens += 1
        self._recovery.note_good_row()
        if event.finish is not None:
            self._scheduler.remove(sequence)
            if channel.is_ended:
                self._requests.end(channel, None)

    def _end_pooled(self, sequence: Sequence, vector: Vector, now: float) -> None:
        """End a request for a vector; its only event carries nothing but the finish reason."""
        channel: RequestChannel = sequence.owner
        if not bool(np.isfinite(vector).all()):
            self._recovery.fail_row(sequence, "the model's hidden states were not finite")
            return
        stats = channel.stats
        stats.vector, stats.first_token_s = vector, now
        stats.cached_tokens = sequence.num_cached or 0
        self._recovery.note_good_row()
        channel.push(TokenEvent(0, 0, finish=FinishReason.STOP))
        self._touched[channel] = None
        self._requests.end(channel, None)

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
        if self._pipeline.has_done and now < (self._flush_by or now + _MAX_DELAY_S):
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
        self.begin_slice()

    def flush_at_once(self) -> None:
        """Pass all new events on without yielding: the requests are about to end."""
        for channel in self._touched:
            channel.flush()
        self._touched.clear()
