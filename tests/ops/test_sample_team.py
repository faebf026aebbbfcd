"""The operator sample on a thread team: a row has the same bits whichever or how many threads sample it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.support import eager_ops
from tgi_asgi import _C, ops
from tgi_asgi.types import LogprobsMode, SamplingParams

RAW, PROCESSED = LogprobsMode.RAW, LogprobsMode.PROCESSED
KINDS = [
    SamplingParams(temperature=0.0, logprobs=7, logprobs_mode=RAW),
    SamplingParams(temperature=0.9, seed=1),
    SamplingParams(temperature=0.7, seed=2, top_p=0.9, logprobs=3, logprobs_mode=PROCESSED),
    SamplingParams(temperature=9.0, seed=3, top_p=0.97),
    SamplingParams(temperature=1.3, seed=4, top_k=40, top_p=0.95, min_p=0.01),
    SamplingParams(temperature=9.0, seed=5, top_k=30_000, logprobs=2, logprobs_mode=PROCESSED),
    SamplingParams(temperature=1.0, seed=6, typical_p=0.6),
    SamplingParams(temperature=1.0, seed=7, repetition_penalty=1.4, frequency_penalty=0.3),
    SamplingParams(temperature=0.0, presence_penalty=2.0, logit_bias=((0, 5.0), (1023, 5.0), (1024, 5.0))),
]


def results_of(
    logits: torch.Tensor, params: list[SamplingParams], mask: np.ndarray | None, threads: int
) -> list[np.ndarray]:
    """Return all results of sampling these rows three times, and the slots' records afterwards."""
    vocab = logits.shape[1]
    state = ops.SampleState(len(params), vocab)
    for slot, kind in enumerate(params):
        prompt, held = [1, 2, 2, vocab - 1], [5, vocab - 1]
        state.start(slot, kind, choice=slot, prompt_ids=prompt, min_tokens=2, masked_ids=held)
    _C.set_num_threads(threads)
    found: list[np.ndarray] = []
    for _ in range(3):
        result = eager_ops.sample(logits, state, list(range(len(params))), mask=mask)
        for row in range(len(params)):  # entries beyond the row's count are undefined
            count = int(result.num_top[row])
            found += [result.top_ids[row, :count].numpy(), result.top_logprobs[row, :count].numpy()]
        found += [result.token_ids.numpy(), result.is_finite.numpy(), result.logprobs.numpy()]
    return [*found, state.records.copy(), state.counts.copy()]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    """Return whether all bytes are equal, including those of NaN."""
    return all(x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


@pytest.fixture
def rows() -> Iterator[torch.Tensor]:
    """Logits of many blocks of sums, with ties across them, and a partial last block."""
    logits = torch.round(torch.randn(len(KINDS), 40_123) * 8) / 4
    yield logits


@pytest.mark.parametrize("index", range(len(KINDS)))
def test_a_row_that_a_team_samples_together_has_the_bits_of_one_sampled_alone(
    kernel_set: str, rows: torch.Tensor, index: int
) -> None:
    row, kind = rows[index : index + 1], [KINDS[index]]
    words = (1, -(-rows.shape[1] // 32))
    mask = np.random.default_rng(index).integers(-(2**31), 2**31, words, dtype=np.int32)
    for mask_or_none, teams in ((None, (2, 5)), (mask, (3,))):
        alone = results_of(row, kind, mask_or_none, 1)
        for threads in teams:
            assert same(alone, results_of(row, kind, mask_or_none, threads)), f"{threads} threads"


@pytest.mark.parametrize("threads", [2, 4, 7])
def test_rows_that_do_not_come_out_even_are_sampled_as_all_others(rows: torch.Tensor, threads: int) -> None:
    assert len(KINDS) % threads, "otherwise no row would be sampled by several threads"
    assert same(results_of(rows, KINDS, None, 1), results_of(rows, KINDS, None, threads))


@pytest.mark.parametrize("vocab", [1, 31, 1024, 1025, 2049])
def test_a_part_may_have_nothing_to_sample(vocab: int) -> None:
    kinds = [SamplingParams(temperature=0.8, seed=3, top_p=0.9)] * 5
    logits = torch.randn(5, vocab)
    pad = torch.full((5, 40_960 - vocab), -torch.inf)  # enough for several threads to pay off
    logits = torch.cat([pad, logits], 1)
    assert same(results_of(logits, kinds, None, 1), results_of(logits, kinds, None, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 20_000, 40_122])
def test_a_row_that_is_not_finite_is_told_whoever_finds_it(rows: torch.Tensor, bad: float, at: int) -> None:
    row = rows[1:2].clone()
    row[0, at] = bad
    found = results_of(row, [KINDS[1]], None, 3)
    assert same(found, results_of(row, [KINDS[1]], None, 1))
    assert not found[3][0], "`is_finite` of the first sample must be false"
