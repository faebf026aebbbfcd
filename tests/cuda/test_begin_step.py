"""The CUDA kernel that completes a step's inputs, in emulation: tables of slots, and their last tokens."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tests.cuda.faults import Fault, assert_caught
from tests.emulation.device import Device, KernelFault
from tests.reference.compare import assert_equal
from tgi_asgi.ops.sample_state import SLOT

BLOCK = 16


class Tables:
    """The block tables of slots, on the device and as they must be."""

    def __init__(self, device: Device, seed: int, *, num_slots: int, stride: int) -> None:
        self._device, self._random, self._stride = device, random.Random(seed), stride
        self._known = [list[int]() for _ in range(num_slots)]  # what the device has of each slot's table
        self._kept = device.empty((num_slots, stride), torch.int32)
        records = np.zeros(num_slots, SLOT)
        records["last_id"] = 100 + np.arange(num_slots)
        self._records = device.tensor(torch.from_numpy(records.view(np.uint8).reshape(num_slots, -1)))

    def table(self, slot: int) -> tuple[list[int], int]:
        """Return a longer table of a slot, or another, and how many of its entries the device has."""
        table = self._known[slot] if self._random.random() < 0.8 else []
        first = self._random.randint(0, len(table))  # what the device has may come again
        most = self._random.choice([min(len(table) + 1, self._stride), self._stride])
        count = self._random.randint(max(len(table), 1), most)
        self._known[slot] = [*table, *(self._random.randrange(1000) for _ in range(count - len(table)))]
        return self._known[slot], first

    def step(self, num_decodes: int, num_sequences: int, num_padding: int) -> None:
        """Run a step of these slots in any order, with padding after its decodes, and check its inputs."""
        device, total = self._device, num_sequences + num_padding
        slots = self._random.sample(range(len(self._known)), num_sequences)
        at = [index + (num_padding if index >= num_decodes else 0) for index in range(num_sequences)]
        inputs = torch.zeros(4, total, dtype=torch.int32)
        inputs[1] = -1
        entries: list[int] = []
        expected = {}
        for index, slot in zip(at, slots, strict=True):
            table, first = self.table(slot)
            length = len(table) * BLOCK - self._random.randrange(BLOCK)
            inputs[:, index] = torch.tensor([length, slot, first, len(entries)])
            entries += table[first:]
            expected[index] = table
        first_ids = torch.arange(total + 3, dtype=torch.int32)
        from_slot = [slots[at.index(i)] if i in expected and i % 2 == 0 else -1 for i in range(num_decodes)]
        from_slot += [-1] * num_padding
        ids = device.tensor(first_ids)
        context_len, *places = (device.tensor(each) for each in inputs)
        tables = device.empty((total, self._stride), torch.int32)
        for index, table in enumerate(tables):
            device.forbid(table[len(expected.get(index, ())) :])
        device.run(
            "begin_step", [ids, self._kept, tables], records=self._records, ids=ids,
            from_slot=device.tensor(torch.tensor(from_slot, dtype=torch.int32)), context_len=context_len,
            table_slots=places[0], table_firsts=places[1], table_starts=places[2],
            entries=device.tensor(torch.tensor(entries, dtype=torch.int32)), kept=self._kept, tables=tables,
            num_slots=len(self._known), num_decodes=len(from_slot), num_sequences=total,
            num_entries=len(entries), num_tables=len(self._known), stride=self._stride, block_size=BLOCK,
        )  # fmt: skip
        for index, table in expected.items():
            assert_equal(tables[index, : len(table)], torch.tensor(table))
        for slot, table in enumerate(self._known):
            assert_equal(self._kept[slot, : len(table)], torch.tensor(table))
        wanted = first_ids.clone()
        for index, slot in enumerate(from_slot):
            wanted[index] = wanted[index] if slot < 0 else 100 + slot
        assert_equal(ids, wanted)


def check(device: Device, seed: int, *, stride: int = 40, steps: int = 6) -> None:
    tables = Tables(device, seed, num_slots=9, stride=stride)
    random_ = random.Random(seed)
    for _ in range(steps):
        num_sequences = random_.randint(1, 9)
        tables.step(random_.randint(0, num_sequences), num_sequences, random_.randint(0, 3))


@pytest.mark.parametrize("seed", range(6))
def test_a_step_has_the_tables_of_its_slots_and_their_last_tokens(device: Device, seed: int) -> None:
    check(device, seed)


def test_a_table_may_be_longer_than_what_a_block_copies(device: Device) -> None:
    check(device, 3, stride=2500, steps=3)


def launch(device: Device, **changes: object) -> None:
    """Run a step of one sequence with three blocks, of which the last is new."""
    kept = device.empty((2, 4), torch.int32)
    kept[1] = torch.tensor([7, 8, 9, 10])
    given: dict[str, object] = {
        "records": None, "ids": device.tensor(torch.tensor([5], dtype=torch.int32)), "kept": kept,
        "tables": device.empty((1, 4), torch.int32), "num_slots": 0, "num_decodes": 1, "num_sequences": 1,
        "num_entries": 1, "num_tables": 2, "stride": 4, "block_size": BLOCK,
    }  # fmt: skip
    values = {"from_slot": -1, "context_len": 33, "table_slots": 1, "table_firsts": 2, "table_starts": 0}
    for name, value in {**values, "entries": 11}.items():
        given[name] = device.tensor(torch.tensor([value], dtype=torch.int32))
    for name, change in changes.items():
        is_array = isinstance(given[name], torch.Tensor)
        given[name] = device.tensor(torch.tensor([change], dtype=torch.int32)) if is_array else change
    device.run("begin_step", [given["kept"], given["tables"], given["ids"]], **given)  # type: ignore[list-item]


@pytest.mark.parametrize(
    "changes",
    [
        {"from_slot": 3}, {"from_slot": -7}, {"context_len": 1 << 30}, {"context_len": -5},
        {"table_slots": 2}, {"table_slots": -2}, {"table_firsts": -3}, {"table_firsts": 1 << 30},
        {"table_starts": 1 << 30}, {"table_starts": -(1 << 30)},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_on_the_device_are_clamped(device: Device, changes: dict[str, int]) -> None:
    launch(device, **changes)


@pytest.mark.parametrize(
    "changes", [{"num_decodes": 2}, {"block_size": 0}, {"num_entries": 0}, {"num_slots": 1}], ids=str
)
def test_what_no_step_has_is_refused(device: Device, changes: dict[str, int]) -> None:
    launch(device)
    with pytest.raises(AssertionError, match="was refused") as refusal:
        launch(device, **changes)
    assert not isinstance(refusal.value, KernelFault)


FILE = "begin_step.cu"
FAULTS = [
    Fault(
        "more is written than a sequence has", FILE, "if (column >= num_columns) continue;\n    table[",
        "table[", "bounds|forbidden|poison",
    ),
    Fault(
        "what is new is not kept", FILE, "if (column >= first_new) kept[column]", "if (false) kept[column]",
        "result|uninitialised",
    ),
    Fault(
        "new entries begin one late", FILE, "column < first_new ?", "column <= first_new ?",
        "result|uninitialised",
    ),
    Fault(
        "the table is that of the sequence's index", FILE, "p.kept + slot * p.stride",
        "p.kept + sequence * p.stride", "result|order|race",
    ),
    Fault(
        "tokens that are there are overwritten", FILE, "if (slot >= 0 && slot < p.num_slots)", "", "bounds"
    ),
    Fault("padding has a table", FILE, "if (slot < 0 || slot >= p.num_tables) return;", "", "bounds"),
    Fault(
        "later columns are left out", FILE, "int64_t{blockIdx.y} * kThreads * kColumns +", "", "blocks"
    ),
    Fault(
        "threads do not wait for the kernel before", FILE, "  wait_for_previous_kernel();\n", "", "dependent"
    ),
]  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_caught(fault: Fault) -> None:
    def check_both(device: Device) -> None:
        check(device, 1)
        check(device, 3, stride=2500, steps=2)
        launch(device, table_slots=2)

    assert_caught(fault, check_both)
