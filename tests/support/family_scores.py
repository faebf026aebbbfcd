"""Run a model through the project's loader and runner, and compare the results with a `Reference`."""

from __future__ import annotations

import asyncio

import numpy as np

from tests.support.family_case import NUM_BEST, FamilyCase
from tests.support.family_files import Reference
from tests.support.runner_driver import Job, generate
from tgi_asgi.formats.sources import ModelFiles
from tgi_asgi.runner.load import load
from tgi_asgi.settings import Settings
from tgi_asgi.types import SamplingParams

_CHUNK = 24  # prompt tokens per step, so that chunks end inside blocks


def score(
    case: FamilyCase, files: ModelFiles, found: Reference, dtype: str, model_impl: str = "auto",
    num_shard: int = 1,
) -> Job:  # fmt: skip
    """Score the reference's prompt and generate the same number of tokens, as the server would."""
    settings = Settings(
        dtype=dtype,
        num_shard=num_shard,
        model_impl=model_impl,
        num_threads=2,
        thread_nice=0,
        max_batch_size=2,
        max_batch_prefill_tokens=128,
        max_batch_total_tokens=512,
        max_total_tokens=case.max_total_tokens,
    )
    sampling = SamplingParams(temperature=0.0, logprobs=NUM_BEST)
    job = Job(found.prompt_ids, len(found.token_ids), sampling, wants_prompt_logprobs=NUM_BEST)
    runner = load(settings, files).runner
    try:
        asyncio.run(generate(runner, [job], chunk=_CHUNK))
    finally:
        runner.close()
    return job


def differences(job: Job, found: Reference) -> np.ndarray:
    """Return the runner's errors in log-probabilities: [n_tokens compared], NaN made infinite.

    Each entry is the largest difference at a position, over the token that follows and the runner's best
    tokens. The comparison ends at the first generated token that differs from the reference's, because all
    later ones differ too.
    """
    rows = [
        [*top, (token, logprob)]
        for token, (logprob, top) in zip(job.prompt_ids, job.prompt_logprobs, strict=True)
        if logprob is not None  # the first token follows none
    ]
    for sampled, expected in zip(job.sampled, found.token_ids, strict=True):
        assert sampled.logprob is not None
        rows.append([*(sampled.top or ()), (sampled.token_id, sampled.logprob)])
        if sampled.token_id != expected:
            break
    worst = [
        max(abs(logprob - float(truth[token])) for token, logprob in row)
        for row, truth in zip(rows, found.logprobs[: len(rows)], strict=True)
    ]
    apart: np.ndarray = np.nan_to_num(np.array(worst), nan=np.inf)
    return apart
