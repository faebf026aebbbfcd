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
from tests.support.kv import plain_limits, plain_size
from tgi_asgi import ops
from tgi_asgi.engine import Engine
from tgi_asgi.model_info import ModelInfo
from tgi_asgi.models.family import Model
from tgi_asgi.runner.kv import CacheSizes
from tgi_asgi.runner.plan import StepPlan, StepResult
from tgi_asgi.runner.runner import HostRunner
from tgi_asgi.settings import Settings
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.text.constrain.grammar import Grammar, GrammarCompiler
from tgi_asgi.text.constrain.source import GrammarSource, literal
from tgi_asgi.types import FinishReason, GenerationRequest, SamplingParams, StopConditions

EOS = 1
MARK = 96  # "~"
# Any text, or text, the mark and digits: a minimal form of what `auto` makes of tools.
AUTO = GrammarSource(
    'start: TEXT | opening CALLS\nTEXT: /(.|\\n)*/\nopening[lazy]: /(.|\\n)*/ "~"\nCALLS: /[0-9]{6,9};/',
    free=(literal("~"),),
)
AUTO_MASKED = dataclasses.replace(AUTO, free=())
PATTERN = "[a-z]{30,50}-[0-9]{3}"


class Letters:
    """A tokenizer with a token for each ASCII character, from id 2 on."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.eos_ids = frozenset({EOS})
        self.special_ids = frozenset({0, EOS})

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([32 + (token_id - 2) % 95]) if token_id >= 2 else b"<special>"

    def encode_inside(self, text: str) -> list[int]:
        return [2 + ord(character) - 32 for character in text]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    ops.configure_threads(2, nice=0, pin=False)
    files = save(make_model(), tmp_path_factory.mktemp("model"))
    return load_model(files, max_positions=256)


@pytest.fixture
async def engine(model: Model) -> AsyncIterator[Engine]:
    size = plain_size(12)
    runner = HostRunner(
        model, CacheSizes(size), plain_limits(max_sequences=8, max_tokens=128, max_context=192)
    )
    vocab_size = model.config.vocab_size
    info = ModelInfo("tiny", None, "Llama", "float32", "cpu", vocab_size, 191, 192, frozenset({EOS}))
    engine = Engine(runner, Letters(vocab_size), Settings(), info)
    engine.start()
    yield engine
    await engine.stop()
    runner.close()


@pytest.fixture(scope="module")
def grammar(model: Model) -> Grammar:
    size = model.config.vocab_size
    return GrammarCompiler(Letters(size), size).compile(sources.regex(PATTERN))


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
    size = model.config.vocab_size
    open_ended = GrammarCompiler(Letters(size), size).compile(sources.regex("[a-z]+"))
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
    free = GrammarCompiler(Letters(size), size).compile(AUTO)
    masked = GrammarCompiler(Letters(size), size).compile(AUTO_MASKED)
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
async def test_a_row_of_free_text_takes_no_step_to_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_free: bool
) -> None:
    files = save(make_model(num_attention_heads=2, num_key_value_heads=1), tmp_path)
    recorded = load_model(files, max_positions=256)
    size = recorded.config.vocab_size
    grammar = GrammarCompiler(Letters(size), size).compile(AUTO if is_free else AUTO_MASKED)
    kv = plain_size(40)
    runner = HostRunner(
        recorded, CacheSizes(kv), plain_limits(max_sequences=8, max_tokens=128, max_context=192)
    )
    plans: list[StepPlan] = []
    run = runner.run

    def noting(plan: StepPlan) -> StepResult:
        plans.append(plan)
        return run(plan)

    monkeypatch.setattr(runner, "run", noting)
    info = ModelInfo("tiny", None, "Llama", "float32", "cpu", size, 191, 192, frozenset({EOS}))
    engine = Engine(runner, Letters(size), Settings(), info)
    engine.start()
    never = SamplingParams(seed=1, logit_bias=((MARK, -100.0), (EOS, -100.0)))
    auto = dataclasses.replace(request(1, grammar), sampling=never)
    answers = await asyncio.gather(
        *(collect(submit(engine, each)) for each in (auto, request(2, None), request(3, None)))
    )
    await engine.stop()
    assert all(len(answer.tokens()) > 20 for answer in answers[:1])
    assert any(not plan.starts for plan in plans) is not is_free
