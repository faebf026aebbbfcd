"""The CUDA kernel that adds a product to the residual stream, in emulation."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.faults import Fault, assert_caught
from tests.emulation.device import TYPES, Device
from tests.reference.compare import assert_close


def check(device: Device, tokens: int, hidden: int, dtype: torch.dtype, factor: float = 1.0) -> None:
    rows = device.tensor(torch.randn(tokens, hidden).to(dtype))
    x = device.tensor(torch.randn(tokens, hidden))
    expected = x.double() + factor * rows.double()
    device.run(
        "residual_add", [x], rows=rows, x=x, num_elements=tokens * hidden, factor=factor, type=TYPES[dtype]
    )
    assert_close(x, expected, length=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "hidden"), [(0, 8), (1, 8), (17, 24), (3, 4096)])
def test_rows_are_added(device: Device, tokens: int, hidden: int, dtype: torch.dtype) -> None:
    check(device, tokens, hidden, dtype)
    check(device, tokens, hidden, dtype, factor=-0.22)


FAULTS = [
    Fault("the end is not minded", "residual_add.cu", "if (place >= p.num_elements) return;", "", "bounds"),
    Fault("the factor is forgotten", "residual_add.cu", "fmaf(p.factor, ", "fmaf(1.0f, ", "result"),
    Fault(
        "threads do not wait for the kernel before", "residual_add.cu", "  wait_for_previous_kernel();\n", "",
        "dependent",
    ),
]  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_caught(fault: Fault) -> None:
    assert_caught(fault, lambda device: check(device, 3, 24, torch.bfloat16, factor=0.5))
