"""Products of the recorded step, in all formats, against float64 on the activations as they are rounded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.reference.compare import assert_close, assert_same_bits
from tests.support.blocks import FORMATS, QUANTISED, meaning, random_weight
from tests.support.products import Product, source_of
from tgi_asgi import _C, ops
from tgi_asgi.ops.recorded import Recorded

HIDDEN = 256


def product_of(source: ops.WeightSource, table: Tensor, *, is_exact: bool, bias: Tensor | None) -> Product:
    """Record a product of a weight as a model's file has it."""
    packing = ops.Packing(is_exact=is_exact)
    weight = ops.linear_weight(source, dtype=packing, bias=None if bias is None else source_of(bias))
    return Product(weight, table, torch.rand(HIDDEN) + 0.5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("is_exact", [True, False])
def test_a_product_is_that_of_the_rounded_activations(format: str, is_exact: bool, isa: str) -> None:
    table, bias = torch.randn(13, HIDDEN), torch.randn(HIDDEN)
    source = random_weight(format, HIDDEN, HIDDEN, seed=3)
    product = product_of(source, table, is_exact=is_exact, bias=bias)
    wanted = product.expected(meaning(source))
    # A value halfway between two codes may go either way, by the last bit of the norm.
    room = 40 if product.precision == "int8" else 4
    assert_close(product.run(list(range(13))), wanted, length=HIDDEN * room**2)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("is_exact", [True, False])
def test_a_row_has_the_same_bits_in_any_batch(format: str, is_exact: bool, isa: str) -> None:
    table = torch.randn(20, HIDDEN)
    product = product_of(random_weight(format, HIDDEN, HIDDEN, seed=5), table, is_exact=is_exact, bias=None)
    alone = torch.cat([product.run([row]) for row in range(20)])
    for size in (2, 3, 4, 5, 6, 7, 8, 13, 20):
        assert_same_bits(product.run(list(range(size))), alone[:size])
    order = torch.randperm(20)
    assert_same_bits(product.run(order.tolist()), alone[order])


@pytest.mark.parametrize("format", QUANTISED)
def test_eight_bit_products_have_the_same_bits_with_every_instruction_set(format: str) -> None:
    table = torch.randn(7, HIDDEN)
    source, results, before = random_weight(format, HIDDEN, HIDDEN, seed=7), [], _C.isa()
    torch.manual_seed(1)
    for isa in _C.supported_isas():
        _C.force_isa(isa)
        torch.manual_seed(1)
        results.append(product_of(source, table, is_exact=False, bias=None).run(list(range(7))))
    _C.force_isa(before)
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_the_number_of_threads_changes_no_bit() -> None:
    table = torch.randn(20, HIDDEN)
    source = random_weight("Q4_1", HIDDEN, HIDDEN, seed=9)
    results = []
    for threads in (1, 2, 3):
        _C.set_num_threads(threads)
        torch.manual_seed(2)
        product = product_of(source, table, is_exact=False, bias=None)
        results += [product.run(list(range(20))), torch.cat([product.run([row]) for row in range(20)])]
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden_by_eight_bits(value: float, isa: str) -> None:
    table = torch.randn(2, HIDDEN)
    table[1, 40] = value
    product = product_of(random_weight("Q4_1", HIDDEN, HIDDEN, seed=1), table, is_exact=False, bias=None)
    assert not torch.isfinite(product.run([1])).any()
    assert torch.isfinite(product.run([0])).all(), "what a bad row left in the cache is not seen"


def test_a_row_of_zeros_gives_the_bias_alone(isa: str) -> None:
    bias = torch.randn(HIDDEN)
    product = product_of(
        random_weight("Q4_0", HIDDEN, HIDDEN, seed=1), torch.zeros(1, HIDDEN), is_exact=False, bias=bias
    )
    assert torch.equal(product.run([0])[0], bias)


def test_a_handle_fails_where_torch_would_compute() -> None:
    program = ops.StepProgram(max_tokens=4, max_sequences=1, max_rows=1, max_context=16)
    handle = program.inputs.ids
    assert isinstance(handle, Recorded)
    with pytest.raises(TypeError):
        torch.add(handle, 1)
    with pytest.raises(TypeError):
        handle + 1
