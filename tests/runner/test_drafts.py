"""Drafts never change an answer: random requests with and without, through the engine and a real runner."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.engine.helpers import Answer, collect, submit
from tests.runner.test_grammar import AUTO, EOS, MARK, Letters
from tests.support import architectures
from tests.support.checkpoints import load_model, make_model, save
from tests.support.generic import load_generic
from tests.support.kv import plain_limits, plain_size
from tgi_asgi import ops
from tgi_asgi.engine import Engine
from tgi_asgi.model_info import ModelInfo
from tgi_asgi.models.family import Model
from tgi_asgi.models.generic.model import GenericModel
from tgi_asgi.runner.drafts import speculation_of
from tgi_asgi.runner.kv import CacheSizes
from tgi_asgi.runner.runner import HostRunner
from tgi_asgi.settings import Settings
from tgi_asgi.settings.speculation import Speculation
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.text.constrain.grammar import Grammar, GrammarCompiler
from tgi_asgi.text.stop_scope import ReasoningMarks
from tgi_asgi.types import (
    GenerationRequest,
    LogprobsMode,
    ReasoningBudget,
    SamplingParams,
    StopConditions,
    TokenEvent,
)

pytestmark = pytest.mark.usefixtures("drafts_are_free")

LONGEST = 192


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    ops.configure_threads(1, nice=0, pin=False)  # speed does not matter here
    return load_model(save(make_model(), tmp_path_factory.mktemp("model")), max_positions=256)


@pytest.fixture(scope="module")
def grammars(model: Model) -> list[Grammar]:
    size = model.config.vocab_size
    schema = {"enum": ["alpha beta gamma", "alpha beta delta"]}
    texts = [sources.regex("[a-z]{5,9}(-ab-ab){2,6}[0-9]"), AUTO]
    texts.append(sources.json_schema(schema))
    return [GrammarCompiler(Letters(size), size).compile(text) for text in texts]


@asynccontextmanager
async def serving(
    model: Model | GenericModel, speculation: Speculation | None, num_blocks: int
) -> AsyncIterator[Engine]:
    size = plain_size(num_blocks)
    runner = HostRunner(
        model,
        CacheSizes(size),
        plain_limits(max_sequences=8, max_tokens=128, max_context=LONGEST),
        speculation=speculation,
    )
    vocab_size = model.config.vocab_size
    info = ModelInfo(
        "tiny", None, "Llama", "float32", "cpu", vocab_size, LONGEST - 1, LONGEST, frozenset({EOS})
    )
    engine = Engine(runner, Letters(vocab_size), Settings(max_batch_prefill_tokens=64), info)
    engine.start()
    yield engine
    await engine.stop()
    assert engine.scheduler.pool.num_used == 0
    engine.scheduler.pool.check()
    runner.close()


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
        uses_prefix_cache=rng.random() < 0.8,
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


NUM_REQUESTS = 80


@pytest.mark.parametrize(
    ("seed", "num_drafts", "num_blocks", "at_once"),
    [(1, 8, 40, 1), (2, 8, 40, 4), (3, 3, 30, 8), (4, 16, 16, 6)],
)
async def test_answers_are_the_same_with_and_without_drafts(
    model: Model, grammars: list[Grammar], seed: int, num_drafts: int, num_blocks: int, at_once: int
) -> None:
    rng = random.Random(seed)
    requests = [random_request(rng, number, grammars) for number in range(NUM_REQUESTS)]
    async with serving(model, None, 80) as engine:
        expected = await answers_of(engine, requests, 8)
    async with serving(model, Speculation(num_drafts, shortest=1 + seed % 3), num_blocks) as engine:
        found = await answers_of(engine, requests, at_once)
        stats = engine.stats
    for request, ours, theirs in zip(requests, found, expected, strict=True):
        assert ours == theirs, request
    assert stats.draft_tokens > 2 * NUM_REQUESTS
    assert stats.accepted_draft_tokens > NUM_REQUESTS
    assert stats.accepted_draft_tokens < stats.draft_tokens
    if num_blocks < 20:
        assert stats.preemptions > 0


async def test_models_of_transformers_answer_the_same_with_drafts(tmp_path: Path) -> None:
    architectures.make("cohere", tmp_path)
    model = load_generic(tmp_path, max_context=LONGEST)
    assert isinstance(model, GenericModel)
    settings = Settings(speculate=8)
    assert speculation_of(model, settings) == settings.speculation
    requests = [
        GenerationRequest(
            f"r{seed}",
            [2 + index % (3 + seed) for index in range(30)],
            SamplingParams(seed=seed, temperature=0.3 * (seed % 2)),
            StopConditions(max_tokens=24, ignore_eos=True),
        )
        for seed in range(6)
    ]
    answers = []
    for speculation in (None, settings.speculation):
        async with serving(model, speculation, 60) as engine:
            answers.append(await answers_of(engine, requests, 3))
    assert answers[0] == answers[1]
    assert engine.stats.accepted_draft_tokens > 0


def test_models_with_states_have_no_drafts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    architectures.make("mamba", tmp_path)
    model = load_generic(tmp_path, max_context=LONGEST)
    assert speculation_of(model, Settings(speculate=8)) is None
    assert "cannot be undone token by token" in caplog.text
