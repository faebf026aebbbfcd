"""Products in FP8: which weights have them, and the launches."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda.emulated_runner import ON_GPU, make_device
from tests.cuda.scaled_mm_stand_in import ScaledMmStandIn
from tests.reference.compare import assert_close
from tgi_asgi.ops import cuda_float8
from tgi_asgi.ops.cuda_float8 import Float8Product, can_multiply, float8_matrix
from tgi_asgi.ops.cuda_linear import QuantLinear
from tgi_asgi.ops.cuda_list import Input, LaunchList, Size
from tgi_asgi.ops.cuda_quant import CudaQuantMatrix
from tgi_asgi.ops.cuda_scratch import Scratch

BF16, FP16, FLOAT8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
_ops = torch.ops.tgi_cuda


def random_matrix(rows: int, columns: int, kind: str) -> CudaQuantMatrix:
    """Make FP8 weights with scales per row, per block of 128 x 128, or per 128 columns of each row."""
    codes, groups = torch.randn(rows, columns).to(FLOAT8), columns // 128
    scales = torch.rand(groups, rows) + 0.5
    if kind == "row":
        scales = scales[:1].repeat(groups, 1)
    elif kind == "block":
        scales = scales[:, ::128].repeat_interleave(128, 1)[:, :rows].contiguous()
    return CudaQuantMatrix(codes, scales, None, (rows, columns), 8, 0)


def values_of(matrix: CudaQuantMatrix) -> Tensor:
    """Return the weights in float64."""
    repeats = matrix.shape[1] // matrix.scales.shape[0]
    return matrix.codes.double() * matrix.scales.t().double().repeat_interleave(repeats, 1)


@pytest.mark.parametrize(("kind", "rows"), [("row", 48), ("row", 256), ("block", 256)])
def test_scales_per_row_or_block_are_found(kind: str, rows: int) -> None:
    matrix = random_matrix(rows, 512, kind)
    found = float8_matrix(matrix)
    assert found is not None and found.has_groups == (kind == "block")
    scales = found.scales[:, None]
    if found.has_groups:
        scales = found.scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(found.codes.double() * scales.double(), values_of(matrix))


@pytest.mark.parametrize(
    ("kind", "rows", "columns"),
    [("group", 256, 512), ("block", 144, 512), ("block", 256, 384), ("row", 40, 256)],
)
def test_other_scales_and_sizes_have_no_such_product(kind: str, rows: int, columns: int) -> None:
    matrix = random_matrix(rows, columns, kind)
    if rows == 144:
        matrix.scales[:, 130:] += 1  # the second block has fewer rows
    assert float8_matrix(matrix) is None
    codes = torch.zeros(16, 128, dtype=torch.uint8)
    assert float8_matrix(CudaQuantMatrix(codes, torch.ones(1, 16), None, (16, 128), 8, 128)) is None


# Launches.


@pytest.fixture
def stand_in() -> Iterator[ScaledMmStandIn]:
    if ON_GPU:
        pytest.skip("only on the emulated device: a GPU has the product itself")
    made = ScaledMmStandIn()
    can_multiply.cache_clear()
    yield made
    made.close()
    can_multiply.cache_clear()


def multiply(
    matrix: CudaQuantMatrix, tokens: int, *, adds: bool, bias: Tensor | None = None, is_wide: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the product of random activations, or what it adds to a residual, and the exact result."""
    device = make_device().device
    rows, columns = matrix.shape
    a = torch.randn(80, columns).to(device, BF16)
    x = torch.randn(80, rows).to(device)
    scratch = Scratch(BF16, device, rows * columns)
    moved, bias = matrix.to(device), None if bias is None else bias.to(device)
    float8 = float8_matrix(moved)
    assert float8 is not None
    linear = QuantLinear(
        moved, bias, scratch, is_batch_invariant=False, float8=Float8Product(float8, scratch)
    )
    launches = LaunchList((Size.TOKENS,), (Input.IDS,))
    out = torch.full((80, rows), torch.nan, dtype=torch.float32 if is_wide else BF16, device=device)
    before = x.double()
    if adds:
        linear.add(launches, a, x, out, Size.TOKENS)
    else:
        linear.multiply(launches, a, out, Size.TOKENS)
    launches.finish()
    launches.run((tokens,), (x[:1],))
    exact = a[:tokens].double().cpu() @ values_of(matrix).T + (0 if bias is None else bias.double().cpu())
    if not adds:
        assert out[-(-tokens // 4) * 4 :].isnan().all(), "only rows that pad the product are overwritten"
        return out[:tokens].double().cpu(), exact
    assert torch.equal(x[tokens:].double(), before[tokens:])
    return (x.double() - before)[:tokens].cpu(), exact


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("kind", "rows", "most"), [("row", 48, 16), ("block", 256, 32)])
def test_only_steps_of_many_tokens_are_in_float8(
    stand_in: ScaledMmStandIn, kind: str, rows: int, most: int, adds: bool
) -> None:
    matrix = random_matrix(rows, 512, kind)
    for tokens in (1, most):
        out, exact = multiply(matrix, tokens, adds=adds)
        assert_close(out, exact, length=512, dtype=BF16)
    assert not stand_in.calls
    for tokens in (most + 1, 80):
        out, exact = multiply(matrix, tokens, adds=adds)
        padded = -(-tokens // 4) * 4 if kind == "block" else tokens
        assert stand_in.calls.pop() == (padded, rows, 512)
        error = float((out - exact).norm() / exact.norm())
        assert 0.015 < error < 0.035, "activations have 4 significant bits"


@pytest.mark.parametrize("adds", [False, True])
def test_a_bias_is_added(stand_in: ScaledMmStandIn, adds: bool) -> None:
    matrix, bias = random_matrix(48, 256, "row"), torch.randn(48) * 100
    out, exact = multiply(matrix, 70, adds=adds, bias=bias)
    assert stand_in.calls
    assert (out - exact).norm() < 0.035 * (exact - bias.double()).norm() + 0.004 * exact.norm()


def test_results_in_float32_are_not_rounded(stand_in: ScaledMmStandIn) -> None:
    """Logits are float32: a head's product is not in FP8."""
    out, exact = multiply(random_matrix(48, 256, "row"), 70, adds=False, is_wide=True)
    assert_close(out, exact, length=2, dtype=BF16)
    assert not stand_in.calls


@pytest.mark.parametrize("has_groups", [False, True])
def test_a_trial_decides_what_torch_multiplies(
    stand_in: ScaledMmStandIn, caplog: pytest.LogCaptureFixture, has_groups: bool
) -> None:
    device = make_device().device

    def tries() -> bool:
        can_multiply.cache_clear()
        return can_multiply(device, BF16, has_groups=has_groups)

    assert tries() and not caplog.records
    stand_in.is_wrong = True
    assert not tries()
    stand_in.refuses = True
    assert not tries()
    texts = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "wrongly" in texts[0] and texts[1].endswith("this GPU has no FP8")


@pytest.mark.parametrize(
    ("message", "tokens", "has_groups", "num_scales"),
    [
        ("3 numbers, got 2", 3, False, 2),
        ("8 numbers, got 7", 3, True, 7),
        ("`x` must have shape", 4, False, 4),
    ],
)
def test_activations_that_do_not_fit_their_codes_are_refused(
    message: str, tokens: int, has_groups: bool, num_scales: int
) -> None:
    device = make_device().device
    x, codes = torch.zeros(tokens, 256).to(device, BF16), torch.zeros(3, 256).to(device, FLOAT8)
    with pytest.raises(RuntimeError, match=message):
        _ops.quantise(x, has_groups, codes, torch.zeros(num_scales, device=device))


@pytest.mark.parametrize(
    ("message", "of_weight", "dtype"),
    [
        ("`weight_scales` must have shape", (255,), BF16),
        ("`weight_scales` must have shape", (2, 1), BF16),
        ("`out` must be bfloat16", (256,), torch.float32),
    ],
)
def test_products_that_do_not_fit_are_refused(
    message: str, of_weight: tuple[int, ...], dtype: torch.dtype
) -> None:
    device = make_device().device
    codes, weight = (torch.zeros(count, 256).to(device, FLOAT8) for count in (3, 256))
    scales, of_rows = torch.zeros(8, device=device), torch.zeros(of_weight, device=device)
    with pytest.raises(RuntimeError, match=message):
        _ops.multiply_codes(codes, scales, weight, of_rows, torch.zeros(3, 256, device=device, dtype=dtype))


@pytest.mark.parametrize(("num_codes", "num_results", "name"), [(3, 4, "codes"), (4, 3, "out")])
def test_a_product_by_block_needs_memory_for_padding(num_codes: int, num_results: int, name: str) -> None:
    device = make_device().device
    codes, weight = (torch.zeros(count, 256).to(device, FLOAT8) for count in (num_codes, 256))
    scales, blocks = torch.zeros(8, device=device), torch.zeros(2, 2, device=device)
    out = torch.zeros(num_results, 256, device=device, dtype=BF16)
    with pytest.raises(RuntimeError, match=f"`{name}` must have memory for 4 tokens"):
        _ops.multiply_codes(codes[:3], scales, weight, blocks, out[:3])


def test_python_and_cpp_have_the_same_limits() -> None:
    root = Path(__file__).parents[2] / "csrc"
    kernels, bindings = (root / "cuda/kernels.h").read_text(), (root / "bindings/cuda/float8.cpp").read_text()
    assert f"kMaxQuantised = {cuda_float8.MAX_COLUMNS};" in kernels
    assert f"kTokenMultiple = {cuda_float8.TOKEN_MULTIPLE};" in kernels
    assert f"kGroup = {cuda_float8.GROUP};" in bindings
    assert f"kGroup = {cuda_float8.GROUP};" in (root / "cuda/quantise.cu").read_text()
