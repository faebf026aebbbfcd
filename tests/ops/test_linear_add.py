"""The operator linear_add: a product onto the residual, in place."""

from __future__ import annotations

import pytest
import torch

from tests.ops.helpers import random_source
from tests.reference.compare import assert_close
from tests.reference.layers import linear
from tgi_asgi import _C, ops


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("tokens", "columns", "rows"), [(0, 16, 16), (1, 3, 1), (3, 17, 129), (17, 129, 33), (2, 64, 257)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_product_is_added_to_the_residual(
    tokens: int, columns: int, rows: int, has_bias: bool, dtype: torch.dtype, threads: int
) -> None:
    _C.set_num_threads(threads)
    matrix, source = random_source(rows, columns)
    bias, bias_source = random_source(rows) if has_bias else (None, None)
    a, x = torch.randn(tokens, columns), torch.randn(tokens, rows)
    before = x.clone()
    result = ops.linear_add(a, ops.linear_weight(source, dtype=dtype, bias=bias_source), x)
    assert result is x
    expected = before.double() + linear(a.to(dtype), matrix.to(dtype), bias)
    assert_close(x, expected, length=columns + 2, dtype=dtype)


def test_operands_that_do_not_fit_are_refused() -> None:
    weight = ops.linear_weight(random_source(5, 7)[1], dtype=torch.float32)
    with pytest.raises(RuntimeError, match="`a` must have shape"):
        ops.linear_add(torch.randn(2, 6), weight, torch.randn(2, 5))
