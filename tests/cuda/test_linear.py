"""The CUDA kernel of products with plain weights in emulation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cuda.faults import Fault, assert_caught
from tests.emulation.device import TYPES, Device
from tests.reference.compare import assert_close

DTYPES = [torch.bfloat16, torch.float16]


def check(
    device: Device,
    tokens: int,
    rows: int,
    columns: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    is_wide: bool = False,
    is_added: bool = False,
    has_bias: bool = False,
) -> None:
    a = device.tensor(torch.randn(tokens, columns).to(dtype))
    weight = device.constant(torch.randn(rows, columns).to(dtype))
    bias = device.tensor(torch.randn(rows)) if has_bias else None
    expected = a.double() @ weight.double().T
    out = device.empty((tokens, rows), torch.float32 if is_wide or is_added else dtype)
    if is_added:
        out.copy_(torch.randn(tokens, rows))
        expected += out.double()
    if bias is not None:
        expected += bias.double()
    device.run(
        "linear", [out], a=a, weight=weight, bias=bias, out=out, num_tokens=tokens, num_rows=rows,
        num_columns=columns, is_wide=out.dtype is torch.float32, is_added=is_added, type=TYPES[dtype],
    )  # fmt: skip
    assert_close(out.float(), expected, length=columns if out.dtype is torch.float32 else 2, dtype=out.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"),
    [
        (0, 16, 64), (1, 0, 64), (1, 1, 8), (8, 16, 256), (3, 17, 1064), (9, 33, 264), (16, 32, 40),
        (17, 31, 776), (33, 40, 520), (64, 32, 256),
    ],
)  # fmt: skip
def test_products_equal_the_reference(
    device: Device, tokens: int, rows: int, columns: int, dtype: torch.dtype
) -> None:
    check(device, tokens, rows, columns, dtype=dtype)


def test_random_shapes_equal_the_reference(device: Device) -> None:
    for _ in range(12):
        tokens, rows, columns = (int(torch.randint(1, end, ())) for end in (40, 70, 90))
        check(device, tokens, rows, 8 * columns, is_wide=True)
        device.reset()


def test_more_tokens_than_a_tile_are_computed_in_several(device: Device) -> None:
    check(device, 131, 35, 136)


def test_products_come_in_float32_with_a_bias_and_added_to_a_residual(device: Device) -> None:
    check(device, 2, 10, 96, is_wide=True, has_bias=True)
    check(device, 5, 35, 264, dtype=torch.float16, has_bias=True)
    check(device, 12, 35, 264, is_added=True)
    check(device, 3, 20, 264, is_added=True, has_bias=True)


def test_a_token_has_the_same_bits_in_any_batch(device: Device) -> None:
    a = torch.randn(130, 808).bfloat16()
    weight = device.constant(torch.randn(35, 808).bfloat16())

    def compute(first: int, last: int) -> torch.Tensor:
        some, out = device.tensor(a[first:last]), device.empty((last - first, 35), torch.float32)
        device.run(
            "linear", [out], a=some, weight=weight, bias=None, out=out, num_tokens=last - first, num_rows=35,
            num_columns=808, is_wide=True, is_added=False, type=0,
        )  # fmt: skip
        return out.clone()

    whole = compute(0, 130)
    for first, last in ((0, 1), (3, 11), (5, 21), (60, 92), (62, 126), (129, 130)):
        assert torch.equal(compute(first, last), whole[first:last])


@pytest.mark.parametrize("changes", [{"num_columns": 12}, {"is_added": True}], ids=str)
def test_what_the_kernel_does_not_compute_is_refused(device: Device, changes: dict[str, Any]) -> None:
    a, weight, out = (device.empty((4, 16), torch.bfloat16) for _ in range(3))
    params = {
        "a": a, "weight": weight, "bias": None, "out": out, "num_tokens": 4, "num_rows": 4, "num_columns": 16,
        "is_wide": False, "is_added": False, "type": 0,
    }  # fmt: skip
    with pytest.raises(AssertionError, match="refused"):
        device.launch("linear", **params | changes)


FAULTS = [
    Fault(
        "a row past the last is read",
        "linear.cu",
        "is_inside(i) && row + k * 8 < p.num_rows",
        "is_inside(i)",
        "bounds",
    ),
    Fault(
        "a token past the last is read",
        "linear.cu",
        "is_inside(i) && token + k * 8 < p.num_tokens",
        "is_inside(i)",
        "bounds",
    ),
    Fault(
        "the end of the columns is not minded",
        "linear.cu",
        "first_column + offset_of(i) < p.num_columns",
        "true",
        "bounds|result",
    ),
    Fault(
        "the queue is read before it is filled",
        "linear.cu",
        "async_wait<T::kStages - 2>()",
        "async_wait<T::kStages - 1>()",
        "async",
    ),
    Fault(
        "the last steps commit no group",
        "linear.cu",
        "      load_values(i + T::kStages - 1);\n    }\n    async_commit();",
        "      load_values(i + T::kStages - 1);\n    async_commit();\n    }",
        "async",
    ),
    Fault(
        "sums are written over what others still multiply",
        "linear.cu",
        "  __syncthreads();  // the queue is no longer needed\n",
        "",
        "race|async",
    ),
    Fault(
        "rows past the last are written",
        "linear.cu",
        " || row >= p.num_rows) continue",
        ") continue",
        "bounds|blocks|race",
    ),
    Fault(
        "one part is left out",
        "linear.cu",
        "int part = 0; part < kParts",
        "int part = 1; part < kParts",
        "result",
    ),
    Fault(
        "the halves of a fragment are swapped",
        "linear.cu",
        "values.z, values.w",
        "values.w, values.z",
        "result",
    ),
    Fault(
        "activations are read before the wait",
        "linear.cu",
        "if (i < num_steps) load_weights(i);",
        "if (i < num_steps) load_weights(i), load_values(i);",
        "dependent",
    ),
    Fault(
        "threads do not wait for the kernel before",
        "linear.cu",
        "  wait_for_previous_kernel();\n",
        "",
        "dependent",
    ),
    Fault("the residual is forgotten", "linear.cu", "*out + sum", "sum", "result"),
]


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_caught(fault: Fault) -> None:
    assert_caught(fault, lambda device: check(device, 9, 35, 1320, is_added=True))
