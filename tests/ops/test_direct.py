"""Operators on torch tensors, one call each: equal to the recorded ones, same row bits in any tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.ops.helpers import EXACT, FAST, random_source, rounded
from tests.reference.compare import assert_close, assert_same_bits
from tests.reference.layers import activate, norm
from tests.support import eager_ops
from tests.support.eager_ops import norm_weight
from tgi_asgi import _C, ops
from tgi_asgi.ops import Packing, direct
from tgi_asgi.ops.tensors import from_tensor, plain_tensor

COUNTS = [1, 3, 7, 50]
QUANTISED = Packing(is_exact=False, quantise="Q8_0")


def _weight(
    packing: Packing, rows: int, columns: int, *, is_bfloat16: bool = False, has_bias: bool = False
) -> tuple[Tensor, Tensor, ops.LinearWeight]:
    """Return a weight's decoded values, its bias, and the weight."""
    tensor, _ = random_source(rows, columns, scale=columns**-0.5)
    source = from_tensor(tensor.bfloat16() if is_bfloat16 else tensor)
    bias, bias_source = random_source(rows)
    made = ops.linear_weight(source, packing, bias=bias_source if has_bias else None)
    means = torch.from_numpy(made.made.matrix.unpack())[:rows, :columns].double()
    return means, bias if has_bias else torch.zeros(rows), made


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (50, 72), (7, 33), (288, 32)])
@pytest.mark.parametrize(
    ("packing", "is_bfloat16"), [(EXACT, False), (FAST, True), (QUANTISED, False)], ids=["f32", "bf16", "q8"]
)
@pytest.mark.parametrize("is_exact", [False, True])
def test_linear_equals_the_reference(
    kernel_set: str, packing: Packing, is_bfloat16: bool, rows: int, columns: int, threads: int,
    is_exact: bool,
) -> None:  # fmt: skip
    _C.set_num_threads(threads)
    means, bias, weight = _weight(packing, rows, columns, is_bfloat16=is_bfloat16, has_bias=True)
    precision = "float32" if is_exact else weight.made.precision
    for count in COUNTS:
        x = torch.randn(count, columns + 5)[:, :columns]  # rows that are not adjacent
        found = direct.linear(weight, x, is_exact)
        assert found.shape == (count, rows)
        expected = rounded(x.contiguous(), precision) @ means.T + bias
        assert_close(found, expected, length=columns, dtype=torch.float32)


@pytest.mark.parametrize(("inter", "columns"), [(64, 96), (50, 72)])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate_up_equals_the_reference(kernel_set: str, inter: int, columns: int, activation: str) -> None:
    gate, gate_source = random_source(inter, columns, scale=columns**-0.5)
    up, up_source = random_source(inter, columns, scale=columns**-0.5)
    weight = ops.gate_up_weight(gate_source, up_source, EXACT)
    x = torch.randn(13, columns)
    found = direct.gate_up(weight, x, activation)
    f = torch.nn.functional.silu if activation == "silu" else _gelu
    expected = f(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    assert found.shape == (13, inter)
    assert_close(found, expected, length=columns, dtype=torch.float32)


def _gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


@pytest.mark.parametrize("activation", ops.GATED_ACTIVATIONS)
def test_gate_and_up_may_be_of_two_formats(activation: str) -> None:
    gate, up = random_source(32, 64)[1], from_tensor(torch.randn(32, 64).bfloat16())
    x = torch.randn(3, 64)
    found = direct.gate_up(ops.gate_up_weight(gate, up, EXACT), x, activation)
    first, second = (x @ plain_tensor(each).float().T for each in (gate, up))
    exact = (activate(first, activation) * second).float()
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [64, 50])
def test_embed_takes_rows_of_the_table(kernel_set: str, columns: int) -> None:
    means, _, weight = _weight(QUANTISED, 40, columns)
    ids = torch.tensor([39, 0, 7, 7])
    assert torch.equal(direct.embed(weight, ids, 2.0), 2 * means[ids].float())
    assert direct.embed(weight, ids[:0]).shape == (0, columns)
    for bad in (40, -1, 2**32, 2**32 + 1, -(2**32)):  # some share the low 32 bits of a valid one
        with pytest.raises(ValueError, match=r"`ids`\[1\] must be in \[0, 40\), got"):
            direct.embed(weight, torch.tensor([3, bad]))


WIDTHS = [1, 15, 16, 33, 64, 100, 4096]


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_norms_equal_the_reference(kernel_set: str, columns: int, has_bias: bool) -> None:
    x, weight = torch.randn(9, columns + 3)[:, 3:], torch.rand(columns) + 0.5
    made = norm_weight(weight, 1e-5, torch.randn(columns) if has_bias else None)
    assert_close(direct.norm(x, made), norm(x, made), length=columns, dtype=torch.float32)


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("activation", ops.GATED_ACTIVATIONS)
def test_activations_equal_the_reference(kernel_set: str, activation: str, columns: int) -> None:
    x = 5 * torch.randn(9, columns + 3)[:, 3:]
    found = direct.activate(x, activation)
    assert_close(found, activate(x, activation), length=16, dtype=torch.float32)


def test_memory_is_used_again_but_never_by_two() -> None:
    """Tensors of the same size get the memory of dropped ones; a view keeps that of its tensor."""
    x = torch.randn(200, 100)
    first, second = direct.activate(x, "relu"), direct.activate(x, "silu")
    view, kept = second[3:5], activate(x, "silu").float()
    place, other = first.data_ptr(), second.data_ptr()
    assert place != other
    del first, second
    third, fourth = direct.activate(x, "gelu"), direct.activate(x, "gelu")
    assert third.data_ptr() == place and fourth.data_ptr() not in (place, other)
    torch.testing.assert_close(view, kept[3:5])


@pytest.mark.parametrize(("num_rows", "columns"), [(0, 5), (5, 0), (-1, 5), (1 << 40, 1 << 40)])
def test_rows_without_a_possible_size_are_refused(num_rows: int, columns: int) -> None:
    with pytest.raises((ValueError, MemoryError)):
        _C.new_rows(num_rows, columns)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("packing", [EXACT, FAST, QUANTISED], ids=["exact", "fast", "q8"])
def test_a_row_has_the_same_bits_in_any_tensor_and_team(
    kernel_set: str, packing: Packing, threads: int
) -> None:
    _, _, weight = _weight(packing, 70, 100, is_bfloat16=packing is FAST)
    x, factors = torch.randn(700, 100), torch.rand(100)
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda part: direct.linear(weight, part),
        lambda part: direct.linear(weight, part, is_exact=True),
        lambda part: direct.norm(part, norm_weight(factors, 1e-6)),
        lambda part: direct.norm(part, norm_weight(factors, 1e-6, factors)),
        lambda part: direct.activate(part, "gelu"),
    ]
    for compute in calls:
        alone = torch.cat([compute(x[i : i + 1]) for i in range(20)])
        _C.set_num_threads(threads)
        assert_same_bits(compute(x)[:20], alone)
        _C.set_num_threads(1)


def test_a_product_has_the_bits_of_the_recorded_one(kernel_set: str) -> None:
    _, _, weight = _weight(QUANTISED, 64, 96)
    x = torch.randn(11, 96)
    assert_same_bits(direct.linear(weight, x), eager_ops.linear(x, weight))


def test_what_does_not_fit_is_refused() -> None:
    _, _, weight = _weight(EXACT, 64, 96)
    with pytest.raises(ValueError, match=r"`x` must be \[n, 96\], got \(2, 95\)"):
        direct.linear(weight, torch.randn(2, 95))
    with pytest.raises(ValueError, match="`weight` must have shape"):
        direct.norm(torch.randn(2, 8), norm_weight(torch.ones(9), 1e-5))
    with pytest.raises(ValueError, match=r"`activation` must be silu, .* got xielu"):
        direct.activate(torch.randn(2, 8), "xielu")
    with pytest.raises(TypeError):
        direct.linear(weight, torch.randn(2, 96).double())
    assert direct.linear(weight, torch.randn(0, 96)).shape == (0, 64)
