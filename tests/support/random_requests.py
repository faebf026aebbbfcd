"""Random requests of every kind, for tests in which another schedule must not change any answer."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from typing import Any

from tests.engine.helpers import Answer, collect, submit
from tests.support.letters import MARK
from tgi_asgi.engine.engine import Engine
from tgi_asgi.text.constrain.grammar import Grammar
from tgi_asgi.text.stop_scope import ReasoningMarks
from tgi_asgi.types import (
    GenerationRequest,
    LogprobsMode,
    ReasoningBudget,
    SamplingParams,
    StopConditions,
    TokenEvent,
)


def random_sampling(rng: random.Random) -> SamplingParams:
    """Return random sampling parameters, most of which lead to repetitive text."""

    def maybe(value: Any, otherwise: Any, share: float = 0.25) -> Any:
        return value if rng.random() < share else otherwise

    few = tuple(
        (rng.randrange(2, 160), rng.choice([-100.0, -3.0, 2.0, 6.0])) for _ in range(rng.randrange(1, 6))
    )
    return SamplingParams(
        temperature=rng.choice([0.0, 0.0, 0.05, 0.3, 1.0]),
        top_k=maybe(rng.randrange(1, 20), 0),
        top_p=maybe(rng.uniform(0.1, 1.0), 1.0),
        min_p=maybe(rng.uniform(0.0, 0.5), 0.0),
        typical_p=maybe(rng.uniform(0.2, 1.0), 1.0),
        repetition_penalty=maybe(rng.uniform(0.8, 1.3), 1.0),
        frequency_penalty=maybe(rng.uniform(-0.5, 0.5), 0.0),
        presence_penalty=maybe(rng.uniform(-0.5, 0.5), 0.0),
        seed=rng.randrange(1 << 32),
        logit_bias=maybe(tuple(dict(few).items()), ()),
        logprobs=maybe(rng.randrange(0, 5), None),
        logprobs_mode=rng.choice(list(LogprobsMode)),
    )


def random_request(rng: random.Random, number: int, grammars: list[Grammar]) -> GenerationRequest:
    period = [rng.randrange(2, 97) for _ in range(rng.randrange(1, 12))]
    length = rng.randrange(1, 70)
    shared = [2 + index % 7 for index in range(rng.choice([0, 0, 20, 33]))]
    prompt = shared + [period[index % len(period)] for index in range(length)]
    sampling = random_sampling(rng)
    grammar = rng.choice(grammars) if rng.random() < 0.3 else None
    if grammar is not None:  # a ban could leave no token
        sampling = dataclasses.replace(sampling, logit_bias=((MARK, 1.0),))
    budget = None
    if rng.random() < 0.3:
        start, end = (tuple(rng.sample(range(2, 97), rng.randrange(1, 4))) for _ in range(2))
        budget = ReasoningBudget(rng.randrange(0, 12), start, end, is_open=rng.random() < 0.7)
    max_tokens = rng.randrange(1, 60)
    stop = StopConditions(
        max_tokens=max_tokens,
        min_tokens=rng.randrange(0, max_tokens) if rng.random() < 0.2 else 0,
        stop=tuple({chr(rng.randrange(33, 126)) * rng.randrange(1, 3) for _ in range(rng.randrange(0, 3))}),
        stop_token_ids=frozenset(rng.sample(range(2, 160), 2)) if rng.random() < 0.1 else frozenset(),
        ignore_eos=rng.random() < 0.3 and grammar is None,
        include_stop=rng.random() < 0.5,
        reasoning=rng.choice([None, ReasoningMarks("a", "b", is_open=rng.random() < 0.5)]),
    )
    return GenerationRequest(
        f"r{number}", prompt, sampling, stop,
        n=rng.choice([1, 1, 1, 2, 3]),
        grammar=grammar,
        reasoning_budget=budget,
        prompt_logprobs=1 if rng.random() < 0.1 else None,
        cache_salt=None if rng.random() < 0.8 else f"r{number}",
    )  # fmt: skip


def client_view(answer: Answer) -> tuple[object, ...]:
    """Return everything that a client learns except timing."""
    events = sorted(answer.events, key=lambda event: event.index)
    stats = answer.stats
    return (
        repr(answer.error),
        [[getattr(event, name) for name in TokenEvent.__slots__] for event in events],
        stats.generated_tokens,
        stats.prompt_logprobs,
    )


async def answers_of(
    engine: Engine, requests: list[GenerationRequest], at_once: int, limit_s: float = 10
) -> list[tuple[object, ...]]:
    """Keep `at_once` requests open; return everything that each client learned."""
    slots = asyncio.Semaphore(at_once)

    async def ask(request: GenerationRequest) -> tuple[object, ...]:
        async with slots:
            return client_view(await collect(submit(engine, request), limit_s))

    return await asyncio.gather(*map(ask, requests))
