"""Products of arrays: float32 with the same bits for any number of rows and threads."""

from __future__ import annotations

import pytest
import torch

from tests.reference.compare import assert_close, assert_same_bits
from tests.reference.layers import linear
from tgi_asgi import _C, ops


@pytest.mark.parametrize(("rows", "columns", "inner"), [(1, 1, 1), (5, 33, 4), (70, 576, 16), (3, 7, 129)])
def test_rows_are_multiplied_as_in_float64_whatever_else_is_computed(
    kernel_set: str, rows: int, columns: int, inner: int
) -> None:
    x, matrix = torch.randn(rows, inner), torch.randn(columns, inner)
    found = ops.Product(matrix.numpy()).of(x.numpy())
    assert_close(found, linear(x, matrix), length=inner)
    for threads in (1, 3):
        _C.set_num_threads(threads)
        product = ops.Product(matrix.T.contiguous().T.numpy())  # not contiguous, as an adapter's transpose
        assert_same_bits(product.of(x.numpy()), found)
        assert_same_bits(product.of(x[-1:].numpy()), found[-1:])
