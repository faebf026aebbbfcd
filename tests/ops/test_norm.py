"""The operators norm, norm_add and norm_in_place: RMSNorm and LayerNorm before and after a product."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.ops.helpers import EXACT, FAST, random_source, rounded
from tests.reference.compare import assert_close, assert_same_bits
from tests.reference.layers import linear, norm, rms_norm
from tests.support import eager_ops
from tests.support.eager_ops import norm_weight
from tests.support.open_program import OpenProgram
from tests.support.random_weights import decoded_values, random_weight
from tgi_asgi import _C, ops
from tgi_asgi.ops.recorder import Kind

SIZES = [1, 3, 17, 32, 72, 129, 576]
KINDS = pytest.mark.parametrize("kind", ["rms", "layer"])


def weight_of(hidden: int, kind: str) -> ops.NormWeight:
    return norm_weight(torch.randn(hidden), 1e-5, torch.randn(hidden) if kind == "layer" else None)


@KINDS
@pytest.mark.parametrize("hidden", SIZES)
@pytest.mark.parametrize("tokens", [0, 1, 3, 17])
def test_the_activation_is_the_normed_residual(kernel_set: str, tokens: int, hidden: int, kind: str) -> None:
    _C.set_num_threads(2)
    x, weight = torch.randn(tokens, hidden) * 3, weight_of(hidden, kind)
    assert_close(eager_ops.norm(x, weight), norm(x, weight), length=hidden + 8)
    assert_same_bits(eager_ops.norm(x, weight, Kind.ROWS), eager_ops.norm(x, weight))


@KINDS
@pytest.mark.parametrize("hidden", SIZES)
@pytest.mark.parametrize("tokens", [0, 1, 3, 17])
def test_the_norm_takes_the_place_of_the_residual(
    kernel_set: str, tokens: int, hidden: int, kind: str
) -> None:
    _C.set_num_threads(2)
    x, weight = torch.randn(tokens, hidden) * 3, weight_of(hidden, kind)
    assert_close(eager_ops.norm_in_place(x, weight), norm(x, weight), length=hidden + 8)


@KINDS
@pytest.mark.parametrize(("first", "hidden"), [(0, 1), (3, 33), (21, 16), (10, 64), (0, 77), (61, 16)])
def test_only_some_columns_of_rows_are_normed(kernel_set: str, first: int, hidden: int, kind: str) -> None:
    _C.set_num_threads(3)
    x, weight = torch.randn(19, 77) * 3, weight_of(hidden, kind)
    found = eager_ops.norm_in_place(x, weight, first)
    columns = slice(first, first + hidden)
    assert_close(found[:, columns], norm(x[:, columns], weight), length=hidden + 8)
    found[:, columns] = x[:, columns]
    assert_same_bits(found, x)


def test_columns_that_rows_lack_are_refused() -> None:
    recorder = ops.Recorder()
    for first in (-1, 46):
        with pytest.raises(ValueError, match=f"x has 77 columns, not 32 from {first} on"):
            ops.norm_in_place(recorder.value(Kind.ROWS, 77), weight_of(32, "rms"), first)


@pytest.mark.parametrize("packing", [EXACT, FAST], ids=["exact", "fast"])
@pytest.mark.parametrize("columns", [1, 10, 32, 48])
def test_the_columns_after_those_of_a_product_do_not_matter(
    kernel_set: str, columns: int, packing: ops.Packing
) -> None:
    """Not even to the scale of an int8 block that they would share."""
    quantised = replace(packing, quantise="Q8_0")
    weight = ops.linear_weight(random_weight("F32", 40, columns, seed=1), quantised)
    rows = torch.randn(9, 77)
    rows[:, columns:] = 1e9

    found = eager_ops.linear_of_columns(rows, columns, weight)
    assert_same_bits(found, eager_ops.linear_of_columns(rows[:, :columns].contiguous(), columns, weight))
    assert found.abs().max() < 1e3


def test_the_variance_is_that_around_the_mean(kernel_set: str) -> None:
    x = torch.randn(3, 129) + 1000.0
    weight = weight_of(129, "layer")
    assert_close(eager_ops.norm(x, weight), norm(x, weight), length=129 * 1000**2)
    heads = ops.NormWeight.layer(129, 1e-5, weight=None)
    assert_close(eager_ops.norm(x, heads), norm(x, heads), length=129 * 1000**2)


@KINDS
@pytest.mark.parametrize("hidden", SIZES)
@pytest.mark.parametrize("tokens", [0, 1, 3, 17])
def test_the_norm_of_rows_is_added_to_the_residual(
    kernel_set: str, tokens: int, hidden: int, kind: str
) -> None:
    _C.set_num_threads(2)
    rows, x, weight = torch.randn(tokens, hidden) * 3, torch.randn(tokens, hidden), weight_of(hidden, kind)
    expected = x.double() + 0.3 * norm(rows, weight)
    assert_close(eager_ops.norm_add(rows, weight, x, 0.3), expected, length=hidden + 8)


@KINDS
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(kernel_set: str, threads: int, kind: str) -> None:
    x, rows, weight = torch.randn(20, 577), torch.randn(20, 577), weight_of(577, kind)
    alone = torch.cat([eager_ops.norm(x[row : row + 1], weight) for row in range(20)])
    added = torch.cat([eager_ops.norm_add(rows[r : r + 1], weight, x[r : r + 1]) for r in range(20)])
    in_place = torch.cat([eager_ops.norm_in_place(x[row : row + 1], weight) for row in range(20)])
    _C.set_num_threads(threads)
    assert_same_bits(eager_ops.norm(x, weight), alone)
    assert_same_bits(eager_ops.norm_add(rows, weight, x), added)
    assert_same_bits(eager_ops.norm_in_place(x, weight), in_place)


def test_a_row_of_zeros_stays_zero(kernel_set: str) -> None:
    ones = norm_weight(torch.ones(33), 1e-5)
    assert_same_bits(eager_ops.norm(torch.zeros(1, 33), ones), torch.zeros(1, 33))
    x = torch.randn(1, 33)
    assert_same_bits(eager_ops.norm_add(torch.zeros(1, 33), ones, x), x)


class NormAndProduct:
    """A recorded norm and product; with few tokens, each thread of the team computes the norm itself."""

    def __init__(self, format: str, norm: Tensor, packing: ops.Packing) -> None:
        hidden = len(norm)
        source = random_weight(format, 50, hidden, seed=3)
        self.matrix = decoded_values(source)
        weight = ops.linear_weight(source, packing)
        self.precision: str = weight.made.precision
        recorder = ops.Recorder()
        self.x = recorder.value(Kind.RESIDUAL, hidden)
        self.rows = ops.linear(ops.norm(self.x, norm_weight(norm, 1e-5)), weight)
        self.program = OpenProgram(
            recorder,
            ops.StepLimits(max_tokens=32, max_sequences=1, max_rows=1, max_context=32),
            inputs=[self.x],
            outputs=[self.rows],
        )

    def run(self, x: Tensor) -> Tensor:
        tokens = len(x)
        zeros = [0] * tokens
        batch = ops.FlatRows(
            ids=zeros, positions=zeros, slots=zeros, query_start=[0, tokens], context_len=[tokens],
            block_table=torch.zeros(1, 1, dtype=torch.int32).numpy(),
        )  # fmt: skip
        self.program.write(self.x, x.numpy())
        self.program.run(batch, ())
        return torch.from_numpy(self.program.read(self.rows, tokens))


@pytest.mark.parametrize(
    ("format", "packing"), [("Q8_0", FAST), ("BF16", FAST), ("F32", FAST), ("Q4_0", EXACT)]
)
@pytest.mark.parametrize("hidden", [64, 320])
def test_a_product_takes_the_norm_in_its_own_precision(
    kernel_set: str, format: str, packing: ops.Packing, hidden: int
) -> None:
    x, norm = torch.randn(20, hidden), torch.rand(hidden) + 0.5
    alone = NormAndProduct(format, norm, packing)
    rows = torch.cat([alone.run(x[row : row + 1]) for row in range(20)])
    normed = rms_norm(x, norm, 1e-5).float()
    # A value halfway between two codes may round either way, depending on the norm's last bit.
    tolerance = {"int8": 40, "bfloat16": 40, "float32": 4}[alone.precision]
    expected = linear(rounded(normed, alone.precision), alone.matrix)
    assert_close(rows, expected, length=hidden * tolerance**2)
    for threads in (2, 5):
        _C.set_num_threads(threads)
        team = NormAndProduct(format, norm, packing)
        for size in (1, 2, 3, 20):
            assert_same_bits(team.run(x[:size]), rows[:size])


def test_operands_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="`norm` takes 15 columns as `x`, not 16"):
        eager_ops.norm(torch.randn(2, 16), norm_weight(torch.ones(15), 1e-5))
    with pytest.raises(ValueError, match="a norm's bias must have 16 elements, got 15"):
        norm_weight(torch.ones(16), 1e-5, torch.ones(15))
    with pytest.raises(ValueError, match="`norm_add` takes 16 columns as `x`, not 15"):
        eager_ops.norm_add(torch.randn(2, 16), norm_weight(torch.ones(16), 1e-5), torch.randn(2, 15))
    weight = ops.linear_weight(random_source(4, 15)[1], EXACT)
    with pytest.raises(ValueError, match="`linear` takes 15 columns as `a`, not 16"):
        eager_ops.linear(torch.randn(2, 16), weight)
