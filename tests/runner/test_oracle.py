"""The demonstration model against results recorded from `transformers` (tests/models/oracle/record.py).

`make soak` compares all that is recorded. `make test` compares fewer tokens and leaves out the long prompt,
because small models read longer ones there (tests/models/test_large_models.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.support.runner_driver import GREEDY, Job, generate
from tests.support.scale import Scale
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.runner.load import LoadedModel, load
from tgi_asgi.settings import Settings
from tgi_asgi.types import SamplingParams

RECORD = Path(__file__).parents[1] / "models" / "oracle" / "smollm2-135m.json"
CASES: dict[str, dict[str, Any]] = json.loads(RECORD.read_text())["cases"]
NUM_TOKENS = 64
RECORDED = ("token_ids", "logprobs", "top_ids", "top_logprobs")  # of each token
LONG = "essay"  # 1,389 tokens; the other prompts have 272 together
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=42)


@pytest.fixture(scope="module")
def exact(demo_files: ModelFiles) -> Iterator[LoadedModel]:
    settings = Settings(dtype="float32", max_batch_total_tokens=16384, thread_nice=0)
    loaded = load(settings, demo_files)
    yield loaded
    loaded.runner.close()


def with_top(sampling: SamplingParams) -> SamplingParams:
    return SamplingParams(temperature=sampling.temperature, logprobs=5)


def test_the_tokenizer_gives_the_recorded_ids(exact: LoadedModel) -> None:
    for name, case in CASES.items():
        assert exact.tokenizer.encode(case["text"], add_special_tokens=True) == case["prompt_ids"], name


def cases(scale: Scale) -> dict[str, dict[str, Any]]:
    return scale({name: case for name, case in CASES.items() if name != LONG}, CASES)


async def test_greedy_text_equals_the_oracle_token_for_token(exact: LoadedModel, scale: Scale) -> None:
    num_tokens, chunk = scale((16, 50), (NUM_TOKENS, 500))
    jobs = {
        name: Job(case["prompt_ids"], num_tokens, with_top(GREEDY)) for name, case in cases(scale).items()
    }
    await generate(exact.runner, list(jobs.values()), chunk=chunk)
    for name, job in jobs.items():
        case = {key: CASES[name][key][:num_tokens] for key in RECORDED}
        assert job.token_ids == case["token_ids"], name
        logprobs = [sampled.logprob for sampled in job.sampled]
        assert logprobs == pytest.approx(case["logprobs"], abs=1e-3), name
        for sampled, ids, values in zip(job.sampled, case["top_ids"], case["top_logprobs"], strict=True):
            assert sampled.top is not None
            assert [value for _, value in sampled.top] == pytest.approx(values, abs=1e-3), name
            if min(first - second for first, second in pairwise(values)) > 2e-3:
                assert [token for token, _ in sampled.top] == ids, name


async def test_prompt_logprobs_equal_the_oracle_when_its_answer_is_the_prompt(exact: LoadedModel) -> None:
    case = CASES["chat"]
    job = Job(case["prompt_ids"] + case["token_ids"], 0, wants_prompt_logprobs=2)
    await generate(exact.runner, [job], chunk=30)
    assert job.prompt_logprobs[0] == (None, [])
    answer = job.prompt_logprobs[-NUM_TOKENS:]
    assert [logprob for logprob, _ in answer] == pytest.approx(case["logprobs"], abs=1e-3)
    assert [top[0][0] for _, top in answer] == case["token_ids"]


async def test_a_request_alone_or_among_others_gives_the_same_tokens(
    exact: LoadedModel, scale: Scale
) -> None:
    num_tokens, num_others = scale((6, 12), (12, 32))
    wanted = [(CASES[name]["prompt_ids"], how) for name in ("code", "cyrillic") for how in (GREEDY, SEEDED)]
    alone = [Job(prompt, num_tokens, sampling) for prompt, sampling in wanted]
    for job in alone:
        await generate(exact.runner, [job])
    crowd = [
        Job(CASES[LONG]["prompt_ids"][start : start + 3 + start % 29], num_tokens, SamplingParams(seed=start))
        for start in range(num_others)
    ]
    among = [Job(prompt, num_tokens, sampling) for prompt, sampling in wanted]
    middle = num_others * 5 // 8
    await generate(exact.runner, [*crowd[:middle], *among, *crowd[middle:]], chunk=100)
    assert [job.token_ids for job in among] == [job.token_ids for job in alone]
    assert len({tuple(job.token_ids) for job in crowd}) > num_others / 2, "the other answers must differ"


async def test_the_default_arithmetic_stays_close_to_the_oracle(demo_files: ModelFiles, scale: Scale) -> None:
    compared = cases(scale).values()
    settings = Settings(max_batch_total_tokens=16384, thread_nice=0)
    loaded = load(settings, demo_files)
    try:
        jobs = [Job(case["prompt_ids"] + case["token_ids"], 0, wants_prompt_logprobs=0) for case in compared]
        await generate(loaded.runner, jobs)
    finally:
        loaded.runner.close()
    errors = [
        abs(logprob - expected)
        for job, case in zip(jobs, compared, strict=True)
        for (logprob, _), expected in zip(job.prompt_logprobs[-NUM_TOKENS:], case["logprobs"], strict=True)
        if logprob is not None
    ]
    assert len(errors) == NUM_TOKENS * len(compared)
    assert sum(errors) / len(errors) < 0.04
