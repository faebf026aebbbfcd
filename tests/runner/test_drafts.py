"""Drafts never change an answer: random requests with and without, through the engine and a real runner."""

from __future__ import annotations

import random
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from tests.support import architectures
from tests.support.checkpoints import load_model, make_model, save
from tests.support.generic import load_generic
from tests.support.letters import AUTO, letters_grammar
from tests.support.random_requests import answers_of, random_request
from tests.support.small_engine import serving_with, small_runner
from tgi_asgi import ops
from tgi_asgi.engine.engine import Engine
from tgi_asgi.models.family import Model
from tgi_asgi.models.generic.model import GenericModel
from tgi_asgi.runner.drafts import speculation_of
from tgi_asgi.settings import Settings
from tgi_asgi.settings.speculation import Speculation
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.text.constrain.grammar import Grammar
from tgi_asgi.types import (
    GenerationRequest,
    SamplingParams,
    StopConditions,
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
    return [letters_grammar(text, size) for text in texts]


def serving(
    model: Model | GenericModel, speculation: Speculation | None, num_blocks: int
) -> AbstractAsyncContextManager[Engine]:
    runner = small_runner(model, num_blocks, max_context=LONGEST, speculation=speculation)
    return serving_with(runner, model.config.vocab_size, Settings(max_batch_prefill_tokens=64))


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
