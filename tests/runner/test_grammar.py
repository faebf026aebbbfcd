"""Grammars through the engine and the real runner: other requests, preemption and `n` change nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.engine.helpers import Answer, collect, submit
from tests.support.checkpoints import load_model, make_model, save
from tests.support.letters import AUTO, EOS, MARK, letters_grammar
from tests.support.small_engine import noting_runner, serving_with, small_runner
from tgi_asgi import ops
from tgi_asgi.engine.engine import Engine
from tgi_asgi.models.family import Model
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.text.constrain.grammar import Grammar
from tgi_asgi.types import FinishReason, GenerationRequest, SamplingParams, StopConditions

AUTO_MASKED = dataclasses.replace(AUTO, free=())
PATTERN = "[a-z]{30,50}-[0-9]{3}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    ops.configure_threads(2, nice=0, pin=False)
    files = save(make_model(), tmp_path_factory.mktemp("model"))
    return load_model(files, max_positions=256)


@pytest.fixture
async def engine(model: Model) -> AsyncIterator[Engine]:
    async with serving_with(small_runner(model, 12), model.config.vocab_size) as engine:
        yield engine


@pytest.fixture(scope="module")
def grammar(model: Model) -> Grammar:
    return letters_grammar(sources.regex(PATTERN), model.config.vocab_size)


def request(seed: int, grammar: Grammar | None, *, n: int = 1, **conditions: object) -> GenerationRequest:
    stop = StopConditions(max_tokens=80, **conditions)  # type: ignore[arg-type]
    prompt = [2 + (seed * 31 + index * 7) % 60 for index in range(20)]
    return GenerationRequest(f"r{seed}", prompt, SamplingParams(seed=seed), stop, n=n, grammar=grammar)


async def alone(engine: Engine, requests: list[GenerationRequest]) -> list[Answer]:
    return [await collect(submit(engine, each)) for each in requests]


async def test_a_constrained_answer_matches_and_ends_by_itself(engine: Engine, grammar: Grammar) -> None:
    (answer,) = await alone(engine, [request(1, grammar, n=3)])
    for choice in range(3):
        assert re.fullmatch(PATTERN, answer.text(choice))
        assert answer.finish(choice) is FinishReason.EOS
    assert len({answer.text(choice) for choice in range(3)}) == 3


async def test_neither_company_nor_preemption_changes_an_answer(engine: Engine, grammar: Grammar) -> None:
    requests = [request(seed, grammar if seed % 3 else None) for seed in range(7)]
    expected = await alone(engine, requests)
    assert engine.stats.preemptions == 0
    answers = await asyncio.gather(*(collect(submit(engine, each)) for each in requests))
    assert engine.stats.preemptions > 0
    assert [answer.text() for answer in answers] == [answer.text() for answer in expected]


async def test_stop_strings_and_lengths_hold_inside_a_grammar(engine: Engine, grammar: Grammar) -> None:
    (cut,) = await alone(engine, [request(1, grammar, stop=("-",))])
    assert re.fullmatch("[a-z]{30,50}", cut.text()) and cut.finish() is FinishReason.STOP
    (short,) = await alone(engine, [GenerationRequest(
        "short", [5, 6], SamplingParams(seed=1), StopConditions(max_tokens=4), grammar=grammar
    )])  # fmt: skip
    assert re.fullmatch("[a-z]{4}", short.text()) and short.finish() is FinishReason.LENGTH


async def test_min_tokens_keeps_an_answer_going_where_the_grammar_lets_it(
    engine: Engine, model: Model
) -> None:
    open_ended = letters_grammar(sources.regex("[a-z]+"), model.config.vocab_size)
    (answer,) = await alone(engine, [request(2, open_ended, min_tokens=70)])
    assert len(answer.text()) >= 70


def auto_requests(grammar: Grammar) -> list[GenerationRequest]:
    """Make requests, some with top_p, whose cut depends on the mask; a bias makes the mark likelier."""
    return [
        dataclasses.replace(
            request(seed, grammar, n=1 + seed % 2),
            sampling=SamplingParams(seed=seed, top_p=0.7 if seed % 2 else 1.0, logit_bias=((MARK, 1.0),)),
        )
        for seed in range(8)
    ]


async def test_free_text_is_what_it_would_be_under_masks(engine: Engine, model: Model) -> None:
    size = model.config.vocab_size
    free, masked = letters_grammar(AUTO, size), letters_grammar(AUTO_MASKED, size)
    assert free.watch() is not None and masked.watch() is None
    expected = await alone(engine, auto_requests(masked))
    found = await alone(engine, auto_requests(free))
    assert engine.stats.preemptions == 0
    together = await asyncio.gather(*(collect(submit(engine, each)) for each in auto_requests(free)))
    assert engine.stats.preemptions > 0
    texts = [answer.text(choice) for answer in expected for choice in range(answer.channel.request.n)]
    calls = [text for text in texts if re.fullmatch(r"[^~]*~[0-9]{6,9};", text)]
    assert 2 < len(calls) < len(texts), "the setup must yield some calls and some other texts"
    for answers in (found, together):
        for answer, other in zip(answers, expected, strict=True):
            for choice in range(answer.channel.request.n):
                assert answer.tokens(choice) == other.tokens(choice)
                assert answer.finish(choice) == other.finish(choice)


@pytest.mark.parametrize("is_free", [True, False])
async def test_a_row_of_free_text_takes_no_step_to_python(tmp_path: Path, is_free: bool) -> None:
    files = save(make_model(num_attention_heads=2, num_key_value_heads=1), tmp_path)
    recorded = load_model(files, max_positions=256)
    size = recorded.config.vocab_size
    grammar = letters_grammar(AUTO if is_free else AUTO_MASKED, size)
    runner = noting_runner(recorded, 40)
    never = SamplingParams(seed=1, logit_bias=((MARK, -100.0), (EOS, -100.0)))
    auto = dataclasses.replace(request(1, grammar), sampling=never)
    async with serving_with(runner, size) as engine:
        answers = await asyncio.gather(
            *(collect(submit(engine, each)) for each in (auto, request(2, None), request(3, None)))
        )
    assert all(len(answer.tokens()) > 20 for answer in answers[:1])
    assert any(not plan.starts for plan in runner.plans) is not is_free
