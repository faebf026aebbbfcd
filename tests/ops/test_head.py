"""The operator head: the final norm and the logits of the rows asked for."""

from __future__ import annotations

import pytest
import torch

from tests.ops.helpers import random_source
from tests.reference.compare import assert_close
from tests.reference.layers import linear, rms_norm
from tgi_asgi import _C, ops


@pytest.mark.parametrize("rows", [[], [0], [4, 0, 4, 2], list(range(5))])
def test_logits_of_the_rows_asked_for_equal_the_reference(rows: list[int]) -> None:
    _C.set_num_threads(2)
    matrix, source = random_source(131, 33)
    x, norm = torch.randn(5, 33), torch.randn(33)
    logits = ops.head(
        x, torch.tensor(rows, dtype=torch.int32), norm, 1e-5, ops.linear_weight(source, dtype=torch.float32)
    )
    assert_close(logits, linear(rms_norm(x[rows], norm, 1e-5), matrix), length=66)


def test_a_row_that_is_not_there_is_refused() -> None:
    weight = ops.linear_weight(random_source(7, 33)[1], dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"`rows`\[0\] must be in \[0, 5\), got 5"):
        ops.head(torch.randn(5, 33), torch.tensor([5], dtype=torch.int32), torch.ones(33), 1e-5, weight)
