"""The CUDA kernels embed and act_mul in emulation: a row, or an element, at a time."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.faults import Fault, assert_caught
from tests.emulation.device import TYPES, Device
from tests.reference.compare import assert_close, assert_equal
from tests.reference.layers import activate

DTYPES = [torch.bfloat16, torch.float16]


def check_embed(device: Device, tokens: int, hidden: int, dtype: torch.dtype) -> None:
    table = device.tensor(torch.randn(9, hidden).to(dtype))
    ids = device.tensor(torch.randint(9, (tokens,), dtype=torch.int32))
    out = device.empty((tokens, hidden), torch.float32)
    device.run(
        "embed", [out], ids=ids, table=table, out=out, num_tokens=tokens, num_rows=9, hidden=hidden,
        type=TYPES[dtype],
    )  # fmt: skip
    assert_equal(out, table[ids.long()].float())


def check_act_mul(
    device: Device, tokens: int, intermediate: int, dtype: torch.dtype, activation: str = "silu"
) -> None:
    gate_up = device.tensor((torch.randn(tokens, 2 * intermediate) * 3).to(dtype))
    out = device.empty((tokens, intermediate), dtype)
    device.run(
        "act_mul", [out], gate_up=gate_up, out=out, num_tokens=tokens, intermediate=intermediate,
        activation=["silu", "gelu_tanh"].index(activation), type=TYPES[dtype],
    )  # fmt: skip
    gate, up = gate_up.double().chunk(2, dim=1)
    assert_close(out.float(), activate(gate, activation) * up, length=2, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(0, 8), (1, 8), (17, 24), (3, 4096)])
def test_embed_gathers_rows(device: Device, tokens: int, hidden: int, dtype: torch.dtype) -> None:
    check_embed(device, tokens, hidden, dtype)


def test_ids_outside_of_the_table_read_its_ends(device: Device) -> None:
    table = device.tensor(torch.randn(4, 8).bfloat16())
    out = device.empty((2, 8), torch.float32)
    ids = device.tensor(torch.tensor([-5, 2**31 - 1], dtype=torch.int32))
    device.run("embed", [out], ids=ids, table=table, out=out, num_tokens=2, num_rows=4, hidden=8, type=0)
    assert torch.equal(out, table[[0, 3]].float())


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "intermediate"), [(0, 8), (1, 8), (5, 264), (2, 4096)])
def test_act_mul_equals_the_reference(
    device: Device, tokens: int, intermediate: int, dtype: torch.dtype, activation: str
) -> None:
    check_act_mul(device, tokens, intermediate, dtype, activation)


FAULTS = [
    Fault(
        "ids are not clamped",
        "embed.cu",
        "min(max(int64_t{p.ids[token]}, int64_t{0}), p.num_rows - 1)",
        "int64_t{p.ids[token]} + 1",
        "bounds|result",
    ),
    Fault(
        "threads past the end work too", "embed.cu", "if (i >= p.num_tokens * vectors) return;", "", "bounds"
    ),
    Fault(
        "up is read where the gate is",
        "act_mul.cu",
        "row + p.intermediate + column",
        "row + column",
        "result",
    ),
    Fault(
        "the end is one row late",
        "act_mul.cu",
        "i >= p.num_tokens * vectors",
        "i >= (p.num_tokens + 1) * vectors",
        "bounds",
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_caught(fault: Fault) -> None:
    def check(device: Device) -> None:
        check_embed(device, 17, 24, torch.bfloat16)
        check_act_mul(device, 5, 264, torch.bfloat16)

    assert_caught(fault, check)
