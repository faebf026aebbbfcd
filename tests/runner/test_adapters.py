"""Adapters through the engine and the real runner: other requests change no answer, and nothing leaks."""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.engine.helpers import Answer, collect, submit
from tests.support.adapters import write_adapter
from tests.support.checkpoints import load_model, make_model, save
from tests.support.letters import letters_grammar
from tests.support.small_engine import serving_with, small_runner
from tgi_asgi import ops
from tgi_asgi.engine.engine import Engine
from tgi_asgi.models.adapters import AdapterLoader, targets_of
from tgi_asgi.models.family import Model
from tgi_asgi.settings import Settings
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.text.constrain.grammar import Grammar
from tgi_asgi.types import Adapter, GenerationRequest, SamplingParams, StopConditions

NUM_ADAPTERS = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    ops.configure_threads(2, nice=0, pin=False)
    return load_model(save(make_model(), tmp_path_factory.mktemp("model")), max_positions=256)


@pytest.fixture(scope="module")
def loader(model: Model) -> AdapterLoader[ops.AdapterLayout]:
    return AdapterLoader(ops.AdapterLayout(targets_of(model), max_rank=8))


@pytest.fixture(scope="module")
def folders(loader: AdapterLoader[ops.AdapterLayout], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    shapes = {
        f"base_model.model.{name}": target.shape
        for name, target in loader.layout.targets.items()
        if "qkv" not in name and "gate_up" not in name
    }
    root = tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(root / str(rank), shapes, rank, lora_alpha=40) for rank in range(1, NUM_ADAPTERS + 1)
    ]


@pytest.fixture(scope="module")
def adapters(loader: AdapterLoader[ops.AdapterLayout], folders: list[Path]) -> list[Adapter]:
    found = [loader.load(folder) for folder in folders]
    return [Adapter(str(at), each.digest.hex(), each.weights) for at, each in enumerate(found)]


@pytest.fixture(scope="module")
def grammar(model: Model) -> Grammar:
    return letters_grammar(sources.regex("[a-z]{30,50}-[0-9]{3}"), model.config.vocab_size)


@pytest.fixture
async def engine(model: Model, loader: AdapterLoader[ops.AdapterLayout]) -> AsyncIterator[Engine]:
    runner = small_runner(model, 9, adapters=loader.layout)
    settings = Settings(enable_lora=True, max_loras=3)
    async with serving_with(runner, model.config.vocab_size, settings) as engine:
        yield engine


def some_request(seed: int, adapters: list[Adapter], grammar: Grammar) -> GenerationRequest:
    """Make a request; some have a common prefix, an adapter, a grammar, log-probabilities or two choices."""
    choose = random.Random(seed)
    prompt = [2 + index * 7 % 60 for index in range(choose.choice([3, 20, 33]))]
    prompt += [2 + choose.randrange(60) for _ in range(choose.choice([0, 0, 4]))]
    n = choose.choice([1, 1, 1, 2])
    return GenerationRequest(
        f"r{seed}",
        prompt,
        SamplingParams(
            temperature=choose.choice([0.0, 1.0]), seed=choose.randrange(3),
            logprobs=choose.choice([None, 2]),
            repetition_penalty=choose.choice([1.0, 1.2]), top_k=choose.choice([0, 9]),
        ),
        StopConditions(max_tokens=choose.choice([1, 12, 40])),
        n=n,
        adapter=choose.choice([None, *adapters]),
        grammar=grammar if choose.random() < 0.3 else None,
    )  # fmt: skip


def long_request(number: int) -> GenerationRequest:
    """Make a request that starts with two blocks and ends with five, so that three of them do not fit."""
    stop = StopConditions(max_tokens=55, ignore_eos=True)
    return GenerationRequest(f"l{number}", [number + 2] * 20, SamplingParams(seed=number), stop)


def client_view(answer: Answer) -> list[tuple[object, ...]]:
    """Return everything that clients see of an answer, choice by choice."""
    return sorted(
        (event.index, at, event.token_id, event.text, event.logprob, str(event.top), str(event.finish))
        for at, event in enumerate(sorted(answer.events, key=lambda event: event.index))
    )


@pytest.mark.parametrize("seed", [1, pytest.param(0, marks=pytest.mark.soak)])
async def test_company_preemption_and_cached_prefixes_change_no_answer(
    engine: Engine, adapters: list[Adapter], grammar: Grammar, seed: int
) -> None:
    requests = [long_request(number) for number in range(3)]
    requests += [some_request(100 * seed + index, adapters, grammar) for index in range(12)]
    expected = []
    for request in requests:
        engine.reset_prefix_cache()
        expected.append(client_view(await collect(submit(engine, request))))
    assert engine.stats.preemptions == 0
    answers = await asyncio.gather(*(collect(submit(engine, request)) for request in requests))
    assert engine.stats.preemptions > 0
    for request, answer, wanted in zip(requests, answers, expected, strict=True):
        assert answer.error is None
        assert client_view(answer) == wanted, request


async def test_a_prefix_is_found_by_its_own_adapter_alone(engine: Engine, adapters: list[Adapter]) -> None:
    prompt = [2 + index * 7 % 60 for index in range(40)]

    async def cached(adapter: Adapter | None) -> int:
        stop = StopConditions(max_tokens=1)
        request = GenerationRequest("r", prompt, SamplingParams(temperature=0.0), stop, adapter=adapter)
        answer = await collect(submit(engine, request))
        return answer.stats.cached_tokens

    one, other = adapters[:2]
    again = Adapter("another name", one.key, one.weights)
    assert [await cached(each) for each in (None, one, other)] == [0, 0, 0]
    assert [await cached(each) for each in (None, one, other, again)] == [32, 32, 32, 32]


async def test_an_adapter_that_is_let_go_of_is_freed_once_its_requests_have_ended(
    engine: Engine, loader: AdapterLoader[ops.AdapterLayout], folders: list[Path], model: Model
) -> None:
    """Load, use and release it repeatedly while other requests decode; memory must not grow."""
    stop = StopConditions(max_tokens=30, ignore_eos=True)
    prompt = [5, 6, 7]
    others = [
        submit(engine, GenerationRequest(f"o{seed}", prompt, SamplingParams(seed=seed), stop))
        for seed in range(2)
    ]
    dead = []
    for turn in range(12):
        loaded = await asyncio.to_thread(loader.load, folders[turn % NUM_ADAPTERS])
        adapter = Adapter("a", loaded.digest.hex(), loaded.weights)
        dead.append(weakref.ref(adapter))
        request = GenerationRequest("r", prompt, SamplingParams(seed=turn), stop, adapter=adapter)
        channel = submit(engine, request)
        del loaded, adapter, request
        answer = await collect(channel)
        assert answer.error is None and len(answer.events) == 30
        del channel, answer
    for channel in others:
        await collect(channel)
    gc.collect()
    assert [each() for each in dead[:-1]] == [None] * 11
