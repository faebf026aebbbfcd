"""Adapters, drafts and bfloat16 prompts combined: an answer equals that of the same request alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import make_model, save, save_tokenizer
from tests.support.real_engine import all_at_once, client_view, one_by_one, serving
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.types import Adapter, GenerationRequest, SamplingParams, StopConditions

pytestmark = pytest.mark.usefixtures("drafts_are_free")

VOCAB = 160


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    directory = tmp_path_factory.mktemp("model")
    saved = save(make_model(vocab_size=VOCAB), directory)
    save_tokenizer(directory)
    return saved


def requests_with(adapters: list[Adapter | None]) -> list[GenerationRequest]:
    """Make requests of repetitive texts, each with one of the adapters or none."""
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


SETTINGS: dict[str, Any] = {
    "quantize": "q8_0", "max_batch_size": 6, "max_batch_prefill_tokens": 48, "prefix_cache": False
}  # fmt: skip


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
async def test_no_answer_depends_on_its_company_or_on_drafts(
    files: ModelFiles, tmp_path: Path, precision: str
) -> None:
    settings = {**SETTINGS, "prompt_precision": precision}
    async with serving(files, tmp_path / "a", **settings) as (engine, adapters):
        expected = [client_view(answer) for answer in await one_by_one(engine, requests_with(adapters))]
    async with serving(files, tmp_path / "b", **settings, speculate=8) as (engine, adapters):
        requests = requests_with(adapters)
        answers = await all_at_once(engine, requests)
        assert engine.stats.accepted_draft_tokens > 20
    found = [client_view(answer) for answer in answers]
    for request, ours, wanted in zip(requests, found, expected, strict=True):
        assert ours == wanted, request
    texts = {str([token for token, *_ in answer]) for answer in found}
    assert len(texts) == len(found), "adapters or seeds have no effect"
