"""The CUDA kernels of the embedding and of activations in emulation, by row or by element."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.faults import Fault, assert_caught
from tests.emulation.device import TYPES, Device
from tests.reference.compare import assert_close, assert_equal
from tests.reference.layers import activate
from tgi_asgi.ops import ACTIVATIONS

ALPHAS = (0.7, 0.4)  # xIELU's
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


def check_activate(
    device: Device,
    tokens: int,
    intermediate: int,
    dtype: torch.dtype,
    activation: str = "silu",
    *,
    is_gated: bool = True,
) -> None:
    x = device.tensor((torch.randn(tokens, (2 if is_gated else 1) * intermediate) * 3).to(dtype))
    out = device.empty((tokens, intermediate), dtype)
    device.run(
        "activate", [out], x=x, out=out, num_tokens=tokens, intermediate=intermediate,
        activation=ACTIVATIONS.index(activation), above=ALPHAS[0], below=ALPHAS[1], is_gated=is_gated,
        type=TYPES[dtype],
    )  # fmt: skip
    gate = x[:, :intermediate].double()
    expected = activate(gate, activation, ALPHAS)
    assert_close(out.float(), expected * x[:, intermediate:] if is_gated else expected, length=2, dtype=dtype)


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


@pytest.mark.parametrize("is_gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "intermediate"), [(0, 8), (1, 8), (5, 264), (2, 4096)])
def test_activations_equal_the_reference(
    device: Device, tokens: int, intermediate: int, dtype: torch.dtype, activation: str, is_gated: bool
) -> None:
    check_activate(device, tokens, intermediate, dtype, activation, is_gated=is_gated)


FAULTS = [
    Fault(
        "ids are not clamped",
        "embed.cu",
        "min(max(int64_t{p.ids[token]}, int64_t{0}), p.num_rows - 1)",
        "int64_t{p.ids[token]} + 1",
        "bounds|result",
    ),
    Fault(
        "threads past the end work too",
        "embed.cu",
        "if (column >= p.hidden) return;",
        "",
        "bounds|blocks|race",
    ),
    Fault(
        "up is read where the gate is",
        "activate.cu",
        "row + p.intermediate + column",
        "row + column",
        "result",
    ),
    Fault(
        "the end is one row late",
        "activate.cu",
        "column >= p.intermediate",
        "column >= p.intermediate + 8",
        "bounds|blocks|race",
    ),
    Fault(
        "rows without a gate are as far apart as with one",
        "activate.cu",
        "(p.is_gated ? 2 : 1)",
        "2",
        "bounds|blocks",
    ),
    Fault(
        "the error function has the other sign",
        "activation.cuh",
        "1.0f + erff(",
        "1.0f - erff(",
        "result",
        "activate.cu",
    ),
    Fault(
        "relu is not squared",
        "activation.cuh",
        "x > 0 ? x * x : 0.0f",
        "x > 0 ? x : 0.0f",
        "result",
        "activate.cu",
    ),
    Fault(
        "xIELU has one number for both sides",
        "activation.cuh",
        "below * (expm1f",
        "above * (expm1f",
        "result",
        "activate.cu",
    ),
]


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_caught(fault: Fault) -> None:
    def check(device: Device) -> None:
        check_embed(device, 17, 24, torch.bfloat16)
        for activation in ACTIVATIONS:
            check_activate(device, 5, 264, torch.bfloat16, activation)
            check_activate(device, 5, 264, torch.bfloat16, activation, is_gated=False)

    assert_caught(fault, check)
