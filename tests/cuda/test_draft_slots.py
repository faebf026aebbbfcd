"""Slots to sample from after drafts, in emulation: copies that go on, and what a slot takes over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cuda.faults import Fault, assert_caught
from tests.emulation.device import Device
from tests.reference.compare import assert_equal
from tgi_asgi.ops.sample_state import SampleState
from tgi_asgi.types import SamplingParams

PROMPT = [1, 5, 5, 9, 11]
OUTPUTS = [[2, 5, 2, *[8] * slot] for slot in range(4)]
MIN_TOKENS = 6
VOCAB = 2100  # of which two blocks copy the counts
BANNED = (7, 30)
PLAIN = SamplingParams(seed=3, temperature=0.5, top_k=5, logprobs=2)
BIASED = SamplingParams(seed=4, logit_bias=tuple((token, 0.5) for token in range(40, 80)))
PENALISED = SamplingParams(seed=2**63, repetition_penalty=1.3, frequency_penalty=0.2)
ALL = (PLAIN, BIASED, PENALISED, PENALISED)


@dataclass
class Slots:
    """The arrays of a few slots on the device, and of spares behind them."""

    state: SampleState
    arrays: dict[str, Tensor]
    drafts: dict[str, Tensor]

    @classmethod
    def of(cls, device: Device, drafts: Sequence[Sequence[int]], num_spares: int, gap: int) -> Slots:
        """Start slots 0 to 3 with all kinds of parameters; `gap` spares are not used before each slot's."""
        state = SampleState(len(ALL), VOCAB)
        for slot, sampling in enumerate(ALL):
            state.start(
                slot, sampling, choice=slot, prompt_ids=PROMPT, output_ids=OUTPUTS[slot],
                min_tokens=MIN_TOKENS, masked_ids=BANNED,
            )  # fmt: skip
        parts = [torch.from_numpy(part) for part in (state.record_bytes, state.counts, *state.lists)]
        names = ("records", "counts", "biased_ids", "biased_values", "masked_ids")
        arrays = {}
        for name, part in zip(names, parts, strict=True):
            arrays[name] = device.empty((len(ALL) + num_spares, *part.shape[1:]), part.dtype)
            arrays[name][: len(ALL)] = part
        used = np.full((3, num_spares), -1, np.int32)
        at = 0
        for slot, of_slot in enumerate(drafts):
            at += gap
            for ahead, draft in enumerate(of_slot, 1):
                used[:, at] = slot, ahead, draft
                at += 1
        given = {
            name: device.tensor(torch.from_numpy(row.copy()))
            for name, row in zip(("slots", "ahead", "drafts"), used, strict=True)
        }
        return cls(state, arrays, given)

    def run(self, device: Device, name: str) -> None:
        """Run an operator, and nowhere else may it write."""
        sizes = {
            "num_slots": len(ALL), "num_spares": len(self.drafts["slots"]), "vocab": VOCAB,
            "biased_stride": self.arrays["biased_ids"].shape[1],
            "masked_stride": self.arrays["masked_ids"].shape[1],
        }  # fmt: skip
        device.run(name, list(self.arrays.values()), **self.arrays, **self.drafts, **sizes)

    def records(self) -> np.ndarray:
        return self.arrays["records"].numpy().view(self.state.records.dtype)[:, 0]

    def spare(self, slot: int, ahead: int) -> int:
        """Return the index of a slot's spare in all arrays."""
        found = (self.drafts["slots"] == slot) & (self.drafts["ahead"] == ahead)
        return len(ALL) + int(found.nonzero()[0][0])


def check_copies(device: Device, drafts: Sequence[Sequence[int]], num_spares: int = 12, gap: int = 0) -> None:
    """Compare each copy with a slot that starts with the drafts as its output."""
    slots = Slots.of(device, drafts, num_spares, gap)
    own = {name: part[: len(ALL)].clone() for name, part in slots.arrays.items()}
    slots.run(device, "draft_slots")
    for name, part in own.items():
        assert torch.equal(slots.arrays[name][: len(ALL)], part), "the slots themselves"
    for slot, of_slot in enumerate(drafts):
        for ahead in range(1, len(of_slot) + 1):
            at = slots.spare(slot, ahead)
            expected = SampleState(len(ALL), VOCAB)
            expected.start(
                slot, ALL[slot], choice=slot, prompt_ids=PROMPT,
                output_ids=[*OUTPUTS[slot], *of_slot[:ahead]],
                min_tokens=MIN_TOKENS, masked_ids=BANNED,
            )  # fmt: skip
            record = expected.records[slot].copy()
            record["last_id"] = -1
            assert slots.records()[at] == record
            if ALL[slot] is PENALISED:
                assert_equal(slots.arrays["counts"][at], expected.counts[slot])
            for name, values in zip(("biased_ids", "biased_values"), expected.lists, strict=False):
                count = int(record["num_biased"])
                assert slots.arrays[name][at, :count].tolist() == values[slot, :count].tolist()
            assert slots.arrays["masked_ids"][at, :2].tolist() == list(BANNED)


def check_accepted(
    device: Device, drafts: Sequence[Sequence[int]], num_right: Sequence[int], gap: int = 1
) -> None:
    """Sample as if so many drafts of each slot were right; compare the slots with those of that text.

    A negative number: the slot's own row could not be sampled.
    """
    slots = Slots.of(device, drafts, 12, gap)
    slots.run(device, "draft_slots")
    kept: list[list[int]] = []
    for slot, (of_slot, right) in enumerate(zip(drafts, num_right, strict=True)):
        at = [slot, *(slots.spare(slot, ahead) for ahead in range(1, len(of_slot) + 1))]
        tokens = [*of_slot[: max(right, 0)], 100 + slot, *of_slot][: len(at)]
        kept.append([] if right < 0 else tokens[: right + 1])
        for row, token in zip(at, tokens, strict=True):
            if right < 0 and row == slot:
                continue
            record = slots.records()[row : row + 1]
            record["last_id"], record["position"] = token, record["position"] + 1
            if ALL[slot] is PENALISED:
                slots.arrays["counts"][row, token] += 2
    slots.run(device, "accept_drafts")
    for slot, tokens in enumerate(kept):
        expected = SampleState(len(ALL), VOCAB)
        expected.start(
            slot, ALL[slot], choice=slot, prompt_ids=PROMPT, output_ids=[*OUTPUTS[slot], *tokens],
            min_tokens=MIN_TOKENS, masked_ids=BANNED,
        )  # fmt: skip
        assert slots.records()[slot] == expected.records[slot], f"slot {slot}"
        if ALL[slot] is PENALISED:
            assert_equal(slots.arrays["counts"][slot], expected.counts[slot])


DRAFTS = [[5], [9, 9, 2000], [5, 1999, 5, 2], []]


def test_a_copy_is_what_its_slot_would_be_after_the_drafts(device: Device) -> None:
    check_copies(device, DRAFTS)
    check_copies(device, [[], [], [3, 3, 3, 3], [1, 2, 3, 4]], num_spares=15, gap=1)


def test_spares_that_no_slot_uses_are_not_written(device: Device) -> None:
    slots = Slots.of(device, [[], [], [4], []], 3, 0)
    slots.run(device, "draft_slots")
    slots.run(device, "accept_drafts")
    assert (slots.arrays["records"][len(ALL) + 1 :] == 0xFF).all()


@pytest.mark.parametrize(
    "num_right",
    [[1, 3, 4, 0], [0, 0, 0, 0], [1, 1, 2, 0], [0, 2, 3, 0]],
    ids=["all", "none", "some", "others"],
)
def test_a_slot_moves_on_by_the_drafts_that_were_sampled(device: Device, num_right: list[int]) -> None:
    check_accepted(device, DRAFTS, num_right)


def check_unsampled(device: Device) -> None:
    """Of a slot whose row could not be sampled, even if its last token is the first draft."""
    check_accepted(device, [[OUTPUTS[0][-1], 6], [5], [], []], [-1, 1, 0, 0])


def check_neighbours(device: Device) -> None:
    """Of a slot followed by another whose drafts could be its own: same token, same position."""
    check_accepted(device, [[5], [100, 6], [7], []], [1, 0, 0, 0], gap=0)


def test_a_slot_that_could_not_be_sampled_stays(device: Device) -> None:
    check_unsampled(device)


def test_a_slot_takes_over_nothing_of_another(device: Device) -> None:
    check_neighbours(device)


def test_a_copy_that_could_not_be_sampled_is_not_taken_over(device: Device) -> None:
    slots = Slots.of(device, [[5, 6], [], [], []], 2, 0)
    slots.run(device, "draft_slots")
    record = slots.records()[:1]
    record["last_id"], record["position"] = 5, record["position"] + 1
    before = slots.records()[0].copy()
    slots.run(device, "accept_drafts")
    assert slots.records()[0] == before


def check_all(device: Device) -> None:
    check_copies(device, DRAFTS)
    for num_right in ([1, 3, 4, 0], [0, 2, 3, 0]):
        check_accepted(device, DRAFTS, num_right)
    check_unsampled(device)
    check_neighbours(device)


FAULTS = [
    Fault(
        "a copy is sampled at its slot's position", "draft_slots.cu", "next.position += ahead;", "", "result"
    ),
    Fault(
        "a copy that cannot be sampled looks sampled",
        "draft_slots.cu",
        "      next.last_id = -1;  // which stays if nothing can be sampled\n",
        "",
        "result",
    ),
    Fault(
        "drafts are counted before the counts are copied",
        "draft_slots.cu",
        "counts[i] = own[i];\n  __syncthreads();",
        "counts[i] = own[i];",
        "race",
    ),
    Fault(
        "a draft that occurs twice counts once",
        "draft_slots.cu",
        "atomicAdd(&counts[id], 2)",
        "counts[id] += 2",
        "race",
    ),
    Fault(
        "only the last draft is counted",
        "draft_slots.cu",
        "i < ahead; i += kThreads)",
        "i < 1; i += kThreads)",
        "result",
    ),
    Fault(
        "a draft is counted by every block",
        "draft_slots.cu",
        "if (id >= first && id < end) atomicAdd",
        "atomicAdd",
        "blocks",
    ),
    Fault(
        "biases are not copied",
        "draft_slots.cu",
        "    copy_list(p.biased_values, p.biased_stride, copy, slot, record.num_biased);\n",
        "",
        "result",
    ),
    Fault(
        "a wrong draft is taken over",
        "draft_slots.cu",
        "record.last_id != p.drafts[spare] || ",
        "",
        "result",
    ),
    Fault(
        "drafts go on after a row that could not be sampled",
        "draft_slots.cu",
        " || next.position != record.position + 1",
        "",
        "result",
    ),
    Fault(
        "another slot's drafts are taken over",
        "draft_slots.cu",
        "if (p.slots[spare] != slot || p.ahead[spare] != spare - head + 1) break;",
        "",
        "race|result",
    ),
    Fault(
        "the tokens taken over are not counted",
        "draft_slots.cu",
        "if (has_penalties(record)) p.counts[slot * p.vocab + next.last_id] += 2;",
        "",
        "result",
    ),
]


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_found(fault: Fault) -> None:
    assert_caught(fault, check_all)
