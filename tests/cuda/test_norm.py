"""The CUDA kernel of RMSNorm and LayerNorm in emulation: into an activation, in place, and added."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda.faults import Fault, assert_caught
from tests.emulation.device import TYPES, Device
from tests.reference.compare import assert_close
from tests.reference.layers import layer_norm, rms_norm

EPS = 1e-5
BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32


def check(
    device: Device,
    tokens: int,
    hidden: int,
    dtype: torch.dtype,
    rows: list[int] | None = None,
    *,
    has_bias: bool = False,
    factor: float | None = None,
    is_in_place: bool = False,
) -> None:
    """Norm random rows, whose mean is far from 0, to `dtype`; with a factor the result is added."""
    x, weight = device.tensor(torch.randn(tokens, hidden) * 3 + 2), device.tensor(torch.randn(hidden))
    bias = device.tensor(torch.randn(hidden)) if has_bias else None
    index = None if rows is None else device.tensor(torch.tensor(rows, dtype=torch.int32))
    taken = x.clone() if rows is None else x[rows]
    expected = rms_norm(taken, weight, EPS) if bias is None else layer_norm(taken, weight, bias, EPS)
    out = x if is_in_place else device.empty(taken.shape, dtype)
    if factor is not None:
        before = torch.randn(taken.shape)
        out.copy_(before)
        expected = before.double() + factor * expected
    launch(device, x, weight, bias, index, out, factor)
    assert_close(out.float(), expected, length=hidden if dtype is F32 else 2, dtype=dtype)


def launch(
    device: Device,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    out: Tensor,
    factor: float | None,
) -> None:
    is_wide = out.dtype is F32
    device.run(
        "norm", [out], x=x, weight=weight, bias=bias, rows=rows, out=out, num_tokens=x.shape[0],
        num_rows=out.shape[0], hidden=x.shape[1], eps=EPS, factor=1.0 if factor is None else factor,
        is_wide=is_wide, is_added=factor is not None, type=0 if is_wide else TYPES[out.dtype],
    )  # fmt: skip


@pytest.mark.parametrize("has_bias", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("tokens", "hidden"), [(0, 8), (1, 8), (3, 24), (2, 576), (5, 520), (1, 4096), (2, 16384)]
)
def test_rows_equal_the_reference(
    device: Device, tokens: int, hidden: int, dtype: torch.dtype, has_bias: bool
) -> None:
    check(device, tokens, hidden, dtype, has_bias=has_bias)


@pytest.mark.parametrize("has_bias", [False, True], ids=["rms", "layer"])
def test_only_the_rows_asked_for_are_normed_in_their_order(device: Device, has_bias: bool) -> None:
    check(device, 9, 576, BF16, rows=[8, 0, 8, 3], has_bias=has_bias)


@pytest.mark.parametrize("has_bias", [False, True], ids=["rms", "layer"])
def test_a_norm_may_be_added_to_the_residual_or_take_its_place(device: Device, has_bias: bool) -> None:
    check(device, 3, 1064, F32, factor=0.25, has_bias=has_bias)
    check(device, 3, 1064, F32, is_in_place=True, has_bias=has_bias)


FAULTS = [
    Fault(
        "no barrier before the sums of the warps are read",
        "reduce.cuh",
        "scratch[threadIdx.x / kWarpSize] = x;\n  __syncthreads();",
        "scratch[threadIdx.x / kWarpSize] = x;",
        "uninit",
        "norm.cu",
    ),
    Fault(
        "the row's end is not minded",
        "norm.cu",
        "    if (column >= p.hidden) continue;\n    load8(x",
        "    load8(x",
        "bounds",
    ),
    Fault(
        "one warp's sum is left out",
        "reduce.cuh",
        "lane + lanes < num_warps",
        "lane + lanes < num_warps - 1",
        "result",
        "norm.cu",
    ),
    Fault(
        "threads do not wait for the kernel before",
        "norm.cu",
        "  wait_for_previous_kernel();\n",
        "",
        "dependent",
    ),
    Fault(
        "a bias does not make it a LayerNorm",
        "norm.cu",
        "if (p.bias != nullptr) mean",
        "if (false) mean",
        "result",
    ),
    Fault(
        "the bias is not added",
        "norm.cu",
        "values[k][i] += other[i]",
        "values[k][i] += 0 * other[i]",
        "result",
    ),
    Fault("what is there is not added to", "norm.cu", "if (p.is_added)", "if (false)", "result"),
    Fault("the factor is left out", "norm.cu", "other[i] + p.factor * values", "other[i] + values", "result"),
    Fault("the rows' own order is ignored", "norm.cu", "p.rows == nullptr ?", "true ?", "result"),
]


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_caught(fault: Fault) -> None:
    def all_kinds(device: Device) -> None:
        check(device, 9, 1064, BF16, rows=[8, 0, 8, 3])
        check(device, 2, 1064, BF16, has_bias=True)
        check(device, 2, 1064, F32, factor=0.25)

    assert_caught(fault, all_kinds)
