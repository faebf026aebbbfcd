"""The operator sample: which tokens can be sampled, how often, and what is reported about them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.reference.sample import penalised, probabilities
from tests.support import eager_ops
from tgi_asgi import _C, ops
from tgi_asgi.ops.sample_state import SLOT
from tgi_asgi.types import LogprobsMode, SamplingParams

GREEDY = SamplingParams(temperature=0.0)

FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 7.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 10_000},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"typical_p": 0.4},
    {"typical_p": 0.95},
    {"top_k": 20, "top_p": 0.8},
    {"temperature": 1.7, "top_k": 30, "top_p": 0.9, "min_p": 0.1},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "typical_p": 0.7},
    {"repetition_penalty": 1.8, "frequency_penalty": 0.5, "presence_penalty": -0.4},
    {"logit_bias": ((3, 4.0), (0, -100.0), (7, -2.5))},
]


def slots(*indices: int) -> list[int]:
    return list(indices)


def started(params: SamplingParams, vocab: int, num_slots: int = 1, **start: Any) -> ops.SampleState:
    """Return a state whose slots all start with these parameters, each with its own choice."""
    state = ops.SampleState(num_slots, vocab)
    for slot in range(num_slots):
        state.start(slot, params, **{"choice": slot, "prompt_ids": [1, 2, 2], **start})
    return state


def processed(vocab: int, **filters: Any) -> SamplingParams:
    return SamplingParams(logprobs=vocab, logprobs_mode=LogprobsMode.PROCESSED, **filters)


def distribution(result: eager_ops.Samples, vocab: int, row: int = 0) -> Tensor:
    """Return the distribution in the row's top list; tokens not listed have probability 0."""
    count = int(result.num_top[row])
    dense = torch.zeros(vocab, dtype=torch.float64)
    ids = result.top_ids[row, :count].long()
    dense[ids] = result.top_logprobs[row, :count].double().exp()
    return dense


@pytest.mark.parametrize("vocab", [1, 3, 17, 129, 1000])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_distribution_sampled_from_is_the_references(
    kernel_set: str, filters: dict[str, Any], vocab: int
) -> None:
    if vocab <= 7 and "logit_bias" in filters:
        filters = {"logit_bias": ((vocab - 1, 2.0),)}
    params = processed(vocab, **filters)
    prompt, output = [0, vocab - 1], [vocab // 2, vocab - 1, vocab - 1]
    logits = torch.randn(1, vocab) * 2
    result = eager_ops.sample(logits, started(params, vocab, prompt_ids=prompt, output_ids=output), slots(0))
    expected = probabilities(penalised(logits[0], params, prompt, output), params)
    actual = distribution(result, vocab)
    assert torch.equal(actual > 0, expected > 0), "the set of remaining tokens differs"
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_samples_follow_the_exact_probabilities(filters: dict[str, Any]) -> None:
    vocab, num_slots, rounds = 64, 200, 50
    params = SamplingParams(seed=11, **filters)
    logits = torch.randn(1, vocab) * 1.5
    expected = probabilities(penalised(logits[0], params, [1, 2], []), params).numpy()
    state = started(params, vocab, num_slots, prompt_ids=[1, 2])
    rows, every = logits.expand(num_slots, vocab).contiguous(), slots(*range(num_slots))
    counts = np.zeros(vocab)
    for round_ in range(rounds):
        state.counts[:] = 0
        state.counts[:, [1, 2]] = 1
        state.records["position"] = round_
        ids = eager_ops.sample(rows, state, every).token_ids.numpy()
        counts += np.bincount(ids, minlength=vocab)
    total = num_slots * rounds
    assert counts.sum() == total
    assert not counts[expected == 0].any(), "a token of probability 0 was sampled"
    often = expected * total >= 5
    rest = expected[~often].sum() * total
    chi_square = (((counts - expected * total) ** 2)[often] / (expected * total)[often]).sum()
    if rest >= 5:
        chi_square += (counts[~often].sum() - rest) ** 2 / rest
    freedom = int(often.sum()) - 1 + (rest >= 5)
    # Wilson and Hilferty: the cube root of chi-square / freedom is nearly normal. Beyond 4 sigma is 3e-5.
    if freedom > 0:
        spread = 2 / (9 * freedom)
        assert ((chi_square / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread) < 4


def test_a_large_vocabulary_is_cut_as_the_reference_cuts_it(kernel_set: str) -> None:
    vocab = 50_001
    cases: list[tuple[float, dict[str, Any]]] = [
        (0.01, {"top_p": 0.9}), (3.0, {"top_p": 0.97}), (0.01, {"top_k": 30_000}),
    ]  # fmt: skip
    for scale, filters in cases:
        logits = torch.randn(1, vocab) * scale
        result = eager_ops.sample(logits, started(processed(vocab, **filters), vocab), slots(0))
        expected = probabilities(logits[0].double(), SamplingParams(**filters))
        # The rounding of 50,000 terms moves a nucleus' edge by a token or two.
        slack = 3 if "top_p" in filters else 0
        assert abs(int(result.num_top) - int((expected > 0).sum())) <= slack
        assert not bool(expected[result.token_ids.long()] == 0) or slack


@pytest.mark.parametrize("vocab", [1, 3, 17, 129, 5000])
def test_greedy_takes_the_largest_and_of_equals_the_lowest_id(kernel_set: str, vocab: int) -> None:
    logits = torch.randint(-3, 3, (5, vocab)).float()
    result = eager_ops.sample(logits, started(GREEDY, vocab, 5, prompt_ids=[0]), slots(*range(5)))
    expected = [int((row == row.max()).nonzero()[0]) for row in logits]
    assert result.token_ids.tolist() == expected


def test_top_k_and_top_p_keep_whole_ties() -> None:
    logits = torch.tensor([[2.0, 1.0, 2.0, 1.0, 0.0]])
    kinds: list[dict[str, Any]] = [{"top_k": 3}, {"top_p": 0.8}]
    for filters in kinds:
        result = eager_ops.sample(logits, started(processed(5, **filters), 5), slots(0))
        assert result.top_ids[0, : int(result.num_top)].tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("temperature", [1e-45, 1e-20, 1e-6])
def test_the_least_temperatures_sample_the_best_token(kernel_set: str, temperature: float) -> None:
    logits = torch.randn(1, 100)
    result = eager_ops.sample(logits, started(SamplingParams(temperature=temperature), 100), slots(0))
    assert result.is_finite.item()
    assert result.token_ids.item() == logits.argmax().item()


def test_a_sample_depends_on_nothing_else_in_the_batch(kernel_set: str) -> None:
    vocab, many = 777, 9
    logits = torch.randn(many, vocab) * 3
    kinds = [SamplingParams(seed=5, logprobs=4, **FILTERS[i % len(FILTERS)]) for i in range(many)]

    def run(groups: list[list[int]], threads: int) -> list[tuple[Any, ...]]:
        _C.set_num_threads(threads)
        state = ops.SampleState(many, vocab)
        for slot, params in enumerate(kinds):
            state.start(slot, params, choice=slot, prompt_ids=[slot, 3])
        seen: dict[int, tuple[Any, ...]] = {}
        for group in groups:
            result = eager_ops.sample(logits[group], state, slots(*group))
            for row, slot in enumerate(group):
                entries = (result.token_ids, result.logprobs, result.top_ids, result.top_logprobs)
                seen[slot] = tuple(entry[row].tolist() for entry in entries)
        return [seen[slot] for slot in range(many)]

    # repr compares the bits of floats, with NaN equal to itself
    alone = repr(run([[slot] for slot in range(many)], 1))
    assert repr(run([list(range(many))], 1)) == alone
    assert repr(run([[8, 2, 5], [0, 1, 3, 4, 6, 7]], 3)) == alone


def test_seed_choice_and_position_each_change_the_sample() -> None:
    vocab = 10_000
    logits = torch.zeros(1, vocab)

    def sampled(seed: int, choice: int, position: int) -> int:
        state = ops.SampleState(1, vocab)
        state.start(0, SamplingParams(seed=seed), choice=choice, prompt_ids=[0] * position)
        return int(eager_ops.sample(logits, state, slots(0)).token_ids)

    places = [(0, 0, 1), (1, 0, 1), (1 << 40, 0, 1), (0, 1, 1), (0, 0, 2), (2**63 - 1, 0, 1)]
    samples = [sampled(*place) for place in places]
    assert len(set(samples)) == len(samples)
    assert samples == [sampled(*place) for place in places]


def test_resuming_after_preemption_samples_what_would_have_been_sampled() -> None:
    vocab, params = 500, SamplingParams(seed=3, repetition_penalty=1.3, frequency_penalty=0.7)
    rows = [torch.randn(1, vocab) * 3 for _ in range(8)]
    state = started(params, vocab)
    straight = [int(eager_ops.sample(row, state, slots(0)).token_ids) for row in rows]
    resumed = started(params, vocab, output_ids=straight[:5])
    assert [int(eager_ops.sample(row, resumed, slots(0)).token_ids) for row in rows[5:]] == straight[5:]


def test_a_slot_moves_on_by_its_sample_and_only_if_it_was_sampled() -> None:
    state = started(replace(GREEDY, presence_penalty=0.1), 50, num_slots=2)
    token = int(eager_ops.sample(torch.randn(1, 50), state, slots(1)).token_ids)
    assert state.records["position"].tolist() == [3, 4]
    assert state.last_ids.tolist() == [2, token]
    assert state.counts[1, token] in (2, 3)
    assert state.counts[0].tolist() == [0, 1, 1] + [0] * 47


def test_starting_a_slot_again_forgets_its_past() -> None:
    vocab = 40
    state = started(SamplingParams(temperature=0, frequency_penalty=2, logit_bias=((5, 9.0),)), vocab)
    for _ in range(3):
        eager_ops.sample(torch.randn(1, vocab), state, slots(0))
    state.start(0, replace(GREEDY, presence_penalty=0.5), choice=0, prompt_ids=[7])
    assert state.counts[0].nonzero()[0].tolist() == [7]
    logits = torch.zeros(1, vocab)
    logits[0, 30] = 1
    assert int(eager_ops.sample(logits, state, slots(0)).token_ids) == 30


def test_a_slot_that_was_sampled_before_its_first_start_has_no_past() -> None:
    vocab = 40
    state = ops.SampleState(1, vocab)
    eager_ops.sample(torch.randn(1, vocab), state, slots(0))
    state.start(0, replace(GREEDY, presence_penalty=0.5), choice=0, prompt_ids=[7])
    assert state.counts[0].nonzero()[0].tolist() == [7]


def test_masked_ids_cannot_be_sampled_before_min_tokens() -> None:
    logits = torch.tensor([[0.0, 5.0, 3.0, 4.0]])
    state = started(GREEDY, 4, prompt_ids=[0], min_tokens=2, masked_ids=[1, 3])
    assert [int(eager_ops.sample(logits, state, slots(0)).token_ids) for _ in range(4)] == [2, 2, 1, 1]


def test_the_mask_leaves_only_what_it_allows(kernel_set: str) -> None:
    vocab = 70
    allowed = [0, 31, 32, 64, 69]
    bits = np.zeros(96, dtype=bool)
    bits[allowed] = True
    mask = np.packbits(bits, bitorder="little").view(np.int32)[None].copy()
    state = started(processed(vocab), vocab)
    result = eager_ops.sample(torch.randn(1, vocab), state, slots(0), mask=mask)
    assert sorted(result.top_ids[0, : int(result.num_top)].tolist()) == allowed
    assert int(result.token_ids) in allowed


def test_a_longer_bias_list_than_any_before_is_kept_whole() -> None:
    vocab = 300
    state = started(GREEDY, vocab, num_slots=2)
    bias = tuple((token, float(token)) for token in range(250))
    state.start(1, replace(GREEDY, logit_bias=bias), choice=0, prompt_ids=[1])
    assert int(eager_ops.sample(torch.zeros(1, vocab), state, slots(1)).token_ids) == 249


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 15, 16, 128])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(top_p=0.9, logprobs=2)], ids=["greedy", "sampled"])
def test_a_row_that_is_not_finite_fails_alone(
    kernel_set: str, params: SamplingParams, place: int, bad: float
) -> None:
    logits = torch.randn(3, 129)
    logits[1, place] = bad
    state = started(params, 129, 3)
    result = eager_ops.sample(logits, state, slots(0, 1, 2))
    assert result.is_finite.tolist() == [True, False, True]
    assert result.token_ids[1] == 0
    assert math.isnan(result.logprobs[1])
    assert state.records["position"].tolist() == [4, 3, 4]


def test_minus_infinity_is_a_token_that_cannot_be_sampled(kernel_set: str) -> None:
    logits = torch.full((2, 20), -torch.inf)
    logits[0, 13] = -3.0
    state = started(processed(20), 20, 2)
    result = eager_ops.sample(logits, state, slots(0, 1))
    assert result.is_finite.tolist() == [True, False], "a row in which no token can be sampled is not finite"
    assert (int(result.token_ids[0]), float(result.logprobs[0])) == (13, 0.0)
    assert int(result.num_top[0]) == 1


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(temperature=0.5, top_k=3)], ids=["greedy", "sampled"]
)
def test_raw_logprobs_are_the_log_softmax_of_the_logits(kernel_set: str, params: SamplingParams) -> None:
    vocab = 1111
    logits = torch.randn(4, vocab) * 5
    params = replace(params, logprobs=20, logit_bias=((5, 50.0),))
    result = eager_ops.sample(logits, started(params, vocab, 4), slots(0, 1, 2, 3))
    expected = logits.double().log_softmax(-1)
    chosen = expected.gather(1, result.token_ids.long()[:, None])[:, 0]
    torch.testing.assert_close(result.logprobs.double(), chosen, atol=1e-5, rtol=0)
    best = expected.topk(20)
    assert torch.equal(result.top_ids.long(), best.indices)
    torch.testing.assert_close(result.top_logprobs.double(), best.values, atol=1e-5, rtol=0)


def test_greedy_processed_logprobs_follow_penalties_and_bias() -> None:
    params = processed(10, temperature=0.0, logit_bias=((3, 2.0), (4, -100.0)))
    logits = torch.randn(1, 10)
    result = eager_ops.sample(logits, started(params, 10), slots(0))
    expected = penalised(logits[0], params, [], []).log_softmax(0)
    assert int(result.num_top) == 9, "a banned token must not be listed"
    ids = result.top_ids[0, :9].long()
    torch.testing.assert_close(result.top_logprobs[0, :9].double(), expected[ids], atol=1e-5, rtol=0)


def test_rows_that_want_no_logprobs_have_none_beside_rows_that_do() -> None:
    state = started(GREEDY, 30, 2)
    state.start(1, replace(GREEDY, logprobs=0), choice=0, prompt_ids=[1])
    result = eager_ops.sample(torch.randn(2, 30), state, slots(0, 1))
    assert torch.isnan(result.logprobs).tolist() == [True, False]
    assert result.top_ids.shape == (2, 0)


def test_logits_are_not_changed() -> None:
    logits = torch.randn(2, 300)
    before = logits.clone()
    params = SamplingParams(repetition_penalty=2.0, logit_bias=((1, 3.0),), top_k=9, typical_p=0.9)
    eager_ops.sample(logits, started(params, 300, 2), slots(0, 1))
    assert torch.equal(logits, before)


def test_the_record_is_laid_out_as_the_kernel_reads_it() -> None:
    assert SLOT.itemsize == 80
    assert SLOT.fields is not None
    assert [SLOT.fields[name][1] for name in ("seed", "position", "choice", "flags")] == [32, 40, 56, 76]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ((0, 2), r"`slots`\[1\] must be in \[0, 2\), got 2"),
        ((-1, 0), r"`slots`\[0\] must be in \[0, 2\), got -1"),
        ((1, 1), "must differ, got 1"),
    ],
)
def test_slots_out_of_range_or_named_twice_are_refused(indices: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eager_ops.sample(torch.zeros(2, 10), started(GREEDY, 10, 2), slots(*indices))


@pytest.mark.parametrize(
    "start",
    [{"slot": 2}, {"slot": -1}, {"prompt_ids": [10]}, {"output_ids": [-1]}, {"masked_ids": [10]}],
    ids=str,
)
def test_starting_with_values_out_of_range_is_refused(start: dict[str, Any]) -> None:
    state = ops.SampleState(2, 10)
    with pytest.raises(ValueError, match="must be in"):
        state.start(**{"slot": 0, "sampling": GREEDY, "choice": 0, "prompt_ids": [1], **start})


def test_a_long_prompt_is_not_read_unless_penalties_count_its_tokens() -> None:
    """Each choice starts a slot: 128 of them with a prompt of 131,072 tokens would take 0.7 s of a step."""

    class Unread(list[int]):
        def __iter__(self) -> Iterator[int]:
            raise AssertionError("the prompt was read")

    state = ops.SampleState(2, 10)
    state.start(0, GREEDY, choice=0, prompt_ids=Unread([1, 2, 3]))
    assert (state.last_ids[0], state.records["position"][0]) == (3, 3)
    with pytest.raises(ValueError, match="must be in"):
        state.start(0, GREEDY, choice=0, prompt_ids=Unread([1, 2, 10]))
    with pytest.raises(ValueError, match="must be in"):
        state.start(0, SamplingParams(presence_penalty=0.1), choice=0, prompt_ids=[1, 10, 2])


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "typical_p"])
@pytest.mark.parametrize("value", [-0.5, float("nan"), 1.5])
def test_a_record_that_leaves_nothing_to_sample_is_refused(field: str, value: float) -> None:
    """Check the record, as no token would pass the threshold and the next slot's counts be overwritten."""
    if (field, value) == ("temperature", 1.5):
        value = -1.5
    state = ops.SampleState(2, 100)
    state.start(0, SamplingParams(temperature=1.0, presence_penalty=0.5), choice=0, prompt_ids=[1])
    state.records[0][field] = value
    with pytest.raises(ValueError, match=f"{field}|the temperature"):
        eager_ops.sample(torch.randn(1, 100), state, [0])
    assert not state.counts[1].any()
