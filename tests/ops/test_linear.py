"""The operators linear and linear_add: a product as rows, or added to the residual stream in place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ops.helpers import EXACT, FAST, random_source, rounded
from tests.reference.compare import assert_close, assert_same_bits
from tests.reference.layers import linear
from tests.support import eager_ops
from tests.support.random_weights import QUANTISED, decoded_values, random_weight, same_codes
from tgi_asgi import _C, ops
from tgi_asgi.ops.tensors import from_tensor

# Tokens, columns, rows, whether there is a bias.
SHAPES = [
    (0, 16, 16, True),
    (1, 3, 1, True),
    (3, 17, 129, False),
    (17, 129, 33, False),
    (17, 129, 33, True),
    (2, 64, 257, True),
    (7, 72, 100, False),
    (13, 100, 72, True),
]


@pytest.mark.parametrize(("tokens", "columns", "rows", "has_bias"), SHAPES)
@pytest.mark.parametrize(  # only bfloat16 products differ by packing
    ("format", "packing"),
    [("F32", FAST), ("F16", FAST), ("BF16", FAST), ("BF16", EXACT)],
    ids=["F32", "F16", "BF16", "BF16 exact"],
)
def test_products_of_any_size_equal_the_reference(
    kernel_set: str, tokens: int, columns: int, rows: int, has_bias: bool, packing: ops.Packing, format: str
) -> None:
    _C.set_num_threads(2)
    source = random_weight(format, rows, columns, seed=columns)
    bias, bias_source = random_source(rows) if has_bias else (None, None)
    weight = ops.linear_weight(source, packing, bias=bias_source)
    assert (weight.rows, weight.columns) == (rows, columns)
    a, x = torch.randn(tokens, columns), torch.randn(tokens, rows)
    expected = linear(rounded(a, weight.made.precision), decoded_values(source), bias)
    assert_close(eager_ops.linear(a, weight), expected, length=columns + 2)
    assert_close(eager_ops.linear_add(a, weight, x, -0.4), x.double() - 0.4 * expected, length=columns + 3)


@pytest.mark.parametrize(
    ("format", "quantise", "precision"),
    [
        ("Q8_0", None, "float32"),
        ("Q4_K", None, "float32"),
        ("F16", "Q8_0", "float32"),
        ("BF16", None, "bfloat16"),
    ],
)
@pytest.mark.parametrize("has_float_prompts", [False, True])
def test_codes_may_be_multiplied_by_floats(
    format: str, quantise: str | None, precision: str, has_float_prompts: bool
) -> None:
    packing = replace(FAST, quantise=quantise, has_float_prompts=has_float_prompts).for_states()
    source = random_weight(format, 70, 256, seed=4)
    weight = ops.linear_weight(source, packing)
    assert weight.made.precision == precision
    assert not packing.by_kind
    exact = ops.linear_weight(source, replace(EXACT, quantise=quantise))
    a = torch.randn(7, 256)
    if precision == "float32":
        assert_same_bits(eager_ops.linear(a, weight), eager_ops.linear(a, exact))


@pytest.mark.parametrize(("format", "columns"), [("Q8_0", 96), ("Q4_0", 32), ("Q5_1", 224), ("Q6_K", 512)])
def test_a_product_of_codes_is_that_of_activations_rounded_to_eight_bits(
    kernel_set: str, format: str, columns: int
) -> None:
    source = random_weight(format, 100, columns, seed=2)
    weight, bias = ops.linear_weight(source, FAST), torch.randn(100)
    biased = ops.linear_weight(source, FAST, bias=from_tensor(bias))
    assert weight.made.precision == "int8"
    a = torch.randn(9, columns)
    expected = linear(rounded(a, "int8"), decoded_values(source))
    assert_close(eager_ops.linear(a, weight), expected, length=columns)
    assert_close(eager_ops.linear(a, biased), expected + bias.double(), length=columns)


@pytest.mark.parametrize("format", QUANTISED)
@pytest.mark.parametrize("byte", [0x00, 0x77, 0xFF])
def test_sums_of_the_largest_codes_and_values_do_not_overflow(
    kernel_set: str, format: str, byte: int
) -> None:
    """Use code bytes 0x00, 0x77 and 0xFF, and activations of the largest magnitude: 127 and -127."""
    source = same_codes(format, 32, 256, byte)
    a = torch.tensor([1.0, -1.0]).repeat(4, 1).reshape(8, 1).expand(8, 256).contiguous()
    expected = linear(rounded(a, "int8"), decoded_values(source))
    assert_close(eager_ops.linear(a, ops.linear_weight(source, FAST)), expected, length=256)


@pytest.mark.parametrize("format", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q5_K"])
def test_a_row_has_the_same_bits_in_any_batch_and_team(kernel_set: str, format: str) -> None:
    weight = ops.linear_weight(random_weight(format, 100, 256, seed=1), FAST)
    a, x, order = torch.randn(20, 256), torch.randn(20, 100), torch.randperm(20)
    alone = torch.cat([eager_ops.linear_add(a[r : r + 1], weight, x[r : r + 1]) for r in range(20)])
    for threads in (2, 3, 7):
        _C.set_num_threads(threads)
        for size in (1, 2, 3, 6, 7, 20):
            assert_same_bits(eager_ops.linear_add(a[:size], weight, x[:size]), alone[:size])
        assert_same_bits(eager_ops.linear_add(a[order], weight, x[order]), alone[order])


def test_parts_of_wide_matrices_and_of_many_tokens_change_no_bit(kernel_set: str) -> None:
    _C.set_num_threads(2)
    source = random_weight("BF16", 600, 1100, seed=1)
    weight = ops.linear_weight(source, FAST)
    a = torch.randn(600, 1100)
    found = eager_ops.linear(a, weight)
    assert_close(found, linear(rounded(a, "bfloat16"), decoded_values(source), None), length=1100)
    for picked in ([0], [511], [512], [599], list(range(580, 599)), list(range(500, 550))):
        assert_same_bits(eager_ops.linear(a[picked].contiguous(), weight), found[picked].contiguous())


def test_operands_that_do_not_fit_are_refused() -> None:
    weight = ops.linear_weight(random_source(5, 7)[1], EXACT)
    with pytest.raises(ValueError, match="`linear_add` takes 7 columns as `a`, not 6"):
        eager_ops.linear_add(torch.randn(2, 6), weight, torch.randn(2, 5))
    with pytest.raises(ValueError, match="`linear_add` takes 5 columns as `x`, not 7"):
        eager_ops.linear_add(torch.randn(2, 7), weight, torch.randn(2, 7))
    with pytest.raises(ValueError, match="`linear` takes 7 columns as `a`, not 5"):
        eager_ops.linear(torch.randn(2, 5), weight)
