"""Adapters against `peft` in float32: on the families, alone and in one batch with others and with none."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.adapters import make_adapter, peft_logprobs
from tests.support.driving import Job, generate
from tests.support.families import CASES, FamilyCase
from tests.support.family_files import Reference, checkpoint, gguf_file, reference
from tests.support.family_scores import differences
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.runner.load import LoadedModel, load
from tgi_asgi.settings import Settings
from tgi_asgi.types import SamplingParams

EXACT = 5e-5  # of a log-probability
LEAST_EFFECT = 0.1  # that each adapter must have on one
NUM_BEST = 5
BY_NAME = {case.name: case for case in CASES}
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def load_case(files: ModelFiles, **settings: Any) -> LoadedModel:
    given: dict[str, Any] = {
        "dtype": "float32", "num_threads": 2, "thread_nice": 0, "max_batch_size": 6, "enable_lora": True,
        "max_batch_prefill_tokens": 128, "max_batch_total_tokens": 1024,
    }  # fmt: skip
    return load(Settings(**given | settings), files, lambda stage, done, total: None)


def run(loaded: LoadedModel, jobs: list[Job], chunk: int = 24) -> None:
    asyncio.run(generate(loaded.runner, jobs, chunk=chunk))


def job_of(found: Reference, weights: Any) -> Job:
    sampling = SamplingParams(temperature=0.0, logprobs=NUM_BEST)
    return Job(found.prompt_ids, 6, sampling, wants_prompt_logprobs=NUM_BEST, adapter=weights)


def assert_is_pefts(job: Job, base: Path, adapter: Path | None) -> None:
    """Hold a job's log-probabilities against peft's for the tokens that it has."""
    ids = [*job.prompt_ids, *job.token_ids]
    truth = Reference(list(job.prompt_ids), job.token_ids, peft_logprobs(base, adapter, ids))
    assert differences(job, truth).max() <= EXACT


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama-biases", {}),
        ("llama-head-24", {"target_modules": ["q_proj", "v_proj"], "r": 3}),
        ("llama-odd-sizes", {"r": 5, "use_rslora": True}),
        ("qwen2-unused-window", {"layers_to_transform": [0, 2]}),
        ("qwen3", {"rank_pattern": {"k_proj": 2, "1.mlp.down_proj": 7}, "alpha_pattern": {"o_proj": 3}}),
        ("granite", {}),
        ("smollm3-other-layers", {"target_modules": ["o_proj", "down_proj"], "r": 33}),
        ("phi3-old-config", {"target_modules": FUSED}),
        ("olmo2", {}),
        ("mistral-window", {"target_modules": ["gate_proj", "k_proj"]}),
    ],
)  # fmt: skip
def test_a_family_gives_what_peft_gives_alone_and_among_others(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    case = BY_NAME[name]
    files, found = checkpoint(case), reference(case)
    adapters = [make_adapter(files.path, tmp_path / f"{seed}", seed=seed, **changes) for seed in (1, 2)]
    loaded = load_case(files)
    try:
        assert loaded.adapters is not None
        weights = [loaded.adapters.load(adapter).weights for adapter in adapters]
        alone = [job_of(found, each) for each in (None, *weights)]
        for job in alone:
            run(loaded, [job])
        order = (0, 1, 0, 2, 1)
        mixed = [job_of(found, (None, *weights)[which]) for which in order]
        run(loaded, mixed, chunk=31)
    finally:
        loaded.runner.close()
    for job, adapter in zip(alone, (None, *adapters), strict=True):
        assert_is_pefts(job, files.path, adapter)
    for job, which in zip(mixed, order, strict=True):
        assert job.sampled == alone[which].sampled, "others in the batch must not change a bit"
        assert job.prompt_logprobs == alone[which].prompt_logprobs
    logprobs = [np.array([value for value, _ in job.prompt_logprobs[1:]], float) for job in alone]
    for one in range(3):
        for other in range(one):
            assert np.abs(logprobs[one] - logprobs[other]).max() > LEAST_EFFECT


def bare(case: FamilyCase) -> list[Any]:
    """Return what a server without adapters gives."""
    loaded = load_case(checkpoint(case), enable_lora=False)
    job = job_of(reference(case), None)
    try:
        assert loaded.adapters is None
        run(loaded, [job])
    finally:
        loaded.runner.close()
    return [job.sampled, job.prompt_logprobs]


def test_rows_without_an_adapter_have_the_bits_that_they_have_without_the_feature(tmp_path: Path) -> None:
    case = BY_NAME["llama-biases"]
    found = reference(case)
    adapter = make_adapter(checkpoint(case).path, tmp_path / "a", seed=1)
    loaded = load_case(checkpoint(case))
    try:
        assert loaded.adapters is not None
        weights = loaded.adapters.load(adapter).weights
        jobs = [job_of(found, weights), job_of(found, None), job_of(found, weights)]
        run(loaded, jobs)
    finally:
        loaded.runner.close()
    assert [jobs[1].sampled, jobs[1].prompt_logprobs] == bare(case)
    assert jobs[0].prompt_logprobs != jobs[1].prompt_logprobs


@pytest.mark.parametrize("dtype", ["float32", "auto"])
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_quantised_bases_take_adapters_in_every_arithmetic(kind: str, dtype: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if kind in case.gguf)
    base, found = checkpoint(case).path, reference(case)
    adapter = make_adapter(base, tmp_path / "a", seed=1)
    loaded = load_case(gguf_file(case, kind), dtype=dtype)
    try:
        assert loaded.adapters is not None
        jobs = [job_of(found, weights) for weights in (loaded.adapters.load(adapter).weights, None)]
        run(loaded, jobs)
    finally:
        loaded.runner.close()
    if dtype == "float32":
        assert_is_pefts(jobs[0], base, adapter)
    else:  # activations are rounded to eight bits
        ids = [*jobs[0].prompt_ids, *jobs[0].token_ids]
        truth = Reference(list(jobs[0].prompt_ids), jobs[0].token_ids, peft_logprobs(base, adapter, ids))
        assert differences(jobs[0], truth).mean() <= 0.08
        assert jobs[1].prompt_logprobs != jobs[0].prompt_logprobs
