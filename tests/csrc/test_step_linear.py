"""Products of eight-bit activations: rounding must not hide non-finite values.

tests/csrc/test_formats.py tests products in all formats, tests/ops/test_linear.py the operator.
"""

from __future__ import annotations

import pytest
import torch

from tests.ops.helpers import FAST, as_int8
from tests.reference.compare import assert_close
from tests.support import eager_ops
from tests.support.random_weights import decoded_values, random_weight
from tgi_asgi import ops

HIDDEN = 256


def weight_of(format: str, rows: int = HIDDEN) -> tuple[ops.LinearWeight, torch.Tensor]:
    source = random_weight(format, rows, HIDDEN, seed=3)
    return ops.linear_weight(source, FAST), decoded_values(source)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden_by_eight_bits(value: float, kernel_set: str) -> None:
    a, (weight, _) = torch.randn(3, HIDDEN), weight_of("Q4_1")
    a[1, 40] = value
    found = eager_ops.linear(a, weight)
    assert not torch.isfinite(found[1]).any()
    assert torch.isfinite(found[[0, 2]]).all()


def test_values_of_any_size_are_rounded_block_by_block(kernel_set: str) -> None:
    a, (weight, matrix) = torch.randn(6, HIDDEN), weight_of("Q8_0")
    a *= torch.tensor([1e-25, 1e-6, 1.0, 1e4, 1e12, 1e25])[:, None]
    a[:, 32:64] *= 1e-5  # a block of small values next to large ones
    found = eager_ops.linear(a, weight)
    for row in range(6):
        assert_close(found[row], as_int8(a[row : row + 1])[0] @ matrix.double().T, length=HIDDEN)


def test_a_row_of_zeros_gives_the_bias_alone(kernel_set: str) -> None:
    bias = torch.randn(100)
    source = random_weight("Q4_0", 100, HIDDEN, seed=1)
    weight = ops.linear_weight(source, FAST, bias=ops.from_floats(bias.numpy()))
    assert torch.equal(eager_ops.linear(torch.zeros(1, HIDDEN), weight)[0], bias)
