"""The operator token_logprobs: log softmax at given tokens, and the best tokens of each row."""

from __future__ import annotations

import pytest
import torch

from tests.support.eager_ops import token_logprobs
from tgi_asgi import _C


@pytest.mark.parametrize(("rows", "vocab", "num_top"), [(0, 5, 2), (1, 1, 1), (3, 17, 17), (17, 1290, 20)])
def test_values_equal_log_softmax(kernel_set: str, rows: int, vocab: int, num_top: int) -> None:
    _C.set_num_threads(2)
    logits, ids = torch.randn(rows, vocab) * 6, torch.randint(vocab, (rows,))
    logprobs, top_ids, top_logprobs = token_logprobs(logits, ids.int(), num_top)
    expected = logits.double().log_softmax(-1)
    chosen = expected.gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), chosen, atol=2e-5, rtol=0)
    best = expected.topk(num_top)
    assert torch.equal(top_ids.long(), best.indices)
    torch.testing.assert_close(top_logprobs.double(), best.values, atol=2e-5, rtol=0)


def test_of_equal_logits_the_lowest_ids_are_listed_in_order(kernel_set: str) -> None:
    _, top_ids, _ = token_logprobs(torch.zeros(1, 100), torch.tensor([4], dtype=torch.int32), 7)
    assert top_ids.tolist() == [list(range(7))]


def test_a_row_that_is_not_finite_is_nan_alone(kernel_set: str) -> None:
    logits = torch.randn(2, 50)
    logits[0, 49] = torch.nan
    logprobs, _, tops = token_logprobs(logits, torch.tensor([1, 1], dtype=torch.int32), 3)
    assert torch.isnan(logprobs).tolist() == [True, False]
    assert torch.isnan(tops).all(1).tolist() == [True, False]


@pytest.mark.parametrize("token", [-1, 50])
def test_a_token_out_of_range_is_refused(token: int) -> None:
    with pytest.raises(ValueError, match=r"`token_ids`\[0\] must be in \[0, 50\)"):
        token_logprobs(torch.randn(1, 50), torch.tensor([token], dtype=torch.int32), 0)
