"""The operator up: a product and an activation, for an MLP without a gate."""

from __future__ import annotations

import pytest
import torch

from tests.ops.helpers import EXACT, FAST, random_source, rounded
from tests.reference.compare import assert_close, assert_same_bits
from tests.reference.layers import activate, linear
from tests.support import eager_ops
from tests.support.random_weights import decoded_values, random_weight
from tgi_asgi import _C, ops
from tgi_asgi.ops.tensors import from_tensor

ALPHAS = (0.7, 0.4)


def alphas_of(activation: str) -> tuple[float, float] | None:
    return ALPHAS if activation == "xielu" else None


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("tokens", "hidden", "size"), [(0, 4, 4), (1, 17, 3), (17, 33, 129), (3, 72, 100), (2, 64, 160)]
)
def test_the_activation_equals_the_reference(
    kernel_set: str, tokens: int, hidden: int, size: int, has_bias: bool, activation: str
) -> None:
    _C.set_num_threads(2)
    matrix, source = random_source(size, hidden)
    bias = torch.randn(size) if has_bias else None
    weight = ops.linear_weight(source, EXACT, bias=None if bias is None else from_tensor(bias))
    a, alphas = torch.randn(tokens, hidden), alphas_of(activation)
    expected = activate(linear(a, matrix, bias), activation, alphas)
    assert_close(eager_ops.up(a, weight, activation, alphas), expected, length=2 * hidden)


@pytest.mark.parametrize("packing", [EXACT, FAST], ids=["exact", "fast"])
@pytest.mark.parametrize("format", ["Q8_0", "Q4_1", "BF16", "F16"])
def test_weights_of_any_format_are_taken(kernel_set: str, format: str, packing: ops.Packing) -> None:
    _C.set_num_threads(2)
    source = random_weight(format, 100, 96, seed=1)
    weight = ops.linear_weight(source, packing)
    a = torch.randn(37, 96)
    expected = activate(linear(rounded(a, weight.made.precision), decoded_values(source)), "gelu")
    assert_close(eager_ops.up(a, weight, "gelu"), expected, length=4 * 96)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_each_value_is_right_by_itself(kernel_set: str, activation: str) -> None:
    values = torch.cat([torch.linspace(-9, 9, 1201), torch.tensor([0.0, -0.0, 1e-6, -1e-6, -0.5, 40, -40])])
    weight = ops.linear_weight(from_tensor(values[:, None]), EXACT)
    found = eager_ops.up(torch.ones(1, 1), weight, activation, alphas_of(activation))[0].double()
    expected = activate(values, activation, alphas_of(activation))
    apart = (found - expected).abs() - 2e-6 * expected.abs()
    assert apart.max() <= 1e-7, values[apart.argmax()]


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu", "relu"])
def test_values_far_from_zero_saturate(kernel_set: str, activation: str) -> None:
    values = torch.tensor([-1e4, -200.0, -100.0, 0.0, 100.0, 200.0, 1e4])[:, None]
    weight = ops.linear_weight(from_tensor(values), EXACT)
    out = eager_ops.up(torch.ones(1, 1), weight, activation)
    torch.testing.assert_close(out, values.T.clamp_min(0), atol=1e-30, rtol=1e-6)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_nan_is_kept(kernel_set: str, activation: str) -> None:
    weight = ops.linear_weight(from_tensor(torch.ones(40, 3)), EXACT)
    a = torch.tensor([[1.0, 2.0, 3.0], [1.0, torch.nan, 3.0]])
    found = eager_ops.up(a, weight, activation, alphas_of(activation))
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


@pytest.mark.parametrize("threads", [2, 5])
def test_a_row_has_the_same_bits_in_any_batch_and_team(kernel_set: str, threads: int) -> None:
    weight = ops.linear_weight(random_source(100, 72)[1], FAST)
    a = torch.randn(20, 72)
    alone = torch.cat([eager_ops.up(a[row : row + 1], weight, "xielu", ALPHAS) for row in range(20)])
    _C.set_num_threads(threads)
    for size in (1, 2, 7, 20):
        assert_same_bits(eager_ops.up(a[:size], weight, "xielu", ALPHAS), alone[:size])


def test_an_unknown_function_and_numbers_that_are_not_its_own_are_refused() -> None:
    weight = ops.linear_weight(random_source(4, 8)[1], EXACT)
    with pytest.raises(
        ValueError, match="must be one of silu, gelu_tanh, gelu, relu, relu_squared, xielu, got"
    ):
        eager_ops.up(torch.randn(1, 8), weight, "tanh")
    for activation, alphas in (("xielu", None), ("relu", ALPHAS)):
        with pytest.raises(ValueError, match="no other activation needs `alphas`"):
            eager_ops.up(torch.randn(1, 8), weight, activation, alphas)
    with pytest.raises(ValueError, match="`alphas` must be finite"):
        eager_ops.up(torch.randn(1, 8), weight, "xielu", (1.0, float("nan")))
    with pytest.raises(ValueError, match="`up` takes 8 columns as `a`, not 7"):
        eager_ops.up(torch.randn(1, 7), weight, "relu")
