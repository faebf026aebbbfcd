"""Requests, and a scheduler without an engine, for the engine's tests."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence as Tokens
from itertools import count
from typing import Any

from tests.support.fake_runner import EOS_ID, FakeRunner
from tgi_asgi.engine.budget import TokenBudget
from tgi_asgi.engine.channel import RequestChannel
from tgi_asgi.engine.engine import Engine
from tgi_asgi.engine.policy import SchedulingPolicy
from tgi_asgi.engine.prefix import HashChain, root_digest
from tgi_asgi.engine.scheduler import Scheduler
from tgi_asgi.engine.sequence import Sequence, Stage
from tgi_asgi.engine.stats import EngineStats
from tgi_asgi.engine.step import Step
from tgi_asgi.errors import TgiError
from tgi_asgi.runner.plan import RunnerTraits
from tgi_asgi.text.constrain.free_text import FreePart, Watch
from tgi_asgi.types import FinishReason, GenerationRequest, SamplingParams, StopConditions, TokenEvent

_GREEDY = SamplingParams(temperature=0.0)
_ids = count()


def make_request(
    prompt: Tokens[int] | bytes | int,
    max_tokens: int = 8,
    *,
    sampling: SamplingParams = _GREEDY,
    stop: dict[str, Any] | None = None,
    **fields: Any,
) -> GenerationRequest:
    """Return a request; an integer prompt stands for that many varying tokens."""
    tokens = [index * 7 % 251 for index in range(prompt)] if isinstance(prompt, int) else list(prompt)
    conditions = StopConditions(max_tokens=max_tokens, **(stop or {}))
    return GenerationRequest(f"request-{next(_ids)}", tokens, sampling, conditions, **fields)


def make_scheduler(**changes: Any) -> Scheduler:
    """Return a scheduler with 32 blocks of 16 tokens, 8 slots and a budget that never shrinks.

    Args:
        changes: Fields of `RunnerTraits` and `SchedulingPolicy`, `max_prefill_tokens` and `stats`.
    """
    max_prefill_tokens, stats = changes.pop("max_prefill_tokens", 512), changes.pop("stats", None)
    of_policy = {field.name for field in dataclasses.fields(SchedulingPolicy)} & changes.keys()
    policy = SchedulingPolicy(**{name: changes.pop(name) for name in of_policy})
    sizes = {"num_blocks": 32, "block_size": 16, "max_batch_size": 8, "max_step_tokens": 1 << 20}
    traits = RunnerTraits(**{**sizes, **changes})
    budget = TokenBudget(max_tokens=max_prefill_tokens, block_size=traits.block_size, target_s=1e9)
    return Scheduler(traits, policy, budget, stats or EngineStats())


def add_request(
    scheduler: Scheduler, request: GenerationRequest, arrival: int = 0, tenant: str | None = None
) -> list[Sequence]:
    """Queue and return a request's sequences, as the engine does."""
    root = root_digest(None if request.adapter is None else request.adapter.key, request.cache_salt)
    chain = HashChain(root, scheduler.block_size, request.images)
    sequences: list[Sequence] = []
    for choice in range(request.n):
        sequences.append(
            Sequence(
                request,
                choice,
                arrival_s=float(arrival),
                number=arrival,
                chain=chain,
                eos_ids=frozenset({EOS_ID}),
                leader=sequences[0] if choice else None,
                tenant=tenant,
            )
        )
    scheduler.add(sequences)
    return sequences


class WatchedGrammar:
    """A grammar whose answers are free text up to the first of the `wakes` tokens."""

    def __init__(self, wakes: Tokens[int], masked_ids: Tokens[int] = ()) -> None:
        self._part = FreePart(tuple(masked_ids), frozenset(wakes), {}, 0)

    def watch(self) -> Watch:
        return Watch([self._part])


class Answer:
    """A sink that records a request's events, by choice as text and tokens, or its error."""

    def __init__(self, channel: RequestChannel) -> None:
        self.channel = channel
        self.stats = channel.stats
        self.events: list[TokenEvent] = []
        self.batches: list[Tokens[TokenEvent]] = []
        self.error: TgiError | None = None
        self._has_ended = asyncio.Event()
        channel.attach(self)

    def on_events(self, events: Tokens[TokenEvent]) -> None:
        self.batches.append(events)
        self.events += events
        if sum(event.finish is not None for event in self.events) == self.channel.request.n:
            self._has_ended.set()

    def on_error(self, error: TgiError) -> None:
        self.error = error
        self._has_ended.set()

    async def wait(self, limit_s: float = 10) -> Answer:
        """Wait until the request ends."""
        async with asyncio.timeout(limit_s):
            await self._has_ended.wait()
        return self

    def of(self, choice: int = 0) -> list[TokenEvent]:
        return [event for event in self.events if event.index == choice]

    def tokens(self, choice: int = 0) -> list[int]:
        return [event.token_id for event in self.of(choice)]

    def text(self, choice: int = 0) -> str:
        return "".join(event.text for event in self.of(choice))

    def finish(self, choice: int = 0) -> FinishReason | None:
        return self.of(choice)[-1].finish


def submit(engine: Engine, request: GenerationRequest) -> RequestChannel:
    """Acquire a permit and submit the request."""
    return engine.submit(request, engine.acquire(request.n))


async def collect(channel: RequestChannel, limit_s: float = 10) -> Answer:
    """Collect a request's events until it ends."""
    return await Answer(channel).wait(limit_s)


async def ask(engine: Engine, request: GenerationRequest) -> Answer:
    """Submit a request and collect its events."""
    return await collect(submit(engine, request))


def plan_step(scheduler: Scheduler) -> Step:
    """Return the next step; fail if there is none."""
    step = scheduler.plan()
    assert step is not None
    return step


def run(scheduler: Scheduler, runner: FakeRunner, step: Step) -> None:
    """Compute and apply a step; remove sequences that have reached their length."""
    for _, sequence in scheduler.apply(step, runner.execute(step.plan)):
        if sequence.num_output >= sequence.max_tokens:
            scheduler.remove(sequence)


def run_all(scheduler: Scheduler, runner: FakeRunner) -> list[Step]:
    """Plan and run steps until there is no more work; return them."""
    steps = []
    while (step := scheduler.plan()) is not None:
        steps.append(step)
        run(scheduler, runner, step)
    return steps


def are_finished(sequences: list[Sequence]) -> bool:
    """Return whether all of the sequences have finished."""
    return all(sequence.stage is Stage.FINISHED for sequence in sequences)
