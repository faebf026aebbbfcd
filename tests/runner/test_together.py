"""Adapters, drafts and prompts in bfloat16 together: an answer is that of the lone request."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.engine.helpers import Answer, collect, submit
from tests.runner.test_grammar import Letters
from tests.support.adapters import write_adapter
from tests.support.checkpoints import make_model, save, save_tokenizer
from tgi_asgi.engine import Engine
from tgi_asgi.engine.budget import TokenBudget
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.runner.load import load
from tgi_asgi.runner.runner import CpuRunner
from tgi_asgi.settings import Settings
from tgi_asgi.types import Adapter, GenerationRequest, SamplingParams, StopConditions

VOCAB = 160


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    directory = tmp_path_factory.mktemp("model")
    saved = save(make_model(vocab_size=VOCAB), directory)
    save_tokenizer(directory)
    return saved


@pytest.fixture(autouse=True)
def drafts_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft whatever the time says: what the test is about must happen."""
    monkeypatch.setattr(TokenBudget, "cost_s", property(lambda budget: (1.0, 0.0)))


@asynccontextmanager
async def serving(
    files: ModelFiles, folder: Path, **settings: Any
) -> AsyncIterator[tuple[Engine, list[Adapter | None]]]:
    """Serve as the program would; the adapters are of three ranks."""
    chosen = Settings(
        quantize="q8_0", enable_lora=True, num_threads=2, thread_nice=0, max_batch_size=6,
        max_batch_prefill_tokens=48, prefix_cache=False, **settings,
    )  # fmt: skip
    found = load(chosen, files, lambda stage, done, total: None)
    assert isinstance(found.runner, CpuRunner) and found.adapters is not None
    shapes = {
        f"base_model.model.{name}": target.shape
        for name, target in found.adapters.layout.targets.items()
        if "qkv" not in name and "gate_up" not in name
    }
    adapters: list[Adapter | None] = [None]
    for rank in (1, 4, 7):
        read = found.adapters.load(write_adapter(folder / f"rank{rank}", shapes, rank, lora_alpha=30))
        adapters.append(Adapter(str(rank), read.digest.hex(), read.weights))
    engine = Engine(found.runner, Letters(VOCAB), chosen, found.info)
    engine.start()
    yield engine, adapters
    await engine.stop()
    found.runner.close()


def requests_with(adapters: list[Adapter | None]) -> list[GenerationRequest]:
    """Make requests of texts that repeat themselves, each with one of the adapters or none."""
    rng = random.Random(7)
    made = []
    for number in range(16):
        period = [rng.randrange(2, 97) for _ in range(rng.randrange(1, 6))]
        prompt = [period[at % len(period)] for at in range(rng.randrange(3, 70))]
        sampling = SamplingParams(
            temperature=rng.choice([0.0, 0.0, 0.2, 1.0]), seed=number, logprobs=rng.choice([None, 2]),
            repetition_penalty=rng.choice([1.0, 1.1]),
        )  # fmt: skip
        stop = StopConditions(max_tokens=rng.choice([20, 40]), ignore_eos=True)
        adapter = adapters[number % len(adapters)]
        made.append(GenerationRequest(f"r{number}", prompt, sampling, stop, adapter=adapter))
    return made


def told(answer: Answer) -> list[tuple[object, ...]]:
    assert answer.error is None
    return [(event.token_id, event.text, event.logprob, str(event.top)) for event in answer.events]


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
async def test_no_answer_depends_on_its_company_or_on_drafts(
    files: ModelFiles, tmp_path: Path, precision: str
) -> None:
    async with serving(files, tmp_path / "a", prompt_precision=precision) as (engine, adapters):
        expected = [told(await collect(submit(engine, each))) for each in requests_with(adapters)]
    async with serving(files, tmp_path / "b", prompt_precision=precision, speculate=8) as (engine, adapters):
        requests = requests_with(adapters)
        answers = await asyncio.gather(*(collect(submit(engine, each)) for each in requests))
        assert engine.stats.accepted_draft_tokens > 20
    found = [told(answer) for answer in answers]
    for request, ours, wanted in zip(requests, found, expected, strict=True):
        assert ours == wanted, request
    texts = {str([token for token, *_ in answer]) for answer in found}
    assert len(texts) == len(found), "adapters, or seeds, change nothing"
