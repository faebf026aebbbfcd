"""The operator heads_linear: each head's columns times its own matrix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.ops.helpers import EXACT, FAST, rounded, with_each_kernel_set
from tests.reference.compare import assert_close, assert_same_bits
from tests.support.eager_ops import step
from tests.support.open_program import OpenProgram
from tests.support.random_weights import decoded_values, random_weight
from tgi_asgi import _C, ops
from tgi_asgi.ops import HeadsWeight
from tgi_asgi.ops.recorder import Kind

_BEHIND = 40  # columns of the rows that belong to no head


def run(x: Tensor, weight: HeadsWeight) -> Tensor:
    """Multiply the first columns of x, through `activation`, into a poisoned buffer."""
    recorder = ops.Recorder()
    rows = recorder.value(Kind.ROWS, x.shape[1])
    out = ops.heads_linear(ops.activation(rows, weight.num_heads * weight.columns), weight)
    limits = ops.StepLimits(max_tokens=len(x), max_sequences=1, max_rows=1, max_context=1)
    program = OpenProgram(recorder, limits, inputs=[rows], outputs=[out])
    program.buffers.rows_of(out).array()[:] = math.nan
    program.write(rows, x.numpy())
    program.run(step(len(x)), ())
    return torch.from_numpy(program.read(out, len(x)))


def reference(x: Tensor, matrices: Tensor, precision: str) -> Tensor:
    """Multiply in float64 by matrices [heads, rows, columns]."""
    heads, _, columns = matrices.shape
    a = rounded(x[:, : heads * columns], precision).view(len(x), heads, columns)
    return torch.einsum("nhc,hrc->nhr", a, matrices.double()).flatten(1)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("heads", "rows", "columns", "tokens"),
    [(1, 32, 32, 1), (3, 64, 32, 2), (5, 32, 96, 7), (2, 96, 64, 17), (16, 128, 64, 3), (7, 32, 256, 129)],
)
def test_each_head_is_multiplied_by_its_own_matrix(
    kernel_set: str, heads: int, rows: int, columns: int, tokens: int, threads: int
) -> None:
    _C.set_num_threads(threads)
    source = random_weight("F32", heads * rows, columns, seed=1)
    weight = ops.heads_weight(source, EXACT, num_heads=heads)
    x = torch.randn(tokens, heads * columns + _BEHIND)
    x[:, heads * columns :] = math.nan
    expected = reference(x, decoded_values(source).view(heads, rows, columns), "float32")
    assert_close(run(x, weight), expected, length=columns)


@pytest.mark.parametrize(
    ("format", "precision"),
    [("F16", "float32"), ("BF16", "bfloat16"), ("Q8_0", "int8"), ("Q4_K", "int8"), ("Q6_K", "int8")],
)
def test_formats_are_multiplied_as_those_of_other_products(
    kernel_set: str, format: str, precision: str
) -> None:
    source = random_weight(format, 3 * 64, 256, seed=2)
    weight = ops.heads_weight(source, FAST, num_heads=3)
    x = torch.randn(9, 3 * 256)
    expected = reference(x, decoded_values(source).view(3, 64, 256), precision)
    assert_close(run(x, weight), expected, length=256)


@pytest.mark.parametrize(
    ("format", "arithmetic", "precision"),
    [
        ("F32", EXACT, "float32"),
        ("Q4_K", EXACT, "float32"),
        ("F16", FAST, "float32"),
        ("BF16", FAST, "bfloat16"),
        ("Q4_K", FAST, "bfloat16"),
    ],
)
def test_transposes_are_taken_apart_head_by_head(
    format: str, arithmetic: ops.Packing, precision: str
) -> None:
    """Check that inexact packing turns codes into bfloat16, as their blocks run along the other side."""
    source = random_weight(format, 3 * 64, 256, seed=3)
    weight = ops.heads_weight(source, arithmetic, num_heads=3, is_transposed=True)
    assert (weight.rows, weight.columns) == (256, 64)
    matrices = decoded_values(source).view(3, 64, 256).transpose(1, 2)
    if precision == "bfloat16":
        matrices = matrices.bfloat16()
    x = torch.randn(9, 3 * 64)
    assert_close(run(x, weight), reference(x, matrices, precision), length=64)


def test_a_token_has_the_same_bits_in_any_company_and_team() -> None:
    weight = ops.heads_weight(random_weight("Q8_0", 5 * 96, 64, seed=4), FAST, num_heads=5)
    x = torch.randn(40, 5 * 64)
    whole = run(x, weight)
    for threads in (1, 2, 4):
        _C.set_num_threads(threads)
        for first, last in ((0, 1), (7, 9), (13, 40)):
            assert_same_bits(run(x[first:last], weight), whole[first:last])


def test_sets_of_one_arithmetic_agree_to_the_bit() -> None:
    weight = ops.heads_weight(random_weight("Q8_0", 3 * 64, 64, seed=5), FAST, num_heads=3)
    x = torch.randn(19, 3 * 64)
    found = [result for _, result in with_each_kernel_set(lambda: run(x, weight))]
    for each in found:
        assert_same_bits(each, found[0])


def test_operands_that_do_not_fit_are_refused() -> None:
    source = random_weight("F32", 96, 64, seed=6)
    with pytest.raises(ValueError, match=r"multiples of 32 rows of each of 2 heads, .* got \[96, 64\]"):
        ops.heads_weight(source, EXACT, num_heads=2)
    with pytest.raises(ValueError, match="multiples of 32 rows"):
        ops.heads_weight(random_weight("F32", 96, 40, seed=6), EXACT, num_heads=3)
    weight, recorder = ops.heads_weight(source, EXACT, num_heads=3), ops.Recorder()
    with pytest.raises(ValueError, match="takes 192 columns as `a`, not 64"):
        ops.heads_linear(recorder.value(Kind.ACTIVATION, 64), weight)
    with pytest.raises(TypeError, match="takes an activation as `a`, not rows"):
        ops.heads_linear(recorder.value(Kind.ROWS, 192), weight)
    for columns in (-1, 0, 193):
        with pytest.raises(ValueError, match=r"`columns` must be in 1\.\.192, got"):
            ops.activation(recorder.value(Kind.ROWS, 192), columns)
