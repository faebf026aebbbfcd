"""The operator norm; the kernel's own tests are in tests/csrc/test_rms_norm.py."""

from __future__ import annotations

import pytest
import torch

from tests.reference.compare import assert_close
from tests.reference.layers import rms_norm
from tgi_asgi import _C, ops


@pytest.mark.parametrize(("tokens", "hidden"), [(0, 16), (1, 17), (129, 64)])
def test_the_activation_is_the_normed_residual(tokens: int, hidden: int) -> None:
    _C.set_num_threads(2)
    x, weight = torch.randn(tokens, hidden), torch.randn(hidden)
    before = x.clone()
    assert_close(ops.norm(x, weight, 1e-6), rms_norm(x, weight, 1e-6), length=hidden)
    assert torch.equal(x, before)


def test_a_weight_of_another_width_is_refused() -> None:
    with pytest.raises(RuntimeError, match="`x` must have shape"):
        ops.norm(torch.randn(2, 16), torch.ones(15), 1e-5)
