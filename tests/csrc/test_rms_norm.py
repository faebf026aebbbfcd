"""The kernel rms_norm against its reference, with every instruction set."""

from __future__ import annotations

import pytest
import torch

from tests.reference.compare import assert_close, assert_same_bits
from tests.reference.layers import rms_norm


def run(x: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    count = x.shape[0] if rows is None else rows.shape[0]
    out = torch.full((count, x.shape[1]), torch.nan)
    torch.ops.tgi.rms_norm(x, weight, 1e-5, rows, out)
    return out


@pytest.mark.parametrize("hidden", [1, 3, 17, 64, 129, 576])
@pytest.mark.parametrize("tokens", [0, 1, 3, 17])
def test_rows_equal_the_reference(isa: str, tokens: int, hidden: int) -> None:
    x, weight = torch.randn(tokens, hidden) * 3, torch.randn(hidden)
    assert_close(run(x, weight), rms_norm(x, weight, 1e-5), length=hidden + 8)


def test_only_the_rows_asked_for_are_normed_in_their_order(isa: str) -> None:
    x, weight = torch.randn(9, 129), torch.randn(129)
    rows = torch.tensor([8, 0, 8, 3], dtype=torch.int32)
    assert_same_bits(run(x, weight, rows), run(x, weight)[rows.long()])


def test_a_row_has_the_same_bits_alone_and_in_a_batch(isa: str) -> None:
    x, weight = torch.randn(20, 577), torch.randn(577)
    together = run(x, weight)
    for row in range(20):
        assert_same_bits(run(x[row : row + 1], weight), together[row : row + 1])


def test_a_row_of_zeros_stays_zero(isa: str) -> None:
    assert_same_bits(run(torch.zeros(1, 33), torch.ones(33)), torch.zeros(1, 33))


@pytest.mark.parametrize("bad", [-1, 5])
def test_a_row_that_is_not_there_is_refused(bad: int) -> None:
    with pytest.raises(RuntimeError, match=r"`rows`\[1\] must be in \[0, 5\)"):
        run(torch.randn(5, 16), torch.ones(16), torch.tensor([0, bad], dtype=torch.int32))
