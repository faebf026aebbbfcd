"""Products of the recorded step, in all formats, against float64 on the activations as they are rounded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.reference.compare import assert_close, assert_same_bits
from tests.support.blocks import FORMATS, QUANTISED, meaning, random_weight
from tgi_asgi import _C, ops
from tgi_asgi.ops.packed import PackedMatrix
from tgi_asgi.ops.recorded import Recorded

HIDDEN = 256
EPS = 1e-5


def as_int8(x: Tensor) -> Tensor:
    """Round float32 rows to eight bits in blocks of 32, as the kernels do."""
    blocks = x.reshape(x.shape[0], -1, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * torch.where(largest > 0, 127 / largest, torch.zeros(()))).round()
    return (codes.double() * (largest * torch.tensor(1 / 127)).double()).reshape(x.shape)


def rounded(x: Tensor, precision: str) -> Tensor:
    if precision == "int8":
        return as_int8(x)
    return x.to(torch.bfloat16).double() if precision == "bfloat16" else x.double()


class Product:
    """Norm and one product, recorded: `norm(x) @ W.T` for rows of a table of embeddings."""

    def __init__(
        self, source: ops.WeightSource, table: Tensor, *, is_exact: bool, bias: Tensor | None
    ) -> None:
        packing = ops.Packing(is_exact=is_exact)
        self.norm_weight = torch.rand(HIDDEN) + 0.5
        bias_source = None if bias is None else _source(bias)
        weight = ops.linear_weight(source, dtype=packing, bias=bias_source)
        assert isinstance(weight.matrix, PackedMatrix)
        self.precision = weight.matrix.precision
        embedding = ops.linear_weight(_source(table), dtype=packing)
        self.program = ops.StepProgram(max_tokens=64, max_sequences=1, max_rows=64, max_context=64)
        x = ops.embed(self.program.inputs.ids, embedding)
        x = _attend_to_nothing(self.program, x, packing)
        ops.head(x, self.program.inputs.rows, self.norm_weight, EPS, weight)

    def run(self, ids: list[int]) -> Tensor:
        n = len(ids)
        tables = ops.AttentionTables(_int([0, n]), _int([n]), _int([[0, 1, 2, 3]]))
        return self.program.run(_int(ids), _int(range(n)), torch.arange(n), tables, _int(range(n))).clone()


def _int(values: object) -> Tensor:
    return torch.tensor(list(values) if isinstance(values, range) else values, dtype=torch.int32)


def _source(tensor: Tensor) -> ops.WeightSource:
    return ops.WeightSource(
        tensor.contiguous().view(torch.uint8).reshape(-1).numpy(), "F32", tuple(tensor.shape)
    )


def _attend_to_nothing(program: ops.StepProgram, x: Tensor, packing: ops.Packing) -> Tensor:
    """Add an attention whose weights are zero: a program learns the shape of its pool from one."""
    kv = ops.allocate_kv(1, 4, 1, 32, 16, torch.float32)[0]
    zeros = _source(torch.zeros(32, HIDDEN))
    weight = ops.qkv_weight(zeros, zeros, zeros, num_heads=1, num_kv_heads=1, head_dim=32, dtype=packing)
    output = ops.linear_weight(_source(torch.zeros(HIDDEN, 32)), dtype=packing)
    inputs, rope = program.inputs, ops.RopeTable(torch.ones(64, 16), torch.zeros(64, 16))
    q = ops.qkv(ops.norm(x, torch.ones(HIDDEN), EPS), weight, inputs.positions, inputs.slots, kv, rope)
    return ops.linear_add(ops.attention(q, kv, inputs.tables, 1.0), output, x)


def expected(product: Product, table: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    mean = table.double().pow(2).mean(-1, keepdim=True)
    normed = (table.double() / (mean + EPS).sqrt() * product.norm_weight.double()).float()
    result = rounded(normed, product.precision) @ weight.double().T
    return result + (0 if bias is None else bias.double())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("is_exact", [True, False])
def test_a_product_is_that_of_the_rounded_activations(format: str, is_exact: bool, isa: str) -> None:
    table, bias = torch.randn(13, HIDDEN), torch.randn(HIDDEN)
    source = random_weight(format, HIDDEN, HIDDEN, seed=3)
    product = Product(source, table, is_exact=is_exact, bias=bias)
    wanted = expected(product, table, meaning(source), bias)
    # A value halfway between two codes may go either way, by the last bit of the norm.
    room = 40 if product.precision == "int8" else 4
    assert_close(product.run(list(range(13))), wanted, length=HIDDEN * room**2)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("is_exact", [True, False])
def test_a_row_has_the_same_bits_in_any_batch(format: str, is_exact: bool, isa: str) -> None:
    table = torch.randn(20, HIDDEN)
    product = Product(random_weight(format, HIDDEN, HIDDEN, seed=5), table, is_exact=is_exact, bias=None)
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
        results.append(Product(source, table, is_exact=False, bias=None).run(list(range(7))))
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
        product = Product(source, table, is_exact=False, bias=None)
        results += [product.run(list(range(20))), torch.cat([product.run([row]) for row in range(20)])]
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden_by_eight_bits(value: float, isa: str) -> None:
    table = torch.randn(2, HIDDEN)
    table[1, 40] = value
    product = Product(random_weight("Q4_1", HIDDEN, HIDDEN, seed=1), table, is_exact=False, bias=None)
    assert not torch.isfinite(product.run([1])).any()
    assert torch.isfinite(product.run([0])).all(), "what a bad row left in the cache is not seen"


def test_a_row_of_zeros_gives_the_bias_alone(isa: str) -> None:
    bias = torch.randn(HIDDEN)
    product = Product(
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
