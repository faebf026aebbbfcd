"""Freeing blocks outside sliding windows while a sequence runs changes no bit of any answer.

The same requests go twice through the engine and a real runner: with block tables that free blocks before a
window, and with one that keeps all blocks. Each allocated block is filled with NaN before it is written, so
that reading a hidden position would show.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.engine.helpers import collect, submit
from tests.support import architectures
from tests.support.checkpoints import load_model, make_model, reference_logits, save
from tests.support.generic import load_generic
from tests.support.letters import letters_grammar
from tests.support.random_requests import answers_of, random_request
from tests.support.scale import Scale
from tests.support.small_engine import serving_with, small_runner
from tgi_asgi import ops
from tgi_asgi.engine.blocks import BlockPool
from tgi_asgi.engine.engine import Engine
from tgi_asgi.models.config import ServedConfig
from tgi_asgi.models.family import Model
from tgi_asgi.models.generic.model import GenericModel
from tgi_asgi.runner import runner as runners
from tgi_asgi.runner.groups import CacheGroups
from tgi_asgi.runner.kv import groups_of
from tgi_asgi.settings import Settings
from tgi_asgi.settings.speculation import Speculation
from tgi_asgi.text.constrain import source as sources
from tgi_asgi.text.constrain.grammar import Grammar
from tgi_asgi.types import GenerationRequest, SamplingParams, StopConditions

pytestmark = pytest.mark.usefixtures("drafts_are_free")

LONGEST = 192
WINDOW = 21

AnyModel = Model | GenericModel


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> None:
    ops.configure_threads(1, nice=0, pin=False)


@pytest.fixture(scope="module")
def each_third(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Load a model in which every third layer sees all positions."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    model = make_model(
        "Qwen2", sliding_window=WINDOW, use_sliding_window=True, layer_types=kinds, num_hidden_layers=6
    )
    return load_model(save(model, tmp_path_factory.mktemp("model")), max_positions=256)


@pytest.fixture(scope="module")
def grammars(each_third: Model) -> list[Grammar]:
    size = each_third.config.vocab_size
    return [letters_grammar(sources.regex("[a-z]{5,9}(-ab-ab){2,6}[0-9]"), size)]


@pytest.fixture(scope="module")
def all_windows(tmp_path_factory: pytest.TempPathFactory) -> Model:
    model = make_model("Mistral", sliding_window=WINDOW, head_dim=32)
    return load_model(save(model, tmp_path_factory.mktemp("model")), max_positions=256)


_MEMORY: dict[BlockPool, npt.NDArray[np.uint8]] = {}  # of a pool's blocks


@pytest.fixture(autouse=True)
def blocks_are_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill each block with NaN when it is allocated: floats, and the scales of int8."""
    allocate = BlockPool.allocate

    def allocate_poisoned(pool: BlockPool) -> int:
        block = allocate(pool)
        _MEMORY[pool][block] = 0x7F
        return block

    monkeypatch.setattr(BlockPool, "allocate", allocate_poisoned)


@asynccontextmanager
async def serving(
    model: AnyModel, num_blocks: int, *, speculation: Speculation | None = None,
    dtype: ops.KvDtype = "float32",
) -> AsyncIterator[Engine]:  # fmt: skip
    """Serve a model."""
    runner = small_runner(
        model, num_blocks, dtype=dtype, max_tokens=64, max_context=LONGEST, speculation=speculation
    )
    settings = Settings(max_batch_prefill_tokens=48, max_batch_size=8)
    async with serving_with(runner, model.config.vocab_size, settings) as engine:
        pool, memory = engine.scheduler.pool, runner._kv_pool
        assert isinstance(memory, ops.KvPool)
        _MEMORY[pool] = memory.native.memory()
        yield engine
    del _MEMORY[pool]


@contextmanager
def keeping_all() -> Iterator[None]:
    """Let all layers share one block table, so that windows mask positions but no block is freed early."""

    def one_group(config: ServedConfig, dtype: ops.KvDtype) -> CacheGroups:
        return CacheGroups((None,), (0,) * len(config.caches), groups_of(config, dtype).bytes_per_token)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runners, "groups_of", one_group)
        yield


async def compare(
    model: AnyModel, requests: list[GenerationRequest], num_blocks: int, at_once: int, **options: Any
) -> Engine:
    """Check that answers equal those of a server that keeps all blocks; return the engine that does not."""
    with keeping_all():
        async with serving(model, 150, **options) as engine:
            assert engine.scheduler.tables.num_groups == 1
            expected = await answers_of(engine, requests, 8 if at_once > 1 else 1)
    async with serving(model, num_blocks, **options) as engine:
        assert any(engine.scheduler.tables.needs.windows)
        found = await answers_of(engine, requests, at_once)
    for request, ours, theirs in zip(requests, found, expected, strict=True):
        assert ours == theirs, request
    return engine


@pytest.mark.parametrize(
    ("seed", "num_blocks", "at_once", "num_drafts"),
    [(1, 120, 1, 0), (2, 90, 6, 0), (3, 48, 8, 0), (4, 70, 6, 8)],
)
async def test_answers_are_those_of_a_cache_that_keeps_all(
    each_third: Model, grammars: list[Grammar], seed: int, num_blocks: int, at_once: int, num_drafts: int,
    scale: Scale,
) -> None:  # fmt: skip
    """Use random requests: choices, chunks, prompt scores, cached prefixes, preemption, drafts."""
    rng = random.Random(seed)
    num_requests = 60 if num_blocks == 48 else scale(24, 60)  # a few might end without a preemption
    requests = [random_request(rng, number, grammars) for number in range(num_requests)]
    speculation = Speculation(num_drafts, shortest=2) if num_drafts else None
    engine = await compare(each_third, requests, num_blocks, at_once, speculation=speculation)
    if num_blocks == 48:
        assert engine.stats.preemptions > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
async def test_prompts_of_several_windows_are_read_as_by_a_cache_that_keeps_all(
    all_windows: Model, dtype: ops.KvDtype
) -> None:
    """Use few blocks: eight suffice for a request, because all layers have windows."""
    requests = [
        GenerationRequest(
            f"r{number}",
            [(7 * at + number % 2 * at * at) % 157 for at in range(150 - 9 * number)],
            SamplingParams(temperature=0.0, logprobs=2),
            StopConditions(max_tokens=30, ignore_eos=True),
        )
        for number in range(6)
    ]
    await compare(all_windows, requests, 16, 3, dtype=dtype)


@pytest.mark.parametrize(
    "name", ["cohere2", "gemma4_text", pytest.param("exaone4", marks=pytest.mark.models)]
)
async def test_modules_of_transformers_give_back_what_their_masks_hide(tmp_path: Path, name: str) -> None:
    """Include Gemma 4, whose groups are formed by bytes, as its heads have two sizes."""
    architectures.make(name, tmp_path)
    model = load_generic(tmp_path, max_context=LONGEST)
    assert isinstance(model, GenericModel)
    requests = [
        GenerationRequest(
            f"r{number}",
            [2 + (3 * at + number % 2 * at * at) % 90 for at in range(100 - 9 * number)],
            SamplingParams(temperature=0.0, logprobs=2),
            StopConditions(max_tokens=20, ignore_eos=True),
        )
        for number in range(5)
    ]
    await compare(model, requests, 60, 3 if model.is_batch_invariant else 1)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Mistral", {}),
        ("Phi3", {"pad_token_id": 0}),
        (
            "Qwen2",
            {
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
        ),
    ],
)
async def test_transformers_says_the_same_behind_several_windows(
    tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    """Use prompts of seven windows, in chunks, concurrently, in a cache that holds only a few windows."""
    reference = make_model(kind, sliding_window=WINDOW, **changes)
    model = load_model(save(reference, tmp_path), max_positions=256)
    prompts = [[(5 * at + seed * at * at) % 157 for at in range(150)] for seed in (0, 1, 2)]
    async with serving(model, 60) as engine:
        assert WINDOW in engine.scheduler.tables.needs.windows
        channels = [
            submit(
                engine,
                GenerationRequest(
                    f"r{number}",
                    prompt,
                    SamplingParams(temperature=0.0, logprobs=0),
                    StopConditions(max_tokens=30, ignore_eos=True),
                ),
            )
            for number, prompt in enumerate(prompts)
        ]
        answers = await asyncio.gather(*map(collect, channels))
    for prompt, answer in zip(prompts, answers, strict=True):
        events = answer.of()
        ids = [*prompt, *(event.token_id for event in events)]
        wanted = reference_logits(reference, ids)[len(prompt) - 1 : -1].log_softmax(-1)
        for row, event in zip(wanted, events, strict=True):
            assert event.logprob == pytest.approx(float(row[event.token_id]), abs=1e-3)
            assert float(row.max() - row[event.token_id]) < 1e-3
