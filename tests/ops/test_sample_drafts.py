"""Rows that follow draft tokens are sampled as if one token came after another."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import eager_ops
from tgi_asgi import ops
from tgi_asgi.types import LogprobsMode, SamplingParams

VOCAB = 300


def params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 1.0]),
        top_k=rng.choice([0, 3]),
        top_p=rng.choice([0.5, 1.0]),
        repetition_penalty=rng.choice([1.0, 1.4]),
        frequency_penalty=rng.choice([0.0, 0.8]),
        presence_penalty=rng.choice([0.0, -0.5]),
        seed=rng.randrange(1 << 40),
        logprobs=rng.choice([None, 3]),
        logprobs_mode=rng.choice(list(LogprobsMode)),
    )


def state_of(sampling: list[SamplingParams], prompt: list[int]) -> ops.SampleState:
    state = ops.SampleState(len(sampling), VOCAB)
    for slot, each in enumerate(sampling):
        state.start(slot, each, choice=0, prompt_ids=prompt, min_tokens=2, masked_ids=(1, 2))
    return state


def row_of(result: eager_ops.Samples, row: int) -> tuple[Any, ...]:
    count = int(result.num_top[row])
    logprob = float(result.logprobs[row])
    return (
        int(result.token_ids[row]),
        bool(result.is_finite[row]),
        None if logprob != logprob else logprob,
        result.top_ids[row, :count].tolist(),
        result.top_logprobs[row, :count].tolist(),
    )


@pytest.mark.parametrize("seed", range(20))
def test_samples_behind_drafts_are_those_of_one_by_one(seed: int) -> None:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    prompt = [rng.randrange(VOCAB) for _ in range(5)]
    sampling = [params(rng) for _ in range(3)]
    logits = torch.randn(3, 6, VOCAB, generator=generator) * 3
    logits[rng.randrange(3), rng.randrange(1, 6), 7] = float("nan")
    alone, ahead = state_of(sampling, prompt), state_of(sampling, prompt)
    slots, drafts, rows, expected, places = [], [], [], [], []
    for slot in (2, 0, 1):
        singles: list[tuple[Any, ...]] = []
        num_right = rng.randrange(0, 5)
        for at in range(5):
            if singles and not singles[-1][1]:
                break
            singles.append(row_of(eager_ops.sample(logits[slot, at : at + 1], alone, [slot]), 0))
            if at == num_right:
                break
        # The draft after the last right one differs from the sampled token.
        given = [one[0] if at < num_right else (one[0] + 1) % VOCAB for at, one in enumerate(singles)]
        given = given if singles[-1][1] else given[:-1]
        expected += singles
        places += [True] * len(singles) + [False] * (1 + len(given) - len(singles))
        slots += [slot] * (1 + len(given))
        drafts += [-1, *given]
        rows += [logits[slot, at] for at in range(1 + len(given))]
    result = eager_ops.sample(torch.stack(rows), ahead, slots, drafts=drafts)
    assert result.is_accepted is not None
    assert result.is_accepted.tolist() == places
    assert [row_of(result, row) for row in np.flatnonzero(places).tolist()] == expected
    assert (ahead.records == alone.records).all()
    assert (ahead.counts == alone.counts).all()


@pytest.mark.parametrize("drafts", [[3, -1], [-1, VOCAB], [-1, -1], [-1]])
def test_drafts_that_follow_nothing_are_refused(drafts: list[int]) -> None:
    state = state_of([SamplingParams()], [4])
    with pytest.raises(ValueError, match=r"drafts|slots"):
        eager_ops.sample(torch.zeros(2, VOCAB), state, [0, 0], drafts=drafts)
