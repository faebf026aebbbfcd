"""The CUDA kernels of sampling in emulation: the sampled token, its candidates, and its log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from tests.emulation.device import Device
from tests.reference.compare import note
from tests.reference.philox import sample_token
from tests.reference.sample import penalised, probabilities
from tgi_asgi.ops.sample_state import SampleState
from tgi_asgi.types import LogprobsMode, SamplingParams

PROMPT, OUTPUT = [1, 5, 5, 9, 11], [2, 5, 2, 2, 30]


@dataclass
class Samples:
    """The kernel's output, one list entry per row."""

    ids: list[int]
    are_finite: list[bool]
    logprobs: list[float]
    tops: list[dict[int, float]]
    choices: list[int]
    state: SampleState = field(repr=False)


def run(
    device: Device,
    logits: Tensor,
    params: Sequence[SamplingParams],
    *,
    max_top: int = 0,
    banned: Sequence[int] = (),
    mask: Tensor | None = None,
    mask_rows: Sequence[int] = (),
    padding: bool = False,
) -> Samples:
    rows, vocab = logits.shape
    state = SampleState(rows + 2, vocab)
    slots = torch.randperm(rows + 2)[:rows].int()
    for slot, sampling in zip(slots.tolist(), params, strict=True):
        state.start(
            slot, sampling, choice=slot % 3, prompt_ids=PROMPT, output_ids=OUTPUT,
            min_tokens=len(OUTPUT) + 1 if banned else 0, masked_ids=banned,
        )  # fmt: skip
    if padding:
        slots[rows - 1] = -1
    records, counts = (device.tensor(torch.from_numpy(part)) for part in (state.record_bytes, state.counts))
    biased_ids, biased_values, masked_ids = (device.tensor(torch.from_numpy(part)) for part in state.lists)
    ids = device.empty((rows,), torch.int32)
    are_finite = device.empty((rows,), torch.bool)
    logprobs = device.empty((rows,), torch.float32)
    top_ids = device.empty((rows, max_top), torch.int32)
    top_logprobs = device.empty((rows, max_top), torch.float32)
    num_top = device.empty((rows,), torch.int32)
    outputs = [records, counts, ids, are_finite, logprobs, top_ids, top_logprobs, num_top]
    device.run(
        "sample", outputs, logits=device.tensor(logits), slots=device.tensor(slots), records=records,
        counts=counts, biased_ids=biased_ids, biased_values=biased_values,
        masked_ids=masked_ids, mask=None if mask is None else device.tensor(mask),
        mask_rows=None if mask is None else device.tensor(torch.tensor(mask_rows, dtype=torch.int32)),
        num_masks=0 if mask is None else mask.shape[0],
        token_ids=ids, is_finite=are_finite, logprobs=logprobs, top_ids=top_ids, top_logprobs=top_logprobs,
        num_top=num_top, vocab=vocab, biased_stride=biased_ids.shape[1], masked_stride=masked_ids.shape[1],
        max_top=max_top, scratch=device.empty((rows, vocab), torch.float32),
        workspace=device.empty((device.sample_workspace_bytes(rows),), torch.uint8), num_rows=rows,
        num_slots=rows + 2,
    )  # fmt: skip
    state.record_bytes[:] = records.numpy()
    state.counts[:] = counts.numpy()
    tops = [
        dict(zip(top_ids[row, :count].tolist(), top_logprobs[row, :count].tolist(), strict=True))
        for row, count in enumerate(num_top.tolist())
    ]
    choices = [slot % 3 for slot in slots.tolist()]
    return Samples(ids.tolist(), are_finite.tolist(), logprobs.tolist(), tops, choices, state)


def check(
    device: Device,
    logits: Tensor,
    params: Sequence[SamplingParams],
    banned: Sequence[int] = (),
    mask: Tensor | None = None,
    mask_rows: Sequence[int] = (),
) -> None:
    """Compare the set of candidates, its log-probabilities and the sampled token with the reference.

    Only the best of a large set are listed, because each takes a pass; the sum of the others shows that none
    is missing.
    """
    vocab = logits.shape[1]
    max_top = min(vocab, 40)
    wanted = [replace(one, logprobs=max_top, logprobs_mode=LogprobsMode.PROCESSED) for one in params]
    found = run(device, logits, wanted, max_top=max_top, banned=banned, mask=mask, mask_rows=mask_rows)
    position = len(PROMPT) + len(OUTPUT)
    for row, sampling in enumerate(params):
        x = penalised(logits[row], sampling, PROMPT, OUTPUT, banned)
        if mask is not None and 0 <= mask_rows[row] < len(mask):
            words = mask[mask_rows[row]]
            bits = torch.tensor([words[i // 32] >> (i % 32) & 1 for i in range(vocab)], dtype=torch.bool)
            x = x.masked_fill(~bits, -math.inf)
        slot = (
            int((found.state.records["position"] == position + 1).nonzero()[0][0])
            if len(params) == 1
            else None
        )
        expected = x.softmax(0) if sampling.temperature == 0 else probabilities(x, sampling)
        logs = expected.log()
        kept = logs[logs.isfinite()].sort(descending=True).values[:max_top]
        assert len(found.tops[row]) == len(kept)
        assert min(found.tops[row].values()) == pytest.approx(float(kept[-1]), abs=1e-4)
        for token, logprob in found.tops[row].items():
            assert_near(logprob, float(logs[token]))
        if sampling.temperature == 0:
            assert found.ids[row] == int(x.argmax())
        elif slot is not None:
            assert found.ids[row] == sample_token(logs.tolist(), sampling.seed, slot % 3, position)
        assert_near(found.logprobs[row], float(logs[found.ids[row]]))


def assert_near(actual: float, expected: float) -> None:
    """Compare a log-probability with its reference: its error is a relative error of the probability."""
    note(abs(actual - expected), 2e-5)
    assert actual == pytest.approx(expected, abs=2e-5)


WAYS = [
    SamplingParams(temperature=0),
    SamplingParams(seed=3),
    SamplingParams(temperature=0.7, seed=2**62 + 5),
    SamplingParams(top_k=1),
    SamplingParams(top_k=7, temperature=3.0),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.001),
    SamplingParams(top_k=40, top_p=0.5, temperature=2.0),
    SamplingParams(min_p=0.1),
    SamplingParams(typical_p=0.5, temperature=1.5),
    SamplingParams(top_k=50, top_p=0.9, min_p=0.01, typical_p=0.8, temperature=1.3),
    SamplingParams(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.3),
    SamplingParams(repetition_penalty=0.8, temperature=0),
    SamplingParams(logit_bias=((3, 5.0), (4, -100.0), (9, -2.5)), top_k=4),
]


@pytest.mark.parametrize("vocab", [37, 1000])
@pytest.mark.parametrize("sampling", WAYS, ids=str)
def test_a_row_is_sampled_as_in_the_reference(device: Device, sampling: SamplingParams, vocab: int) -> None:
    check(device, torch.randn(1, vocab) * 3, [sampling])


def test_flat_logits_show_the_edge_of_the_set(device: Device) -> None:
    flat = 1 + torch.randperm(513).float()[None] * 1e-6
    check(device, flat, [SamplingParams(top_k=5)])
    check(device, flat.round(decimals=5), [SamplingParams(top_k=5)])  # complete ties are kept


@pytest.mark.parametrize("count", [2200, 4300])
def test_a_bin_may_have_more_elements_than_a_list(device: Device, count: int) -> None:
    """Tokens within a 64th, of which a block lists 2,048 and a row 4,096: many are kept, others are not."""
    logits = torch.cat([torch.randperm(count).float() * 1e-6, torch.randn(77) - 1])[None]
    check(device, logits, [SamplingParams(top_k=count - 100)])
    check(device, logits, [SamplingParams(top_p=0.9)])


def test_a_row_s_bits_do_not_hang_on_how_many_blocks_share_it(device: Device) -> None:
    """A row alone is split into five parts; each of six rows is a single part."""
    row = torch.randn(1, 2501) * 3
    ways = [
        SamplingParams(seed=6, logprobs=5),
        SamplingParams(seed=6, top_k=30, top_p=0.9, logprobs=5, logprobs_mode=LogprobsMode.PROCESSED),
        SamplingParams(seed=6, top_p=0.95, min_p=0.001, typical_p=0.9, logprobs=5),
        SamplingParams(seed=6, min_p=0.01, logprobs=5, logprobs_mode=LogprobsMode.PROCESSED),
        SamplingParams(temperature=0, repetition_penalty=1.2, logprobs=5),
        SamplingParams(temperature=0, top_k=9, logprobs=5, logprobs_mode=LogprobsMode.PROCESSED),
    ]
    for way in ways:
        alone, among = (
            run(device, row.expand(rows, -1).contiguous(), [way] * rows, max_top=5) for rows in (1, 6)
        )
        (slot,) = alone.state.records["position"].nonzero()[0].tolist()
        same = [i for i, choice in enumerate(among.choices) if choice == slot % 3]
        assert same and all(among.ids[i] == alone.ids[0] for i in same)
        assert all(top == alone.tops[0] for top in among.tops)
        assert len({among.logprobs[i] for i in same} | {alone.logprobs[0]}) == 1


def test_a_row_s_bits_do_not_hang_on_where_it_lies(device: Device) -> None:
    """Rows of 1,003 floats: one in four is aligned to 16 bytes."""
    logits = (torch.randn(1, 1003) * 3).expand(4, -1).contiguous()
    wanted = [SamplingParams(top_p=0.9, typical_p=0.9, seed=4, logprobs=9)] * 4
    found = run(device, logits, wanted, max_top=9)
    assert all(top == found.tops[0] for top in found.tops)
    assert len({found.logprobs[row] for row in range(4) if found.ids[row] == found.ids[0]}) == 1


@pytest.mark.parametrize("top_k", [1, 40, 300, 2500])
def test_a_long_row_finds_its_candidates_in_groups(device: Device, top_k: int) -> None:
    """Each thread reads several runs; few, many, and more candidates than a list has room for."""
    logits = torch.randn(1, 21003) * 3
    logits[0, 20000:20100] += 4
    for way in (SamplingParams(top_k=top_k, seed=9), SamplingParams(top_k=top_k, top_p=0.9, temperature=0.1)):
        check(device, logits, [way])


def test_fewer_tokens_may_be_allowed_than_wanted(device: Device) -> None:
    logits = torch.full((1, 5000), -math.inf)
    logits[0, 64:80] = torch.randn(16)
    check(device, logits, [SamplingParams(top_k=50)])
    check(device, logits, [SamplingParams(top_k=50, top_p=0.5)])


def test_large_and_negative_logits_do_not_overflow(device: Device) -> None:
    check(device, torch.randn(1, 300) * 50 - 30000, [SamplingParams(top_p=0.95)])


def test_rows_differ_in_everything_and_masked_ids_are_never_sampled(device: Device) -> None:
    logits = torch.randn(len(WAYS), 130)
    mask = torch.randint(-(2**31), 2**31, (5, 5), dtype=torch.int64).int()
    mask_rows = [3, -1, 4, 0, -1, 1, 2, 5, -1, -1, -1, 0, -1, -1]  # there is no row 5
    check(device, logits, WAYS, banned=(0, 7, 129), mask=mask, mask_rows=mask_rows)


def test_the_state_moves_on_by_the_token_sampled(device: Device) -> None:
    found = run(device, torch.randn(1, 50), [SamplingParams(presence_penalty=0.1)])
    slot = int(found.state.records["position"].argmax())
    assert found.state.records["position"][slot] == len(PROMPT) + len(OUTPUT) + 1
    assert found.state.last_ids[slot] == found.ids[0]
    expected = [2 * OUTPUT.count(token) + (token in PROMPT) for token in range(50)]
    expected[found.ids[0]] += 2
    assert found.state.counts[slot].tolist() == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_samples_nothing_and_others_go_on(device: Device, bad: float) -> None:
    logits = torch.randn(3, 600)
    logits[1, 555] = bad
    found = run(device, logits, [SamplingParams(temperature=0, logprobs=0)] * 3)
    assert found.are_finite == [True, False, True]
    assert found.ids == [int(logits[0].argmax()), 0, int(logits[2].argmax())]
    assert math.isnan(found.logprobs[1])
    assert sorted(found.state.records["position"].tolist()) == [0, 0, 10, 11, 11]


def test_a_row_without_a_slot_is_padding(device: Device) -> None:
    found = run(device, torch.randn(2, 40), [SamplingParams(temperature=0)] * 2, padding=True)
    assert found.are_finite == [True, False]
    assert sorted(found.state.records["position"].tolist()) == [0, 0, 10, 11]


def test_raw_log_probabilities_are_of_the_logits_as_they_came(device: Device) -> None:
    logits = torch.randn(1, 700)
    logits[0, 20] = logits[0, 10]
    sampling = SamplingParams(temperature=0.5, top_k=3, repetition_penalty=2.0, logprobs=5)
    found = run(device, logits, [sampling], max_top=8)
    logs = logits[0].double().log_softmax(0)
    assert list(found.tops[0]) == logs.sort(descending=True, stable=True).indices[:5].tolist()
    for token, logprob in [*found.tops[0].items(), (found.ids[0], found.logprobs[0])]:
        assert logprob == pytest.approx(float(logs[token]), abs=1e-5)


def test_token_logprobs_equal_the_reference(device: Device) -> None:
    logits = torch.randn(4, 530) * 2
    logits[2, 3] = math.nan
    logits[3, 5:] = -math.inf
    token_ids = device.tensor(torch.tensor([0, 529, 1, 7], dtype=torch.int32))
    logprobs = device.empty((4,), torch.float32)
    top_ids, top_logprobs = device.empty((4, 7), torch.int32), device.empty((4, 7), torch.float32)
    device.run(
        "token_logprobs", [logprobs, top_ids, top_logprobs], logits=device.tensor(logits),
        token_ids=token_ids, logprobs=logprobs, top_ids=top_ids, top_logprobs=top_logprobs, vocab=530,
        num_top=7, num_rows=4,
    )  # fmt: skip
    for row in (0, 1):
        logs = logits[row].double().log_softmax(0)
        assert float(logprobs[row]) == pytest.approx(float(logs[token_ids[row]]), abs=1e-5)
        assert top_ids[row].tolist() == logs.topk(7).indices.tolist()
        assert top_logprobs[row].tolist() == pytest.approx(logs.topk(7).values.tolist(), abs=1e-5)
    assert logprobs[2].isnan() and top_logprobs[2].isnan().all()
    assert logprobs[3] == -math.inf
    assert top_logprobs[3, 5:].tolist() == [-math.inf, -math.inf]
