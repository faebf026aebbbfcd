"""The CUDA kernel rms_norm in emulation."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.faults import Fault, assert_caught
from tests.emulation.device import TYPES, Device
from tests.reference.compare import assert_close
from tests.reference.layers import rms_norm

EPS = 1e-5


def check(
    device: Device, tokens: int, hidden: int, dtype: torch.dtype, rows: list[int] | None = None
) -> None:
    x, weight = device.tensor(torch.randn(tokens, hidden) * 3), device.tensor(torch.randn(hidden))
    index = None if rows is None else device.tensor(torch.tensor(rows, dtype=torch.int32))
    out = device.empty((tokens if rows is None else len(rows), hidden), dtype)
    device.run(
        "rms_norm", [out], x=x, weight=weight, rows=index, out=out, num_tokens=tokens, num_rows=out.shape[0],
        hidden=hidden, eps=EPS, type=TYPES[dtype],
    )  # fmt: skip
    expected = rms_norm(x if rows is None else x[rows], weight, EPS)
    assert_close(out.float(), expected, length=2, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "hidden"), [(0, 8), (1, 8), (3, 24), (2, 576), (5, 520), (1, 4096), (2, 16384)]
)
def test_rows_equal_the_reference(device: Device, tokens: int, hidden: int, dtype: torch.dtype) -> None:
    check(device, tokens, hidden, dtype)


def test_only_the_rows_asked_for_are_normed_in_their_order(device: Device) -> None:
    check(device, 9, 576, torch.bfloat16, rows=[8, 0, 8, 3])


FAULTS = [
    Fault(
        "no barrier before the sums of the warps are read",
        "reduce.cuh",
        "scratch[threadIdx.x / kWarpSize] = x;\n  __syncthreads();",
        "scratch[threadIdx.x / kWarpSize] = x;",
        "uninit",
        "rms_norm.cu",
    ),
    Fault(
        "the row's end is not minded",
        "rms_norm.cu",
        "    if (column >= p.hidden) continue;\n    load8(x",
        "    load8(x",
        "bounds",
    ),
    Fault(
        "one warp's sum is left out",
        "reduce.cuh",
        "warp < num_warps",
        "warp < num_warps - 1",
        "result",
        "rms_norm.cu",
    ),
    Fault(
        "threads do not wait for the kernel before",
        "rms_norm.cu",
        "  wait_for_kernel_before();\n",
        "",
        "dependent",
    ),
    Fault("the rows' own order is ignored", "rms_norm.cu", "p.rows == nullptr ?", "true ?", "result"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_caught(fault: Fault) -> None:
    assert_caught(fault, lambda device: check(device, 9, 1064, torch.bfloat16, rows=[8, 0, 8, 3]))
