"""Products, embeddings and experts of modules on a GPU, against float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cuda import apart_device
from tests.cuda.test_quant_linear import random_source
from tests.reference.compare import assert_close
from tests.support.random_weights import decoded_values, random_weight
from tgi_asgi import ops
from tgi_asgi.ops.cuda_direct import CudaDirect
from tgi_asgi.ops.cuda_linear import MAX_CODED_TOKENS, MAX_SKINNY_TOKENS
from tgi_asgi.ops.cuda_quant import Repacking
from tgi_asgi.ops.tensors import from_tensor, plain_tensor

FP16 = torch.float16
KERNELS = CudaDirect(FP16)
NUM_TOKENS = (0, 3, MAX_SKINNY_TOKENS + 1, MAX_CODED_TOKENS + 1)


@pytest.fixture(scope="module")
def device() -> torch.device:
    return apart_device.find_device()


def source_of(name: str) -> ops.WeightSource:
    """Return a matrix; `-ordered` has the columns of GPTQ's act-order."""
    form, _, ordered = name.partition("-")
    if form in ("F16", "F32"):
        return random_weight(form, 24, 37 if form == "F16" else 256, 1)
    source, _ = random_source(form, 24, 256)
    return replace(source, order=np.random.default_rng(0).permutation(256)) if ordered else source


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", ["F32", "F16", "Q8_0", "Q4_K", "INT4_64-ordered", "F8_128"])
def test_products_of_few_and_many_tokens_equal_the_reference(
    device: torch.device, name: str, has_bias: bool
) -> None:
    """F16 has a number of columns that the kernels do not compute."""
    source = source_of(name)
    bias = torch.randn(source.shape[0])
    weight = ops.linear_weight(source, Repacking(FP16, device), bias=from_tensor(bias) if has_bias else None)
    matrix = plain_tensor(source.in_order()).to(FP16).double()
    for num_tokens in NUM_TOKENS:
        x = torch.randn(num_tokens, source.shape[1])
        expected = x.to(FP16).double() @ matrix.T + (bias.double() if has_bias else 0)
        found = KERNELS.linear(weight, x.to(device)).cpu()
        assert found.shape == expected.shape and found.dtype is torch.float32
        assert_close(found, expected, length=256, dtype=FP16)
        exact = KERNELS.linear(weight, x.to(device), is_exact=True).cpu()
        assert_close(exact, x.double() @ matrix.T + (bias.double() if has_bias else 0), length=256)


def test_gates_and_ups_are_combined(device: torch.device) -> None:
    gate, up = random_weight("Q8_0", 48, 256, 1), random_weight("Q8_0", 48, 256, 2)
    weight = ops.gate_up_weight(gate, up, Repacking(FP16, device))
    x = torch.randn(5, 256)
    rows = [x.to(FP16).double() @ decoded_values(part).to(FP16).double().T for part in (gate, up)]
    found = KERNELS.gate_up(weight, x.to(device), "silu").cpu()
    assert_close(found, torch.nn.functional.silu(rows[0]) * rows[1], length=512, dtype=FP16)


@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q4_K", "INT4_64-ordered", "MXFP4"])
def test_embeddings_are_the_rows_of_their_ids(device: torch.device, name: str) -> None:
    source = source_of(name)
    weight = ops.linear_weight(source, Repacking(FP16, device), is_vocabulary=True)
    ids = torch.tensor([3, 23, 0, 3, 17])
    found = KERNELS.embed(weight, ids.to(device), 0.5).cpu()
    assert torch.equal(found, plain_tensor(source.in_order()).to(FP16)[ids].float() * 0.5)
    assert KERNELS.embed(weight, ids[:0].to(device)).shape == (0, source.shape[1])


@pytest.mark.parametrize("clamped", [None, ops.ClampedGate(1.5, 1.7, 1.0)], ids=["silu", "clamped"])
@pytest.mark.parametrize(("name", "size"), [("F32", 32), ("Q8_0", 32), ("F32", 20)])
def test_experts_are_summed_by_their_weights(
    device: torch.device, name: str, size: int, clamped: ops.ClampedGate | None
) -> None:
    """By kernels; of a size that they lack, and exactly, one after the other. Expert 5 selects none."""
    arithmetic, num_experts, columns = Repacking(FP16, device), 5, 64
    parts = [
        [
            random_weight(name, *shape, 3 * expert + which)
            for which, shape in enumerate(((size, columns), (size, columns), (columns, size)))
        ]
        for expert in range(num_experts)
    ]
    weight = ops.experts_weight(
        [
            (ops.gate_up_weight(gate, up, arithmetic), ops.linear_weight(down, arithmetic))
            for gate, up, down in parts
        ],
        arithmetic,
    )
    x, ids = torch.randn(9, columns), torch.randint(0, num_experts + 1, (9, 2))
    ids[:, 1] = (ids[:, 0] + 1 + ids[:, 1] % 4) % (num_experts + 1)
    factors = torch.rand(9, 2)
    matrices = [[decoded_values(part).to(FP16).double() for part in each] for each in parts]
    expected = _sum_of_experts(x.to(FP16).double(), ids, factors, matrices, clamped)
    given = (weight, x.to(device), ids.to(device), factors.to(device), "silu", clamped)
    found = KERNELS.experts(*given).cpu()
    assert_close(found, expected, length=1024, dtype=FP16)
    exact = KERNELS.experts(*given, is_exact=True).cpu()
    assert_close(exact, _sum_of_experts(x.double(), ids, factors, matrices, clamped), length=256)
    none = KERNELS.experts(weight, given[1][:0], given[2][:0], given[3][:0])
    assert none.shape == (0, columns)


def _sum_of_experts(
    x: Tensor, ids: Tensor, factors: Tensor, matrices: list[list[Tensor]], clamped: ops.ClampedGate | None
) -> Tensor:
    total = torch.zeros_like(x)
    for token in range(len(x)):
        for expert, factor in zip(ids[token].tolist(), factors[token].double(), strict=True):
            if expert == len(matrices):
                continue
            gate, up, down = matrices[expert]
            one, other = x[token] @ gate.T, x[token] @ up.T
            if clamped is None:
                inner = torch.nn.functional.silu(one) * other
            else:
                one, other = one.clamp(max=clamped.limit), other.clamp(-clamped.limit, clamped.limit)
                inner = one * torch.sigmoid(clamped.slope * one) * (other + clamped.offset)
            total[token] += factor * (down @ inner)
    return total


def test_a_product_per_expert_skips_those_without_tokens(device: torch.device) -> None:
    sources = [random_weight("Q8_0", 32, 64, seed) for seed in range(4)]
    arithmetic = Repacking(FP16, device)
    stack = KERNELS.stack([ops.linear_weight(source, arithmetic) for source in sources])
    x, sizes = torch.randn(5, 64), torch.tensor([2, 0, 3, 0])
    found = stack.multiply(x.to(device), sizes.to(device)).cpu()
    matrices = [decoded_values(source).to(FP16).double() for source in sources]
    rows = x.to(FP16).double()
    assert_close(
        found, torch.cat([rows[:2] @ matrices[0].T, rows[2:] @ matrices[2].T]), length=64, dtype=FP16
    )
    assert stack.multiply(x[:0].to(device), (0 * sizes).to(device)).shape == (0, 32)
    assert stack.nbytes == 4 * (32 * 64 + 2 * 32 * 2)
    others = [ops.linear_weight(random_weight("F32", rows, 64, 1), arithmetic) for rows in (8, 16)]
    with pytest.raises(ValueError, match="different shapes"):
        KERNELS.stack(others)


def test_what_no_kernel_computes_is_refused(device: torch.device) -> None:
    weight = ops.linear_weight(random_weight("F32", 8, 16, 1), Repacking(FP16, device))
    with pytest.raises(ValueError, match=r"`x` must be \[n, 16\], got \(2, 8\)"):
        KERNELS.linear(weight, torch.zeros(2, 8, device=device))
